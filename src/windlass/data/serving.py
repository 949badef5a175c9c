"""Batches of normalised images for one rank, as a function of (epoch, step).

This is the seam where a faster server can be put: whoever fetches knows `num_steps` and `fetch` only.

Step s of an epoch serves the positions sG ≤ p < (s+1)G of that epoch's order, where G is the global batch,
and each rank its slice of them; the last batch of an epoch has what is left.  So every sample is served
once an epoch, for any number of ranks, and the ranks' slices joined are the batch of a single rank.  Each
batch passes through

    gather  →  fit to image_size  →  augment  →  normalise,

of which the first two are done once, at construction, when the result is small enough to keep.

Legend: N samples, C channels, S rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from windlass.data.augment import Augment, AugmentSpec, Crop, Shift, parse_augment
from windlass.data.dataset import ArrayImages, Dataset, Images, Split
from windlass.data.decode import Box
from windlass.data.folder import FolderImages
from windlass.data.order import EpochOrder, shard
from windlass.errors import ConfigError

MAX_KEPT_BYTES = 256 * 2**20
"""A split that takes no more than this when fitted is fitted once and kept."""

_NORMALISE_BYTES = 512 * 2**10
"""Floats written before they are scaled: few enough to be still in cache."""

Span = Callable[[int], tuple[int, int]]
"""From the samples of a step over all ranks to the first and the one after the last of this rank's."""

_CROP_STREAM = 0
"""`Augment.apply` numbers its steps from 1."""


class Batch(NamedTuple):
    """What one rank gets for one step.

    Attributes:
        images: float32 N, C, S, S, normalised.
        labels: int64 N.
        global_count: samples of this step over all ranks.
        ids: sample ids, N; read-only.
    """

    images: Tensor
    labels: Tensor
    global_count: int
    ids: NDArray[np.int64]


