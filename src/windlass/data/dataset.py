"""What every source hands over: images, labels, and the split into training and test samples.

Legend: N samples, C channels, H rows, W columns.  Images are uint8; labels are int64 class numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from windlass.data.order import permute
from windlass.errors import ConfigError, DataError

HOLDOUT_KEY = 0x77696E646C617373
"""Key of the permutation that picks held-out samples: fixed, so that runs with other seeds are comparable."""


class Images(Protocol):
    """Images that can be fetched by number, in any order."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def gather(self, ids: NDArray[np.int64], *, size: int | None = None) -> NDArray[np.uint8]:
        """The images `ids` as a new uint8 array N, C, H, W.

        Images of varied sizes come as the centre square scaled to `size` × `size`; images of one size ignore
        `size`.
        """
        ...

    def take(self, ids: NDArray[np.int64]) -> Self:
        """Only the images `ids`, renumbered in that order."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ArrayImages:
    """Images of one size that lie in memory: uint8, N, C, H, W."""

    x_NCHW: NDArray[np.uint8]  # noqa: N815 - axes

    def __len__(self) -> int:
        return len(self.x_NCHW)

    def gather(self, ids: NDArray[np.int64], *, size: int | None = None) -> NDArray[np.uint8]:
        """The images `ids`, copied; `size` is ignored."""
        return self.x_NCHW.take(ids, axis=0)

    def take(self, ids: NDArray[np.int64]) -> ArrayImages:
        """Only the images `ids`."""
        return ArrayImages(self.x_NCHW.take(ids, axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Samples of one purpose, training or test: image i has label i."""

    images: Images
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, ids: NDArray[np.int64]) -> Split:
        """Only the samples `ids`."""
        return Split(self.images.take(ids), self.labels[ids])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Dataset:
    """A source, opened.

    Attributes:
        name: of the source, as in `SOURCES`.
        train: samples to learn from; never empty.
        test: samples to be judged by; never empty.
        num_classes: labels are in range(num_classes).
        class_names: one for each class.
        image_shape: (C, H, W); H = W = 0 says that sizes vary from image to image.
        mean: per channel, of the training images, where white is 1.
        std: per channel, likewise; never 0.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def varied_sizes(self) -> bool:
        """Whether images differ in size, so that a size must be chosen before they make a batch."""
        return self.image_shape[1] == 0


def check_holdout(holdout: float) -> None:
    """Raise ConfigError unless 0 < holdout < 1."""
    if not 0.0 < holdout < 1.0:
        raise ConfigError(f"the held-out share must lie between 0 and 1 (both excluded), got {holdout:g}")


def hold_out(split: Split, holdout: float, *, place: str) -> tuple[Split, Split]:
    """Cut `split` into training and test samples; which is which depends on its length and `holdout` alone.

    Args:
        split: at least two samples.
        holdout: share of the test samples; rounded, but at least one sample stays on each side.
        place: file or folder to name when there are too few samples.

    Raises:
        DataError: fewer than two samples.
    """
    train_ids, test_ids = holdout_ids(len(split), holdout, place=place)
    return split.take(train_ids), split.take(test_ids)


def holdout_ids(num_samples: int, holdout: float, *, place: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids of the training and of the test samples, both ascending; see `hold_out`."""
    if num_samples < 2:
        raise DataError(f"{place}: needs at least 2 samples to hold some out for testing, found {num_samples}")
    num_test = min(max(round(num_samples * holdout), 1), num_samples - 1)
    order = permute(np.arange(num_samples), length=num_samples, seed=HOLDOUT_KEY, epoch=0)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def channel_statistics(x_NCHW: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel where white is 1; the deviation of a flat channel is 1."""
    values = np.arange(256) / 255.0
    means, stds = [], []
    for channel in range(x_NCHW.shape[1]):
        share = _histogram(x_NCHW[:, channel]) / x_NCHW[:, channel].size
        mean = float(share @ values)
        std = float(np.sqrt(share @ (values - mean) ** 2))
        means.append(mean)
        stds.append(std if std > 0.0 else 1.0)
    return tuple(means), tuple(stds)


def _histogram(x: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of the 256 values occurs; by pieces, because bincount widens its input to 64 bits."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(x), 1024):
        counts += np.bincount(x[start : start + 1024].ravel(), minlength=256)
    return counts


def check_labels(labels: NDArray[np.int64], num_classes: int, *, place: str) -> None:
    """Raise DataError when a label lies outside range(num_classes), naming the first."""
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        first = int(outside[0])
        raise DataError(
            f"{place}: labels must lie in 0..{num_classes - 1}, found {labels[first]} at sample {first}"
            f" ({outside.size} such labels)"
        )


def array_dataset(
    name: str,
    train: tuple[NDArray[np.uint8], NDArray[np.int64]],
    test: tuple[NDArray[np.uint8], NDArray[np.int64]],
    *,
    class_names: tuple[str, ...],
) -> Dataset:
    """A dataset of images in memory, from (x_NCHW, labels) of training and test samples."""
    channels, height, width = train[0].shape[1:]
    mean, std = channel_statistics(train[0])
    return Dataset(
        name=name,
        train=Split(ArrayImages(train[0]), train[1]),
        test=Split(ArrayImages(test[0]), test[1]),
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
    )
