"""Patches of images without labels: of another source's images, or of made-up pictures that look natural.

The made-up pictures are dead leaves: discs that cover one another, of random grey, whose number falls with the cube
of their radius.  Their amplitude spectrum falls as 1/f and they have edges and occlusion, as photographs do
(A. Lee, D. Mumford and J. Huang, "Occlusion models for natural images", IJCV 41, 2001).  Noise with that spectrum
alone would have no structure beyond it, and nothing to learn once it is whitened.

Every patch is whitened by itself: its mean is taken off and its contrast made equal, as Coates, Lee and Ng (AISTATS
2011, section 3.1.1) do before learning features.  A patch is cut and whitened when it is asked for.

Legend: N patches, C channels, S rows and T columns of a patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from windlass.data.dataset import ArrayImages, Dataset, Images, Split, channel_statistics, hold_out
from windlass.data.order import mix64, uniforms
from windlass.errors import ConfigError

SEED = 0x7061746368
FORM = "patches:16x16, patches:16x16:COUNT or patches:SOURCE:16x16:COUNT"
DEFAULT_SIZE, DEFAULT_COUNT = 16, 2048
NUM_PICTURES, PICTURE_SIZE, NUM_DISCS = 20, 128, 1500
SMALLEST_RADIUS, LARGEST_RADIUS = 1.5, 60.0
CONTRAST = 48.0
"""Grey levels that one standard deviation of a whitened patch has."""
LOWEST_CONTRAST = 10.0
"""Grey levels that are added, as a variance, to a patch's contrast, so that empty ones are not made noise."""

_ARGUMENT = re.compile(r"(?:(?P<source>.+):)?(?P<rows>\d+)x(?P<columns>\d+)(?::(?P<count>\d+))?")

OpenSource = Callable[[str, float], Dataset]
CheckSource = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSpec:
    """What was asked for: patches of `size` (S, T), `count` of them (0: one an image), from `source` or leaves."""

    source: str
    size: tuple[int, int]
    count: int

    def __post_init__(self) -> None:
        if min(self.size) < 2:
            raise ConfigError(f"patches need at least 2x2 pixels, got {self.size[0]}x{self.size[1]}")
        if self.count == 1:
            raise ConfigError("patches: a count of at least 2 is needed, one to train and one to test; got 1")


def parse_patches(argument: str) -> PatchSpec:
    """Read what follows ``patches:``; empty: 2,048 patches of 16 × 16 dead leaves.

    >>> parse_patches("digits:16x16")
    PatchSpec(source='digits', size=(16, 16), count=0)
    """
    if not argument:
        return PatchSpec(source="", size=(DEFAULT_SIZE, DEFAULT_SIZE), count=DEFAULT_COUNT)
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        raise ConfigError(f"patches are asked for as {FORM}, got patches:{argument}")
    count = int(match["count"]) if match["count"] else 0 if match["source"] else DEFAULT_COUNT
    return PatchSpec(source=match["source"] or "", size=(int(match["rows"]), int(match["columns"])), count=count)


@dataclass(frozen=True, slots=True, eq=False)
class PatchImages:
    """Patches numbered by `ids`, each at a place of its own in one of `images`; made when they are asked for."""

    images: Images
    size: tuple[int, int]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def gather(self, ids: NDArray[np.int64], *, size: int | None = None) -> NDArray[np.uint8]:
        """The patches `ids`, cut and whitened; `size` is ignored."""
        numbers = self.ids[ids]
        x_NCHW = enlarged(self.images.gather(numbers % len(self.images), size=2 * max(self.size)), self.size)
        return whitened(cut(x_NCHW, numbers, self.size))

    def take(self, ids: NDArray[np.int64]) -> PatchImages:
        """Only the patches `ids`."""
        return replace(self, ids=self.ids[ids])


