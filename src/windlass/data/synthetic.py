"""Made-up images that can be learned: each class has its own coarse pattern, each image its own noise.

An image is computed when it is asked for, so that a million of them take no memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from windlass.data.dataset import Dataset, Split, channel_statistics, hold_out
from windlass.data.order import mix64, uniforms
from windlass.errors import ConfigError

GRID = 4
"""A pattern has GRID × GRID cells per channel."""
PATTERN_LEVELS = 160
NOISE_LEVELS = 96
"""Pattern and noise add up to at most 254, so uint8 does not overflow."""
NUM_NOISE_STARTS = 65536
SEED = 0x73796E7468
DEFAULT = "3x32x32:10:2048"

_SPEC = re.compile(r"(\d+)x(\d+)x(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticShape:
    """How many images, of how many classes, of which shape (C, H, W)."""

    image_shape: tuple[int, int, int]
    num_classes: int
    num_images: int

    def __post_init__(self) -> None:
        if min(*self.image_shape, self.num_classes) < 1 or self.num_images < 2:
            raise ConfigError(
                f"synthetic images need sizes and classes of at least 1 and a count of at least 2, got {self}"
            )

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.image_shape))}:{self.num_classes}:{self.num_images}"


def parse_shape(argument: str) -> SyntheticShape:
    """Read `CxHxW`, `CxHxW:CLASSES` or `CxHxW:CLASSES:COUNT`; what is left out is as in `DEFAULT`.

    >>> parse_shape("1x28x28:5")
    SyntheticShape(image_shape=(1, 28, 28), num_classes=5, num_images=2048)
    """
    match = _SPEC.fullmatch(argument or DEFAULT)
    if match is None:
        raise ConfigError(f"synthetic images are asked for as synthetic:{DEFAULT}, got synthetic:{argument}")
    c, h, w, num_classes, num_images = match.groups()
    return SyntheticShape(
        image_shape=(int(c), int(h), int(w)),
        num_classes=int(num_classes or 10),
        num_images=int(num_images or 2048),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticImages:
    """Images numbered by `ids`: patterns_KCGG, one per class, enlarged, plus a window into `noise`."""

    image_shape: tuple[int, int, int]
    patterns_KCGG: NDArray[np.uint8]  # noqa: N815 - axes
    noise: NDArray[np.uint8]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, ids: NDArray[np.int64], *, size: int | None = None) -> NDArray[np.uint8]:
        """The images `ids`, computed; `size` is ignored."""
        numbers = self.ids[ids]
        c, h, w = self.image_shape
        rows, columns = np.arange(h) * GRID // h, np.arange(w) * GRID // w
        x_NCHW = self.patterns_KCGG[numbers % len(self.patterns_KCGG)][:, :, rows[:, None], columns]
        starts = (uniforms(numbers, seed=SEED, epoch=0, stream=0) * NUM_NOISE_STARTS).astype(np.int64)
        for x_CHW, start in zip(x_NCHW, starts, strict=True):
            x_CHW += self.noise[start : start + c * h * w].reshape(c, h, w)
        return x_NCHW

    def take(self, ids: NDArray[np.int64]) -> SyntheticImages:
        """Only the images `ids`."""
        return replace(self, ids=self.ids[ids])


def open_synthetic(argument: str, holdout: float) -> Dataset:
    """Images as `argument` says; mean and std are those of the first 256 training images."""
    shape = parse_shape(argument)
    c, h, w = shape.image_shape
    rng = np.random.default_rng(mix64(SEED))
    ids = np.arange(shape.num_images)
    patterns = rng.integers(0, PATTERN_LEVELS, (shape.num_classes, c, GRID, GRID), dtype=np.uint8)
    noise = rng.integers(0, NOISE_LEVELS, NUM_NOISE_STARTS + c * h * w, dtype=np.uint8)
    images = SyntheticImages(shape.image_shape, patterns, noise, ids)
    train, test = hold_out(Split(images, ids % shape.num_classes), holdout, place=f"synthetic:{shape}")
    mean, std = channel_statistics(train.images.gather(np.arange(min(len(train), 256))))
    return Dataset(
        name="synthetic",
        train=train,
        test=test,
        num_classes=shape.num_classes,
        class_names=tuple(f"class {k}" for k in range(shape.num_classes)),
        image_shape=shape.image_shape,
        mean=mean,
        std=std,
    )


def check_synthetic(argument: str, holdout: float) -> None:
    """Only that `argument` can be read."""
    parse_shape(argument)
