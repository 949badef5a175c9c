"""Blocks of 16 channels between tensors and cache: patches at edges, strips of NCHW tensors, blocks of weights.

In cache a pixel of 16 channels is one vector.  A tensor whose channels lie side by side (channels_last) is read
and written where it stands; one whose columns lie side by side (NCHW) is transposed 16 × 16 on the way, without
a pass of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from windlass.kernels.jit import LANES, kernel
from windlass.kernels.transform import clear, move, transpose


class Image(NamedTuple):
    """A batch of images in memory: strides in elements, sizes, and the zeros before the first row and column."""

    n: int
    c: int
    h: int
    w: int
    height: int
    width: int
    top: int
    left: int


@kernel
def patch_in(x: Any, at: int, image: Image, rows: int, cols: int, channels: int, ih: int, iw: int,
             patch: Any, to: int) -> None:  # fmt: skip
    """patch[i, j, 16] = x at (ih + i, iw + j), zero outside the image and from `channels` on."""
    for i in range(rows):
        for j in range(cols):
            base = to + (i * cols + j) * LANES
            inside = 0 <= ih + i < image.height and 0 <= iw + j < image.width
            start = at + (ih + i) * image.h + (iw + j) * image.w
            if inside and image.c == 1 and channels >= LANES:
                move(x, start, patch, base)
                continue
            clear(patch, base)
            if inside:
                for c in range(min(channels, LANES)):
                    patch[base + c] = x[start + c * image.c]


@kernel
def patch_out(patch: Any, at: int, cols: int, y: Any, to: int, image: Image, rows_in: int, cols_in: int,
              channels: int) -> None:  # fmt: skip
    """`y` = the first rows_in × cols_in pixels and `channels` channels of a patch of `cols` columns."""
    for i in range(rows_in):
        for j in range(cols_in):
            base = at + (i * cols + j) * LANES
            start = to + i * image.h + j * image.w
            if image.c == 1 and channels >= LANES:
                move(patch, base, y, start)
                continue
            for c in range(min(channels, LANES)):
                y[start + c * image.c] = patch[base + c]


@kernel
def strip_in(x: Any, at: int, image: Image, rows: int, cols: int, channels: int, ih: int, iw: int,
             strip: Any, to: int) -> None:  # fmt: skip
    """As `patch_in` of an image with neighbouring columns side by side, 16 columns at a time.

    A row of the strip has room for `cols` rounded up to 16.
    """
    room = (cols + LANES - 1) // LANES * LANES
    for i in range(rows):
        line = to + i * room * LANES
        for j in range(0, cols, LANES):
            base = line + j * LANES
            start = at + (ih + i) * image.h + iw + j
            inside = 0 <= ih + i < image.height
            if inside and iw + j >= 0 and iw + j + LANES <= image.width and channels >= LANES:
                transpose(x, start, image.c, strip, base, LANES)
                continue
            for q in range(LANES):
                clear(strip, base + q * LANES)
            if inside:
                low, high = max(0, -(iw + j)), min(LANES, image.width - iw - j)
                for c in range(min(channels, LANES)):
                    for q in range(low, high):
                        strip[base + q * LANES + c] = x[start + q + c * image.c]


@kernel
def strip_out(strip: Any, at: int, cols: int, y: Any, to: int, image: Image, rows_in: int, cols_in: int,
              channels: int) -> None:  # fmt: skip
    """As `patch_out` into an image with neighbouring columns side by side."""
    for i in range(rows_in):
        for j in range(0, cols_in, LANES):
            base = at + (i * cols + j) * LANES
            start = to + i * image.h + j
            if j + LANES <= cols_in and channels >= LANES:
                transpose(strip, base, LANES, y, start, image.c)
                continue
            for c in range(min(channels, LANES)):
                for q in range(min(LANES, cols_in - j)):
                    y[start + q + c * image.c] = strip[base + q * LANES + c]


class Filter(NamedTuple):
    """Weights in memory: where the first stands, and the strides of output and input channel, row and column.

    A filter turned by 180° starts at its last tap and has negative strides.
    """

    at: int
    k: int
    c: int
    r: int
    s: int


@kernel
def filter_in(w: Any, at: int, filter: Filter, side: int, outputs: int, channels: int, block: Any, to: int) -> None:
    """block[c, tap, 16 k] = w[k, c, tap] of up to 16 × 16 channels, zero where there are fewer outputs."""
    taps = side * side
    full = outputs >= LANES and channels >= LANES
    if full and filter.k == 1:
        for c in range(LANES):
            for tap in range(taps):
                start = at + c * filter.c + tap // side * filter.r + tap % side * filter.s
                move(w, start, block, to + (c * taps + tap) * LANES)
    elif full and filter.c == 1:
        for tap in range(taps):
            start = at + tap // side * filter.r + tap % side * filter.s
            transpose(w, start, filter.k, block, to + tap * LANES, taps * LANES)
    elif full and filter.s == 1 and filter.r == side and filter.c == taps:
        for j in range(taps):
            transpose(w, at + j * LANES, filter.k, block, to + j * LANES * LANES, LANES)
    else:
        for c in range(min(channels, LANES)):
            for tap in range(taps):
                start = at + c * filter.c + tap // side * filter.r + tap % side * filter.s
                for k in range(LANES):
                    value = np.float32(0.0)
                    if k < outputs:
                        value = w[start + k * filter.k]
                    block[to + (c * taps + tap) * LANES + k] = value


@kernel
def filter_out(block: Any, at: int, side: int, outputs: int, channels: int, w: Any, to: int, filter: Filter) -> None:
    """w[k, c, tap] = block[c, tap, 16 k] of up to 16 × 16 channels: `filter_in` backwards."""
    taps = side * side
    full = outputs >= LANES and channels >= LANES
    if full and filter.k == 1:
        for c in range(LANES):
            for tap in range(taps):
                start = to + c * filter.c + tap // side * filter.r + tap % side * filter.s
                move(block, at + (c * taps + tap) * LANES, w, start)
    elif full and filter.c == 1:
        for tap in range(taps):
            start = to + tap // side * filter.r + tap % side * filter.s
            transpose(block, at + tap * LANES, taps * LANES, w, start, filter.k)
    elif full and filter.s == 1 and filter.r == side and filter.c == taps:
        for j in range(taps):
            transpose(block, at + j * LANES * LANES, LANES, w, to + j * LANES, filter.k)
    else:
        for c in range(min(channels, LANES)):
            for tap in range(taps):
                start = to + c * filter.c + tap // side * filter.r + tap % side * filter.s
                for k in range(min(outputs, LANES)):
                    w[start + k * filter.k] = block[at + (c * taps + tap) * LANES + k]
