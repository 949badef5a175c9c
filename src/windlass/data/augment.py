"""Random changes to training images, drawn for each sample from (seed, epoch, sample id).

The numbers come from counters (`order.uniforms`), so an image looks the same whichever rank or thread
serves it, and other in every epoch.  Legend: N samples, C channels, H rows, W columns; images are uint8.

An augmentation is a frozen dataclass.  A `Step` changes a batch of equal images.  A `Crop` only chooses
boxes: it is applied first wherever it stands in the list, because it cuts from the image at its full
resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from windlass.data.order import uniforms
from windlass.errors import ConfigError, unknown


class Step(Protocol):
    """A change to a batch of images of one size."""

    def apply(
        self, x_NCHW: NDArray[np.uint8], ids: NDArray[np.int64], *, seed: int, epoch: int, stream: int
    ) -> NDArray[np.uint8]:
        """Changed images, a new array; `ids` are sample ids, `stream` tells this step from others."""
        ...


def draw(ids: NDArray[np.int64], count: int, *, seed: int, epoch: int, stream: int) -> NDArray[np.float64]:
    """`count` uniform numbers for each sample: N, count."""
    counters = ids[:, None] * count + np.arange(count)
    return uniforms(counters, seed=seed, epoch=epoch, stream=stream)


@dataclass(frozen=True, slots=True)
class Shift:
    """Move by up to `pixels` either way in both directions; what comes in from outside is 0.

    Padding by as much and cutting at a random place (He et al., arXiv:1512.03385, 4.2) is the same.
    """

    pixels: int

    def __post_init__(self) -> None:
        if self.pixels < 1:
            raise ConfigError(f"a shift needs at least 1 pixel, got {self.pixels}")

    def apply(
        self, x_NCHW: NDArray[np.uint8], ids: NDArray[np.int64], *, seed: int, epoch: int, stream: int
    ) -> NDArray[np.uint8]:
        """Shifted images."""
        n, c, h, w = x_NCHW.shape
        p = self.pixels
        draws = draw(ids, 2, seed=seed, epoch=epoch, stream=stream)
        tops, lefts = (draws * (2 * p + 1)).astype(np.int64).T
        padded = np.zeros((n, c, h + 2 * p, w + 2 * p), dtype=np.uint8)
        padded[:, :, p : p + h, p : p + w] = x_NCHW
        return cut_windows(padded, tops, lefts, height=h, width=w)


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirror left to right, half of the images."""

    def apply(
        self, x_NCHW: NDArray[np.uint8], ids: NDArray[np.int64], *, seed: int, epoch: int, stream: int
    ) -> NDArray[np.uint8]:
        """Images, half of them mirrored."""
        chosen = draw(ids, 1, seed=seed, epoch=epoch, stream=stream)[:, 0] < 0.5
        out = x_NCHW.copy()
        out[chosen] = x_NCHW[chosen, :, :, ::-1]
        return out


