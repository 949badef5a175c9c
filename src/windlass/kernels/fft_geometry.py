"""Tiles, filters and scratch memory of a convolution in the Fourier domain, and how its arrays stand in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from windlass.errors import ConfigError
from windlass.kernels.jit import LANES
from windlass.kernels.spectra import Room, Taps, Tiling
from windlass.kernels.strips import Image
from windlass.plan.convolution import ConvShape

Array = npt.NDArray[np.float32]

STREAM_BYTES = 8 << 20
"""Results at least so large are written past the caches."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """A convolution of overlapping tiles; for the gradient of the input (`turned`) x is dy and y is dx.

    Attributes:
        n: pixels of a tile's side.
        nonzero: rows and columns of a filter's tile that are transformed: a quarter, half or all.
        top, left: zeros before x.
        x_tiling, y_tiling: the tiles of x, and those of y below them.
        tiles: how many there are in the batch.
        turned: whether the product is with the filter's spectra, not with their conjugates.
    """

    n: int
    nonzero: int
    top: int
    left: int
    x_tiling: Tiling
    y_tiling: Tiling
    tiles: int
    turned: bool


@cache
def geometry(shape: ConvShape, n: int, *, turned: bool = False) -> Geometry:
    """The tiles of a convolution; one for a whole image where what wraps around falls on zeros.

    Conjugate spectra give pixel p of a tile from its pixels p to p + extent - 1: the last ones are wrong.  The
    spectra themselves give it from its pixels p - extent + 1 to p: the first ones are wrong, and left out.

    Raises:
        ConfigError: the stride is not 1, or the filter not smaller than the tile.
    """
    extent = tuple(d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel, strict=True))
    if shape.stride != (1, 1):
        raise ConfigError(f"fft-{n} needs stride 1, got {shape.stride[0]}x{shape.stride[1]}")
    if max(extent) >= n:
        raise ConfigError(f"fft-{n} needs a filter smaller than its tile of {n}, got {max(extent)}")
    sizes, out = (shape.height, shape.width), (shape.out_height, shape.out_width)
    before = (shape.padding[0], shape.padding[2])
    if turned:
        sizes, out = out, sizes
        before = (extent[0] - 1 - before[0], extent[1] - 1 - before[1])
    steps, starts, skipped = [], [], []
    for size, wanted, reach, zeros in zip(sizes, out, extent, before, strict=True):
        alone = size + zeros <= n and wanted + reach - 1 - max(0, zeros) <= n
        steps.append(wanted if alone else min(wanted, n - reach + 1))
        starts.append(min(zeros, 0) if alone and turned else zeros)
        skipped.append(reach - 1 + starts[-1] - zeros if turned else 0)
    down, across = (-(-wanted // step) for wanted, step in zip(out, steps, strict=True))
    return Geometry(
        n=n,
        nonzero=next(part for part in (n // 4, n // 2, n) if max(extent) <= part),
        top=starts[0],
        left=starts[1],
        x_tiling=Tiling(down, across, steps[0], steps[1], n, n),
        y_tiling=Tiling(down, across, steps[0], steps[1], steps[0], steps[1], skipped[0], skipped[1]),
        tiles=shape.batch * down * across,
        turned=turned,
    )


def room_of(n: int, weights: int) -> Room:
    """A thread's scratch: rows of a tile, one row of pixels and 16 more, and so many floats of weights or others."""
    buffer = n * 2 * (n // 2 + 1) * LANES
    block = buffer + (n + LANES) * LANES
    return Room(buffer, block, odd_lines(block + weights))


def odd_lines(numbers: int) -> int:
    """At least so many numbers, as an odd number of cache lines: planes at this distance do not share sets."""
    return (-(-numbers // LANES) | 1) * LANES


def image_of(array: Array, top: int = 0, left: int = 0) -> Image:
    """A batch of images N, C, H, W with so many zeros above and to the left."""
    n, c, h, w = (stride // array.itemsize for stride in array.strides)
    return Image(n, c, h, w, array.shape[2], array.shape[3], top, left)


def taps_of(w: Array, shape: ConvShape, *, turned: bool) -> Taps:
    """The filters of one group; lanes are the channels that come out."""
    out, into, row, col = (stride // w.itemsize for stride in w.strides)
    outputs, inputs = w.shape[:2]
    sides = (*shape.kernel, *shape.dilation)
    if turned:
        return Taps(*sides, into, out, row, col, inputs, outputs)
    return Taps(*sides, out, into, row, col, outputs, inputs)


def is_plain(array: Array) -> bool:
    """Whether kernels can address it: no strides backwards or between numbers."""
    return all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)


def plain(array: Array) -> Array:
    """The array, or a copy that kernels can address."""
    return array if is_plain(array) else np.ascontiguousarray(array)


def padded(bias: Array | None, channels: int) -> Array:
    """The bias, or zeros, of whole blocks of channels."""
    result = np.zeros(-(-channels // LANES) * LANES, np.float32)
    if bias is not None:
        result[: bias.size] = bias
    return result


def streams(y: Array) -> int:
    """Whether each 16 channels of a result are whole cache lines, and too many to stay in cache."""
    apart = (y.strides[0], y.strides[2], y.strides[3], y.ctypes.data)
    return int(y.nbytes >= STREAM_BYTES and y.strides[1] == y.itemsize and not any(stride % 64 for stride in apart))