def cut(x_NCHW: NDArray[np.uint8], numbers: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """From each image one patch, N, C, S, T, at a place drawn from its number."""
    windows = sliding_window_view(x_NCHW, size, axis=(2, 3))
    places = [
        (uniforms(numbers, seed=SEED, epoch=0, stream=stream) * windows.shape[2 + stream]).astype(np.int64)
        for stream in (0, 1)
    ]
    patches: NDArray[np.uint8] = windows[np.arange(len(numbers)), :, places[0], places[1]]
    return patches


def enlarged(x_NCHW: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Images no smaller than `size`: every pixel repeated as often as that takes."""
    times = max(-(-need // have) for need, have in zip(size, x_NCHW.shape[2:], strict=True))
    return x_NCHW if times <= 1 else x_NCHW.repeat(times, axis=2).repeat(times, axis=3)


def whitened(x_NCST: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Each patch with the mean 128 and, unless it is almost empty, the standard deviation `CONTRAST`."""
    x = x_NCST.astype(np.float32)
    x -= x.mean(axis=(1, 2, 3), keepdims=True)
    x *= CONTRAST / np.sqrt(x.var(axis=(1, 2, 3), keepdims=True) + LOWEST_CONTRAST**2)
    out: NDArray[np.uint8] = np.clip(np.rint(x + 128.0), 0, 255).astype(np.uint8)
    return out


def dead_leaves(num_pictures: int, size: int, *, seed: int = SEED) -> NDArray[np.uint8]:
    """Grey pictures N, 1, size, size of discs that cover one another."""
    rng = np.random.default_rng(mix64(seed))
    out = np.full((num_pictures, 1, size, size), 128, dtype=np.uint8)
    for picture in out[:, 0]:
        # The density r⁻³ between the smallest and the largest radius, by its inverse distribution function.
        share = rng.random(NUM_DISCS) * (1 - (SMALLEST_RADIUS / LARGEST_RADIUS) ** 2)
        radii = SMALLEST_RADIUS / np.sqrt(1 - share)
        centres = rng.random((NUM_DISCS, 2)) * (size + 2 * LARGEST_RADIUS) - LARGEST_RADIUS
        for (row, column), radius, grey in zip(centres, radii, rng.integers(0, 256, NUM_DISCS), strict=True):
            _paint(picture, row, column, radius=radius, grey=grey)
    return out


def _paint(picture: NDArray[np.uint8], row: float, column: float, *, radius: float, grey: int) -> None:
    top, left = (max(0, int(np.ceil(at - radius))) for at in (row, column))
    bottom, right = (max(0, int(at + radius) + 1) for at in (row, column))
    part = picture[top:bottom, left:right]
    rows, columns = np.arange(top, top + part.shape[0]) - row, np.arange(left, left + part.shape[1]) - column
    part[rows[:, None] ** 2 + columns[None] ** 2 <= radius**2] = grey


def open_patches(argument: str, holdout: float, *, open_source: OpenSource) -> Dataset:
    """Patches as `argument` says; those to test by come from other images than those to train on.

    Args:
        argument: as `parse_patches` reads it.
        holdout: share of the samples to test by.
        open_source: opens the source whose images are cut.
    """
    spec = parse_patches(argument)
    if spec.source:
        dataset = open_source(spec.source, holdout)
        train, test, channels = dataset.train, dataset.test, dataset.image_shape[0]
    else:
        pictures = ArrayImages(dead_leaves(NUM_PICTURES, max(PICTURE_SIZE, 2 * max(spec.size))))
        labels = np.zeros(NUM_PICTURES, dtype=np.int64)
        train, test = hold_out(Split(pictures, labels), holdout, place="patches")
        channels = 1
    num_test = min(max(round(spec.count * holdout), 1), spec.count - 1) if spec.count else len(test)
    num_train = spec.count - num_test if spec.count else len(train)
    patches = _patches(train, spec.size, num_train)
    mean, std = channel_statistics(patches.images.gather(np.arange(min(num_train, 256))))
    return Dataset(
        name="patches",
        train=patches,
        test=_patches(test, spec.size, num_test),
        num_classes=1,
        class_names=("patch",),
        image_shape=(channels, *spec.size),
        mean=mean,
        std=std,
    )


def check_patches(argument: str, holdout: float, *, check_source: CheckSource) -> None:
    """That `argument` can be read, and what the source it names checks."""
    spec = parse_patches(argument)
    if spec.source:
        check_source(spec.source, holdout)


def _patches(split: Split, size: tuple[int, int], count: int) -> Split:
    ids = np.arange(count)
    return Split(PatchImages(split.images, size, ids), np.zeros(count, dtype=np.int64))
