"""VGG with 11, 16 and 19 weight layers.

Source: K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR
2015, arXiv:1409.1556, section 2 (table 1: configurations A, D and E) and section 3.1 (weights).
"""

from __future__ import annotations

from torch import Tensor, nn

CONFIGURATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "A": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "D": ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    "E": ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512, 512, 512, 512)),
}
"""Filters of the 3x3 convolutions (table 1); a max-pooling follows every block."""


class VGG(nn.Module):
    """Blocks of 3x3 convolutions, each followed by a 2x2 max-pooling, then 4096, 4096 and the classes."""

    def __init__(
        self, configuration: str, *, num_classes: int, in_channels: int, image_size: int, dropout: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for block in CONFIGURATIONS[configuration]:
            for filters in block:
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
                channels = filters
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * (image_size // 32) ** 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        _init_glorot(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images to logits (batch, num_classes)."""
        out: Tensor = self.classifier(self.features(x_NCHW))
        return out


def _init_glorot(network: nn.Module) -> None:
    """Glorot and Bengio 2010, which the paper found to make its pre-training needless (section 3.1).

    The gain of √2 is that of ReLU (PyTorch's `calculate_gain`); without it 19 layers halve the variance 18
    times.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=nn.init.calculate_gain("relu"))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def vgg11(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5) -> VGG:
    """VGG-11, configuration A (Simonyan and Zisserman 2015, table 1): 132,863,336 parameters at the defaults.

    Images of side 32 or more.
    """
    return VGG("A", num_classes=num_classes, in_channels=in_channels, image_size=image_size, dropout=dropout)


def vgg16(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5) -> VGG:
    """VGG-16, configuration D (Simonyan and Zisserman 2015, table 1): 138,357,544 parameters at the defaults.

    Images of side 32 or more.
    """
    return VGG("D", num_classes=num_classes, in_channels=in_channels, image_size=image_size, dropout=dropout)


def vgg19(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, dropout: float = 0.5) -> VGG:
    """VGG-19, configuration E (Simonyan and Zisserman 2015, table 1): 143,667,240 parameters at the defaults.

    Images of side 32 or more.
    """
    return VGG("E", num_classes=num_classes, in_channels=in_channels, image_size=image_size, dropout=dropout)
