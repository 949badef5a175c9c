"""GoogLeNet with both auxiliary heads.

Source: C. Szegedy et al., "Going deeper with convolutions", CVPR 2015, arXiv:1409.4842, section 5 (table 1,
the auxiliary classifiers and the weight 0.3 of their losses).  The convolutions have biases and no batch
normalisation: 6,990,272 weights and 6,998,552 parameters without the heads at 1000 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from windlass.networks.alexnet import init_he

INCEPTIONS: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
"""Table 1: channels in, #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj."""


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2),
        nn.ReLU(inplace=True),
    )


class Inception(nn.Module):
    """Figure 2(b): 1x1, reduced 3x3, reduced 5x5 and projected pooling, side by side, concatenated."""

    def __init__(self, name: str) -> None:
        super().__init__()
        channels, one, three_reduce, three, five_reduce, five, pool = INCEPTIONS[name]
        self.branch1 = _conv(channels, one, 1)
        self.branch3 = nn.Sequential(_conv(channels, three_reduce, 1), _conv(three_reduce, three, 3))
        self.branch5 = nn.Sequential(_conv(channels, five_reduce, 1), _conv(five_reduce, five, 5))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(channels, pool, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps of the same sides, with the channels of all four branches."""
        branches = (self.branch1, self.branch3, self.branch5, self.branch_pool)
        return torch.cat([branch(x_NCHW) for branch in branches], 1)


class AuxiliaryHead(nn.Sequential):
    """Average pooling 5x5/3, 1x1 convolution 128, fc 1024, dropout 70 %, linear (section 5)."""

    def __init__(self, in_channels: int, *, map_size: int, num_classes: int) -> None:
        pooled = (map_size - 5) // 3 + 1
        super().__init__(
            nn.AvgPool2d(5, stride=3),
            _conv(in_channels, 128, 1),
            nn.Flatten(),
            nn.Linear(128 * pooled**2, 1024),
            nn.ReLU(inplace=True),
            nn.Dropout(0.7),
            nn.Linear(1024, num_classes),
        )
        init_he(self)


class GoogLeNet(nn.Module):
    """Table 1.  In training it returns (main, aux4a, aux4d), in evaluation the main logits alone.

    Where 4a's maps have less than 5x5 elements (images under 79) the heads' pooling has no room: the network
    has no heads then and always returns the main logits.

    Attributes:
        auxiliary_weight: weight of each auxiliary loss (section 5).
    """

    auxiliary_weight = 0.3

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, local_response_norm: bool) -> None:
        super().__init__()

        def norm() -> list[nn.Module]:
            return [nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)] if local_response_norm else []

        def pool() -> nn.Module:
            return nn.MaxPool2d(3, stride=2, ceil_mode=True)

        self.stem = nn.Sequential(
            _conv(in_channels, 64, 7, stride=2),
            pool(),
            *norm(),
            _conv(64, 64, 1),
            _conv(64, 192, 3),
            *norm(),
            pool(),
        )
        self.inception3 = nn.Sequential(Inception("3a"), Inception("3b"), pool())
        self.inception4a = Inception("4a")
        self.inception4bcd = nn.Sequential(Inception("4b"), Inception("4c"), Inception("4d"))
        self.inception4e = nn.Sequential(Inception("4e"), pool())
        self.inception5 = nn.Sequential(Inception("5a"), Inception("5b"))
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(1024, num_classes)
        )
        init_he(self)
        map_size = inception4_map(image_size)
        self.aux4a: AuxiliaryHead | None = None
        self.aux4d: AuxiliaryHead | None = None
        if map_size >= 5:
            self.aux4a = AuxiliaryHead(512, map_size=map_size, num_classes=num_classes)
            self.aux4d = AuxiliaryHead(528, map_size=map_size, num_classes=num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Images to logits (batch, num_classes), in training with those of the auxiliary heads."""
        x4a = self.inception4a(self.inception3(self.stem(x_NCHW)))
        x4d = self.inception4bcd(x4a)
        main: Tensor = self.classifier(self.inception5(self.inception4e(x4d)))
        if self.training and self.aux4a is not None and self.aux4d is not None:
            return main, self.aux4a(x4a), self.aux4d(x4d)
        return main


def inception4_map(image_size: int) -> int:
    """Side of the maps of inceptions 4a to 4e.

    >>> inception4_map(224), inception4_map(79), inception4_map(78), inception4_map(32)
    (14, 5, 4, 2)
    """
    side = (image_size + 1) // 2
    for _ in range(3):
        side = -((3 - side) // 2) + 1
    return side


def googlenet(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    local_response_norm: bool = True,
) -> GoogLeNet:
    """GoogLeNet (Szegedy et al. 2015, table 1): 6,998,552 parameters and two heads of 3.2 M at the defaults.

    Images of side 32 or more, the smallest power of two that the four poolings leave something of; the heads
    exist from side 79 on.  Weights by He et al. 2015: the paper does not say how it drew them.
    """
    return GoogLeNet(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        local_response_norm=local_response_norm,
    )
