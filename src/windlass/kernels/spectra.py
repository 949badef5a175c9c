"""From images and filters to the spectra of n × n tiles and back, 16 channels at a time.

Rows go first: n real numbers to n/2 + 1 columns of complex ones.  Of the columns 0 and n/2, which are real, half
the transform is kept, of the others all of it:

    2 · (n/2 + 1) + (n/2 - 1) · n = n²/2 + 2 frequencies.

The way back is the same backwards.  Between the two passes a tile stands in `s` as [row][column][re, im][16], in
second-level cache at most; frequencies are written to planes, one per frequency, at any distance.

`image` arguments are one image of one group of channels; rows and columns outside it are zeros.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from windlass.kernels.codelets import transform
from windlass.kernels.jit import LANES, kernel
from windlass.kernels.masked import columns_in, columns_out, pixel_in, pixel_out
from windlass.kernels.transform import clear, move, prefetch

AHEAD = 2
"""Rows between the one that is transformed and the one that is fetched."""


class Tiling(NamedTuple):
    """Tiles of an image: tile (i, j) starts at (i · step_h - top, j · step_w - left) of it, rows × cols pixels.

    Of pixels that come out, the first wanted one is (row, col) of its tile.
    """

    down: int
    across: int
    step_h: int
    step_w: int
    rows: int
    cols: int
    row: int = 0
    col: int = 0


class Taps(NamedTuple):
    """A filter's sizes, and how its weights stand: by lane (vector), depth (summed over), row and column."""

    rows: int
    cols: int
    dilation_h: int
    dilation_w: int
    lane: int
    depth: int
    sr: int
    ss: int
    lanes: int  # how many lanes, how much depth
    depths: int


class Room(NamedTuple):
    """A thread's scratch, in floats: where the row of pixels and the weights start, and all of it."""

    buffer: int
    block: int
    all: int


def block_floats(taps: int, *, depths: int = LANES) -> int:
    """Scratch floats for the weights of 16 lanes; a transposition may write 15 pixels too many."""
    return (depths * taps + LANES) * LANES


