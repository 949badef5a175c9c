"""ResNet with 18, 34, 50, 101 and 152 layers, in the original form.

Source: K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016,
arXiv:1512.03385, section 3 (equations 1 and 2, projection shortcuts of option B, batch normalisation after
each convolution) and table 1.  The stride of a bottleneck lies in its first 1x1 convolution, as in the paper;
many later implementations moved it to the 3x3.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from windlass.errors import ConfigError, unknown

Stem = Literal["auto", "imagenet", "cifar"]
STEMS = ("auto", "imagenet", "cifar")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut (figure 5, left)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride=stride)
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))`` (equation 1)."""
        y = self.relu1(self.bn1(self.conv1(x_NCHW)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x_NCHW))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last four times as wide, and the shortcut (figure 5, right)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(in_channels, 4 * width, stride=stride)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))`` (equation 1)."""
        y = self.relu1(self.bn1(self.conv1(x_NCHW)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu3(y + self.shortcut(x_NCHW))
        return out


def _shortcut(in_channels: int, out_channels: int, *, stride: int) -> nn.Module:
    """Option B (section 3.3): the identity where shapes agree, a 1x1 projection where they do not."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNet(nn.Module):
    """A stem, four stages of blocks with 64, 128, 256 and 512 filters, average pooling, the classes."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        num_blocks: tuple[int, int, int, int],
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        stem: Stem,
    ) -> None:
        super().__init__()
        self.stem = _stem(in_channels, image_size=image_size, stem=stem)
        channels = 64
        stages: list[nn.Module] = []
        for stage, count in enumerate(num_blocks):
            width = 64 * 2**stage
            blocks: list[nn.Module] = []
            for index in range(count):
                blocks.append(block(channels, width, stride=2 if index == 0 and stage > 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        _init_he(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Images to logits (batch, num_classes)."""
        x = self.stem(x_NCHW)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        out: Tensor = self.fc(self.flatten(self.pool(x)))
        return out


def _stem(in_channels: int, *, image_size: int, stem: Stem) -> nn.Sequential:
    """Table 1's 7x7/2 convolution and 3x3/2 max-pooling, or section 4.2's 3x3 for small images."""
    if stem not in STEMS:
        raise ConfigError(unknown("stem", str(stem), STEMS))
    if stem == "cifar" or (stem == "auto" and image_size <= 64):
        return nn.Sequential(
            nn.Conv2d(in_channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
    return nn.Sequential(
        nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _init_he(network: nn.Module) -> None:
    """He et al. 2015 (arXiv:1502.01852), for the backward pass (equation 14); fc N(0, 0.01²)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)


def resnet18(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, stem: Stem = "auto") -> ResNet:
    """ResNet-18 (He et al. 2016, table 1): 11,689,512 parameters at the defaults.

    `stem`: "imagenet" is the paper's 7x7/2 convolution with max-pooling, "cifar" a 3x3 convolution of stride
    1 for small images; "auto" takes the latter up to 64 pixels.
    """
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


def resnet34(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, stem: Stem = "auto") -> ResNet:
    """ResNet-34 (He et al. 2016, table 1): 21,797,672 parameters at the defaults.

    `stem`: "imagenet" is the paper's 7x7/2 convolution with max-pooling, "cifar" a 3x3 convolution of stride
    1 for small images; "auto" takes the latter up to 64 pixels.
    """
    return ResNet(
        BasicBlock,
        (3, 4, 6, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


def resnet50(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, stem: Stem = "auto") -> ResNet:
    """ResNet-50 (He et al. 2016, table 1): 25,557,032 parameters at the defaults.

    `stem`: "imagenet" is the paper's 7x7/2 convolution with max-pooling, "cifar" a 3x3 convolution of stride
    1 for small images; "auto" takes the latter up to 64 pixels.
    """
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


def resnet101(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, stem: Stem = "auto") -> ResNet:
    """ResNet-101 (He et al. 2016, table 1): 44,549,160 parameters at the defaults.

    `stem`: "imagenet" is the paper's 7x7/2 convolution with max-pooling, "cifar" a 3x3 convolution of stride
    1 for small images; "auto" takes the latter up to 64 pixels.
    """
    return ResNet(
        Bottleneck,
        (3, 4, 23, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )


def resnet152(*, num_classes: int = 1000, in_channels: int = 3, image_size: int = 224, stem: Stem = "auto") -> ResNet:
    """ResNet-152 (He et al. 2016, table 1): 60,192,808 parameters at the defaults.

    `stem`: "imagenet" is the paper's 7x7/2 convolution with max-pooling, "cifar" a 3x3 convolution of stride
    1 for small images; "auto" takes the latter up to 64 pixels.
    """
    return ResNet(
        Bottleneck,
        (3, 8, 36, 3),
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
    )