class BatchServer:
    """Serves a split to one rank; `fetch` may be called from several threads.

    Args:
        split: the samples.
        dataset: whose mean, std and image shape hold.
        batch: samples per step over all ranks.
        image_size: rows and columns of the images served.
        augment: as `parse_augment` reads it, or an `Augment`.
        seed: of the order and of the augmentation.
        rank: this rank.
        world_size: number of ranks.
        shuffle: False serves the samples in their own order.

    Raises:
        ConfigError: a number that does not fit.
        DataError: from `fetch`, an image cannot be decoded.
    """

    def __init__(
        self,
        split: Split,
        *,
        dataset: Dataset,
        batch: int,
        image_size: int,
        augment: Augment | AugmentSpec = "none",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.augment = augment if isinstance(augment, Augment) else parse_augment(augment)
        _check_numbers(batch=batch, image_size=image_size, rank=rank, world_size=world_size)
        _check_shifts(self.augment, image_size)
        self.batch, self.image_size, self.seed = batch, image_size, seed
        self.rank, self.world_size = rank, world_size
        self._span: Span | None = None
        self.num_samples = len(split)
        self.num_channels = dataset.image_shape[0]
        self._labels = split.labels
        self._images = _fitted_once(split.images, dataset.image_shape, image_size)
        self._order = EpochOrder(len(split), seed=seed, shuffle=shuffle)
        self._scale = [1.0 / (255.0 * std) for std in dataset.std]
        self._offset = [-mean / std for mean, std in zip(dataset.mean, dataset.std, strict=True)]

    @property
    def num_steps(self) -> int:
        """Steps of an epoch; the last may be smaller than the others."""
        return -(-self.num_samples // self.batch)

    def seat(self, rank: int, world_size: int) -> None:
        """Serves another rank, or another number of them, from the next fetch on."""
        _check_numbers(batch=self.batch, image_size=self.image_size, rank=rank, world_size=world_size)
        self.rank, self.world_size = rank, world_size
        self._span = None

    def divide(self, span: Span) -> None:
        """Serves, of the so many samples of every step, those that `span` names, whatever rank this is."""
        self._span = span

    def num_of_step(self, step: int) -> int:
        """Samples of a step over all ranks; the last step may have fewer."""
        return min((step + 1) * self.batch, self.num_samples) - step * self.batch

    def fetch(self, epoch: int, step: int, *, out: Tensor | None = None) -> Batch:
        """The batch of this rank, a pure function of (epoch, step).

        Args:
            epoch: any number from 0.
            step: in range(num_steps).
            out: float32 memory for the images, (at least N), C, S, S; the batch then aliases it.  It pays
                for large images, where fresh memory costs more than filling it.

        Returns:
            This rank's share of the step, which may be empty.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of an epoch of {self.num_steps} steps")
        start, stop = step * self.batch, min((step + 1) * self.batch, self.num_samples)
        first, last = self.own_span(stop - start)
        ids = self._order.ids(epoch, start + first, start + last)
        x_NCSS = self._pixels(ids, epoch)
        images = torch.empty(x_NCSS.shape, dtype=torch.float32) if out is None else out[: len(ids)]
        self._normalise(x_NCSS, images)
        return Batch(images, torch.from_numpy(self._labels[ids]), stop - start, ids)

    def own_span(self, count: int) -> tuple[int, int]:
        """Which of so many samples of a step this rank is served: the first, and the one after the last."""
        if self._span is not None:
            return self._span(count)
        return shard(0, count, rank=self.rank, world_size=self.world_size)

    def _pixels(self, ids: NDArray[np.int64], epoch: int) -> NDArray[np.uint8]:
        """Gathered, fitted and augmented."""
        size, crop = self.image_size, self.augment.crop
        draws = None if crop is None else crop.draw(ids, seed=self.seed, epoch=epoch, stream=_CROP_STREAM)
        if isinstance(self._images, FolderImages):
            x_NCSS = _gather_files(self._images, ids, size=size, crop=crop, draws=draws)
        else:
            x_NCSS = fit_images(self._images.gather(ids), size)
            if crop is not None and draws is not None:
                x_NCSS = _crop_each(x_NCSS, crop, draws)
        return self.augment.apply(x_NCSS, ids, seed=self.seed, epoch=epoch)

    def _normalise(self, x_NCSS: NDArray[np.uint8], out: Tensor) -> None:
        """Write (x / 255 - mean) / std; one product and one sum, which round alike in every batch size."""
        x = torch.from_numpy(x_NCSS)
        per_piece = max(1, _NORMALISE_BYTES // (4 * self.num_channels * self.image_size**2))
        scale, offset = (torch.tensor(v).view(1, -1, 1, 1) for v in (self._scale, self._offset))
        for start in range(0, len(x), per_piece):
            piece = out[start : start + per_piece]
            piece.copy_(x[start : start + per_piece]).mul_(scale).add_(offset)


def _check_numbers(*, batch: int, image_size: int, rank: int, world_size: int) -> None:
    if batch < 1:
        raise ConfigError(f"a batch needs at least 1 sample, got {batch}")
    if image_size < 1:
        raise ConfigError(f"the image size must be at least 1 pixel, got {image_size}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"ranks of a world of {world_size} are 0..{world_size - 1}, got {rank}")


def _check_shifts(augment: Augment, image_size: int) -> None:
    for step in augment.steps:
        if isinstance(step, Shift) and step.pixels >= image_size:
            raise ConfigError(f"a shift of {step.pixels} pixels needs images larger than that, got {image_size}")


def _fitted_once(images: Images, image_shape: tuple[int, int, int], size: int) -> Images:
    """All images at their final size and in memory, where that is small enough; else as they are."""
    channels, height, width = image_shape
    ready = isinstance(images, ArrayImages) and (height, width) == (size, size)
    if ready or isinstance(images, FolderImages) or len(images) * channels * size**2 > MAX_KEPT_BYTES:
        return images
    x_NCSS = np.empty((len(images), channels, size, size), dtype=np.uint8)
    for start in range(0, len(images), 1024):
        ids = np.arange(start, min(start + 1024, len(images)))
        x_NCSS[start : start + len(ids)] = fit_images(images.gather(ids), size)
    return ArrayImages(x_NCSS)


def fit_images(x_NCHW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Images at size × size: as they are, framed with zeros, or scaled.

    Images a little smaller, by no more than a quarter, are framed, as LeCun et al. (1998) put 28 × 28
    digits into 32 × 32 fields; others are scaled bilinearly, with the filter widened when shrinking.
    """
    n, c, h, w = x_NCHW.shape
    if (h, w) == (size, size):
        return x_NCHW
    if 4 * min(h, w) < 3 * size or max(h, w) > size:
        return scale_images(x_NCHW, size)
    top, left = (size - h) // 2, (size - w) // 2
    out = np.zeros((n, c, size, size), dtype=np.uint8)
    out[:, :, top : top + h, left : left + w] = x_NCHW
    return out


def scale_images(x_NCHW: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Images scaled to size × size; as Pillow's bilinear filter, to one grey level."""
    n, c = x_NCHW.shape[:2]
    if n == 0:
        return np.empty((0, c, size, size), dtype=np.uint8)
    x = torch.from_numpy(x_NCHW)
    # Where it enlarges, the widened filter is the plain one, so it serves both directions.
    scaled = interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    out: NDArray[np.uint8] = np.ascontiguousarray(scaled.numpy())
    return out


def resize_with_torch(x_HWC: NDArray[np.uint8], box: Box, size: int) -> NDArray[np.uint8]:
    """The box of an image scaled to size × size: C, H, W.  Three times as fast as Pillow."""
    top, left, height, width = box
    x_CHW = x_HWC[top : top + height, left : left + width].transpose(2, 0, 1)
    scaled: NDArray[np.uint8] = scale_images(x_CHW[None], size)[0]
    return scaled


def _gather_files(
    images: FolderImages,
    ids: NDArray[np.int64],
    *,
    size: int,
    crop: Crop | None,
    draws: NDArray[np.float64] | None,
) -> NDArray[np.uint8]:
    """Files decoded, cut at their full resolution, and scaled."""
    if crop is None or draws is None:
        return images.gather(ids, size=size, resize=resize_with_torch)
    return images.gather(ids, size=size, place=lambda i, h, w: crop.box(draws[i], h, w), resize=resize_with_torch)


def _crop_each(x_NCSS: NDArray[np.uint8], crop: Crop, draws: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Each image's own box of it, scaled back to the size of the image."""
    size = x_NCSS.shape[-1]
    out = np.empty_like(x_NCSS)
    for i, x_CSS in enumerate(x_NCSS):
        top, left, height, width = crop.box(draws[i], size, size)
        out[i] = scale_images(x_CSS[None, :, top : top + height, left : left + width], size)[0]
    return out