@kernel
def rows_in(x: Any, image: Any, tiling: Any, t: int, channel: int, channels: int, codes: Any, s: Any, s_at: int,
            buffer_at: int) -> None:  # fmt: skip
    """`s` = the rows' transforms of tile t, of up to 16 of `channels` channels from `channel` on."""
    n = codes.n
    row = 2 * (n // 2 + 1) * LANES
    ih = t // tiling.across % tiling.down * tiling.step_h - image.top
    iw = t % tiling.across * tiling.step_w - image.left
    at = t // (tiling.down * tiling.across) * image.n + channel * image.c
    first, last = max(0, -ih), min(tiling.rows, image.height - ih)
    left, right = max(0, -iw), min(tiling.cols, image.width - iw)
    if right <= left:
        last = first
    whole = image.c == 1 and channels >= LANES and left == 0 and right == n
    if not whole:
        for j in range(left):
            clear(s, buffer_at + j * LANES)
        for j in range(right, n):
            clear(s, buffer_at + j * LANES)
    for i in range(n):
        to = s_at + i * row
        if i < first or i >= last:
            for v in range(n + 2):
                clear(s, to + v * LANES)
            continue
        start = at + (ih + i) * image.h + iw * image.w
        if whole:
            for j in range(n):
                prefetch(1, 1, x, start + AHEAD * image.h + j * image.w, 0, 0)
            transform(codes.from_real, x, start, image.w, 0, s, to, 2 * LANES, LANES)
            continue
        if image.c == 1:
            for j in range(left, right):
                pixel_in(x, start + j * image.w, channels, s, buffer_at + j * LANES)
        elif image.w == 1:
            for j in range(left // LANES * LANES, right, LANES):
                columns_in(x, start + j, image.c, channels, left - j, right - j, s, buffer_at + j * LANES, LANES)
        else:
            for j in range(left, right):
                clear(s, buffer_at + j * LANES)
                for c in range(min(LANES, channels)):
                    s[buffer_at + j * LANES + c] = x[start + j * image.w + c * image.c]
        transform(codes.from_real, s, buffer_at, LANES, 0, s, to, 2 * LANES, LANES)


@kernel
def columns(s: Any, s_at: int, codes: Any, f: Any, f_at: int, plane: int, im: int) -> None:
    """`f` = the columns' transforms of s, a plane for each frequency."""
    n, half = codes.n, codes.n // 2
    row = 2 * (half + 1) * LANES
    transform(codes.from_real_out, s, s_at, row, 0, f, f_at, plane, im)
    to = f_at + (half + 1) * plane
    for v in range(1, half):
        transform(codes.complex_out, s, s_at + 2 * v * LANES, row, LANES, f, to, plane, im)
        to += n * plane
    transform(codes.from_real_out, s, s_at + 2 * half * LANES, row, 0, f, to, plane, im)


@kernel
def columns_back(f: Any, f_at: int, plane: int, im: int, codes: Any, s: Any, s_at: int) -> None:
    """`s` = the columns' inverse transforms of f; the next column is fetched meanwhile."""
    n, half = codes.n, codes.n // 2
    row = 2 * (half + 1) * LANES
    at = f_at + (half + 1) * plane
    for u in range(n):
        prefetch(1, 2, f, at + u * plane, 0, im)
    transform(codes.to_real, f, f_at, plane, im, s, s_at, row, 0)
    for v in range(1, half):
        following = at + n * plane
        for u in range(n):
            prefetch(1, 2, f, following + u * plane, 0, im)
        transform(codes.complex, f, at + im, plane, -im, s, s_at + (2 * v + 1) * LANES, row, -LANES)
        at = following
    transform(codes.to_real, f, at, plane, im, s, s_at + 2 * half * LANES, row, 0)


@kernel
def rows_out(s: Any, s_at: int, y: Any, image: Any, tiling: Any, t: int, channel: int, channels: int, scale: Any,
             bias: Any, floor: Any, stream: int, codes: Any, buffer_at: int) -> None:  # fmt: skip
    """Pixels of tile t = scale · the inverse transform of s + bias, at least `floor`; channels as in `rows_in`."""
    row = 2 * (codes.n // 2 + 1) * LANES
    oh = t // tiling.across % tiling.down * tiling.step_h
    ow = t % tiling.across * tiling.step_w
    at = t // (tiling.down * tiling.across) * image.n + channel * image.c + oh * image.h + ow * image.w
    rows, cols = min(tiling.rows, image.height - oh), min(tiling.cols, image.width - ow)
    wanted = buffer_at + tiling.col * LANES
    for i in range(rows):
        transform(codes.to_real, s, s_at + (tiling.row + i) * row, 2 * LANES, LANES, s, buffer_at, LANES, 0)
        start = at + i * image.h
        if stream and channels >= LANES:
            for j in range(cols):
                pixel_out(1, s, wanted + j * LANES, scale, bias, channel, floor, y, start + j * image.w, LANES)
        elif image.c == 1:
            for j in range(cols):
                pixel_out(0, s, wanted + j * LANES, scale, bias, channel, floor, y, start + j * image.w, channels)
        elif image.w == 1:
            for j in range(0, cols, LANES):
                columns_out(
                    s,
                    wanted + j * LANES,
                    LANES,
                    scale,
                    bias,
                    channel,
                    floor,
                    y,
                    start + j,
                    image.c,
                    channels,
                    cols - j,
                )
        else:
            for j in range(cols):
                here = wanted + j * LANES
                pixel_out(0, s, here, scale, bias, channel, floor, s, here, LANES)
                for c in range(min(LANES, channels)):
                    y[start + j * image.w + c * image.c] = s[here + c]


@kernel
def weights_in(w: Any, at: int, taps: Any, lanes: int, depths: int, block: Any, to: int) -> None:
    """block[depth, tap, 16] = weights of up to 16 lanes and depths from `at` on, zeros in the lanes beyond."""
    num = taps.rows * taps.cols
    if taps.lane == 1:
        for d in range(depths):
            for t in range(num):
                start = at + d * taps.depth + t // taps.cols * taps.sr + t % taps.cols * taps.ss
                pixel_in(w, start, lanes, block, to + (d * num + t) * LANES)
    elif taps.depth == 1:
        for t in range(num):
            start = at + t // taps.cols * taps.sr + t % taps.cols * taps.ss
            columns_in(w, start, taps.lane, lanes, 0, depths, block, to + t * LANES, num * LANES)
    elif taps.ss == 1 and taps.sr == taps.cols:
        for d in range(depths):
            for t in range(0, num, LANES):
                columns_in(
                    w, at + d * taps.depth + t, taps.lane, lanes, 0, num - t, block, to + (d * num + t) * LANES, LANES
                )
    else:
        for d in range(depths):
            for t in range(num):
                clear(block, to + (d * num + t) * LANES)
                start = at + d * taps.depth + t // taps.cols * taps.sr + t % taps.cols * taps.ss
                for k in range(min(LANES, lanes)):
                    block[to + (d * num + t) * LANES + k] = w[start + k * taps.lane]


@kernel
def weights_out(
    block: Any, at: int, taps: Any, lanes: int, depths: int, scale: Any, zeros: Any, w: Any, to: int
) -> None:
    """Weights of up to 16 lanes and depths from `to` on = scale · block[depth, tap, 16]."""
    num = taps.rows * taps.cols
    floor = np.float32(-np.inf)
    if taps.lane == 1:
        for d in range(depths):
            for t in range(num):
                start = to + d * taps.depth + t // taps.cols * taps.sr + t % taps.cols * taps.ss
                pixel_out(0, block, at + (d * num + t) * LANES, scale, zeros, 0, floor, w, start, lanes)
    elif taps.depth == 1:
        for t in range(num):
            start = to + t // taps.cols * taps.sr + t % taps.cols * taps.ss
            columns_out(block, at + t * LANES, num * LANES, scale, zeros, 0, floor, w, start, taps.lane, lanes, depths)
    elif taps.ss == 1 and taps.sr == taps.cols:
        for d in range(depths):
            for t in range(0, num, LANES):
                columns_out(
                    block,
                    at + (d * num + t) * LANES,
                    LANES,
                    scale,
                    zeros,
                    0,
                    floor,
                    w,
                    to + d * taps.depth + t,
                    taps.lane,
                    lanes,
                    num - t,
                )
    else:
        for d in range(depths):
            for t in range(num):
                start = to + d * taps.depth + t // taps.cols * taps.sr + t % taps.cols * taps.ss
                for k in range(min(LANES, lanes)):
                    w[start + k * taps.lane] = block[at + (d * num + t) * LANES + k] * scale


@kernel
def prepare(nonzero: int, codes: Any, s: Any, s_at: int, buffer_at: int) -> None:
    """Zeros where `filter_in` writes no weights."""
    for v in range(nonzero * (codes.n + 2)):
        clear(s, s_at + v * LANES)
    for j in range(nonzero):
        clear(s, buffer_at + j * LANES)


@kernel
def filter_in(s: Any, at: int, taps: Any, codes: Any, s_at: int, buffer_at: int, f: Any, f_at: int, plane: int,
              im: int) -> None:  # fmt: skip
    """`f` = the spectra of one filter s[tap, 16] at `at`, a plane for each frequency."""
    row = 2 * (codes.n // 2 + 1) * LANES
    for i in range(taps.rows):
        for j in range(taps.cols):
            move(s, at + (i * taps.cols + j) * LANES, s, buffer_at + j * taps.dilation_w * LANES)
        transform(codes.from_real, s, buffer_at, LANES, 0, s, s_at + i * taps.dilation_h * row, 2 * LANES, LANES)
    columns(s, s_at, codes, f, f_at, plane, im)


@kernel
def filter_out(s: Any, s_at: int, taps: Any, codes: Any, buffer_at: int, to: int) -> None:
    """[tap, 16] = the pixels under the taps of the inverse transform of rows s."""
    row = 2 * (codes.n // 2 + 1) * LANES
    for i in range(taps.rows):
        here = s_at + i * taps.dilation_h * row
        transform(codes.to_real, s, here, 2 * LANES, LANES, s, buffer_at, LANES, 0)
        for j in range(taps.cols):
            move(s, buffer_at + j * taps.dilation_w * LANES, s, to + (i * taps.cols + j) * LANES)