@dataclass(frozen=True, slots=True)
class Crop:
    """A random box of an image, scaled to the size served (Szegedy et al., arXiv:1409.4842, section 6).

    The box has a share of the area between `min_scale` and 1, and a width to height ratio between 3/4 and
    4/3, whose logarithm is uniform.  A draw that does not fit is drawn again; after ten, the largest
    centred box of a permitted ratio is taken.
    """

    min_scale: float = 0.08

    NUM_TRIES = 10
    MAX_RATIO = 4.0 / 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.min_scale <= 1.0:
            raise ConfigError(f"a crop needs a smallest share of the area in (0, 1], got {self.min_scale:g}")

    def draw(self, ids: NDArray[np.int64], *, seed: int, epoch: int, stream: int) -> NDArray[np.float64]:
        """Uniform numbers for `boxes`: N, tries, 4."""
        draws = draw(ids, self.NUM_TRIES * 4, seed=seed, epoch=epoch, stream=stream)
        return draws.reshape(-1, self.NUM_TRIES, 4)

    def box(self, draws: NDArray[np.float64], height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the box of one image of height × width; `draws` is (tries, 4)."""
        for area, ratio, top, left in draws.tolist():
            num_pixels = height * width * (self.min_scale + (1.0 - self.min_scale) * area)
            aspect = self.MAX_RATIO ** (2.0 * ratio - 1.0)
            h, w = round(math.sqrt(num_pixels / aspect)), round(math.sqrt(num_pixels * aspect))
            if 0 < h <= height and 0 < w <= width:
                return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
        h = min(height, round(width * self.MAX_RATIO))
        w = min(width, round(height * self.MAX_RATIO))
        return (height - h) // 2, (width - w) // 2, h, w


def cut_windows(
    x_NCHW: NDArray[np.uint8], tops: NDArray[np.int64], lefts: NDArray[np.int64], *, height: int, width: int
) -> NDArray[np.uint8]:
    """From each image the window height × width at its own (top, left).

    A row of a window is copied as one item of `width` bytes: every byte of the array is seen as the start
    of such an item, and the starts wanted are taken.
    """
    n, c, h, w = x_NCHW.shape
    assert x_NCHW.flags.c_contiguous
    if n == 0:
        return np.empty((0, c, height, width), dtype=np.uint8)
    row = np.dtype((np.void, width))
    num_starts = x_NCHW.size - width + 1
    starts_of_rows = as_strided(x_NCHW.reshape(-1)[:width].view(row), shape=(num_starts,), strides=(1,))
    corners = np.arange(n) * (c * h * w) + tops * w + lefts
    planes = (np.arange(c) * (h * w))[:, None] + np.arange(height) * w
    rows = starts_of_rows[corners[:, None, None] + planes]
    windows: NDArray[np.uint8] = rows.view(np.uint8).reshape(n, c, height, width)
    return windows


@dataclass(frozen=True, slots=True)
class AugmentationEntry:
    """A row of `AUGMENTATIONS`: how to make it from its parameter, an empty string when none is given."""

    make: Callable[[str], Step | Crop]
    parameter: str
    description: str


def _shift(parameter: str, default: int) -> Shift:
    return Shift(int(parameter) if parameter else default)


def _flip(parameter: str) -> Flip:
    if parameter:
        raise ValueError
    return Flip()


AUGMENTATIONS: dict[str, AugmentationEntry] = {
    "shift": AugmentationEntry(
        lambda text: _shift(text, 2), "PIXELS", "move by up to PIXELS (2) either way, filling with 0"
    ),
    "flip": AugmentationEntry(_flip, "", "mirror half of the images left to right"),
    "crop": AugmentationEntry(
        lambda text: Crop(float(text)) if text else Crop(),
        "SHARE",
        "a random box of at least SHARE (0.08) of the area, scaled to the size served",
    ),
    "pad-crop": AugmentationEntry(
        lambda text: _shift(text, 4), "PIXELS", "pad by PIXELS (4) and cut at a random place"
    ),
}


@dataclass(frozen=True, slots=True)
class Augment:
    """What happens to a training image: the crop if there is one, then the steps in order."""

    crop: Crop | None = None
    steps: tuple[Step, ...] = ()

    def apply(self, x_NCHW: NDArray[np.uint8], ids: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[np.uint8]:
        """The steps, without the crop; stream 0 belongs to the crop."""
        for stream, step in enumerate(self.steps, start=1):
            x_NCHW = step.apply(x_NCHW, ids, seed=seed, epoch=epoch, stream=stream)
        return x_NCHW


AugmentSpec: TypeAlias = str | Sequence[str]


def parse_augment(spec: AugmentSpec) -> Augment:
    """Read `"shift:2,flip"`, or the same as a sequence; `"none"` or nothing is no augmentation.

    Raises:
        ConfigError: an unknown name, a parameter that does not fit, or a name given twice.

    >>> parse_augment("flip,crop:0.5")
    Augment(crop=Crop(min_scale=0.5), steps=(Flip(),))
    """
    words = [word.strip() for word in (spec.split(",") if isinstance(spec, str) else spec)]
    words = [word for word in words if word not in ("", "none")]
    names = [word.partition(":")[0] for word in words]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"augmentation {twice[0]!r} is given twice")
    parsed = [_parse_one(word) for word in words]
    crops = [one for one in parsed if isinstance(one, Crop)]
    steps = tuple(one for one in parsed if not isinstance(one, Crop))
    return Augment(crops[0] if crops else None, steps)


def _parse_one(word: str) -> Step | Crop:
    name, colon, parameter = word.partition(":")
    if name not in AUGMENTATIONS:
        raise ConfigError(unknown("augmentation", name, [*AUGMENTATIONS, "none"]))
    entry = AUGMENTATIONS[name]
    try:
        if colon and not parameter:
            raise ValueError
        return entry.make(parameter)
    except ValueError:
        form = f"{name}:{entry.parameter}" if entry.parameter else name
        raise ConfigError(f"augmentation {name} is written {form}, got {word!r}") from None
