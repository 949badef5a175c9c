"""AlexNet with one tower, cut for image sizes other than 224 at fc6 alone.

Source: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997v2,
2014, section 5 (the model); the layers' shapes follow A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet
classification with deep convolutional neural networks", NIPS 2012, section 3.  The paper's footnote says 384
filters in conv4, but only 256, as in the author's code, gives its "0.2 % more parameters": 61,100,840.
"""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five convolutions (64, 192, 384, 256, 256 filters), then 4096, 4096 and the classes."""

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        dropout: float,
        local_response_norm: bool,
    ) -> None:
        super().__init__()
        norm = [nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)] if local_response_norm else []
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            *norm,
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            *norm,
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(256 * last_map(image_size) ** 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )
        init_he(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images to logits (batch, num_classes)."""
        out: Tensor = self.classifier(self.features(x_NCHW))
        return out


def last_map(image_size: int) -> int:
    """Side of the map that fc6 reads.

    >>> last_map(224), last_map(63)
    (6, 1)
    """
    conv1 = (image_size + 2 * 2 - 11) // 4 + 1
    pool1 = (conv1 - 3) // 2 + 1
    pool2 = (pool1 - 3) // 2 + 1
    return (pool2 - 3) // 2 + 1


def init_he(network: nn.Module) -> None:
    """Draw weights by He et al. 2015 (arXiv:1502.01852, equation 10), the last layer N(0, 0.01²).

    The paper's N(0, 0.01²) everywhere with ones as biases starts only after epochs of almost constant loss;
    He's variance 2/fan-in keeps the signal's scale through ReLUs from the first step.
    """
    weighted = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in weighted:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    if weighted:
        nn.init.normal_(weighted[-1].weight, std=0.01)


def alexnet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    dropout: float = 0.5,
    local_response_norm: bool = False,
) -> AlexNet:
    """AlexNet with one tower (Krizhevsky 2014, section 5): 61,100,840 parameters at the defaults.

    Images of side 63 or more.  `local_response_norm` adds the normalisation of the 2012 paper (section 3.3)
    after conv1 and conv2.  It is off because it costs time and memory on the two largest maps and gains
    little: 1.4 and 1.2 points there, nothing in the networks that came after (Simonyan and Zisserman 2015,
    section 4.1).
    """
    return AlexNet(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        dropout=dropout,
        local_response_norm=local_response_norm,
    )
