"""Convolution by Winograd's minimal filtering F(m×m, r×r), fused by blocks of tiles.

    y = Aᵀ [(G g Gᵀ) ∘ (Bᵀ d B)] A          Lavin and Gray 2016, equation 13

With α = m + r - 1, an α × α tile d of the input gives an m × m tile of the output.  Over all channels the
products are α² independent matrix products, one per point p of the transformed tile:

    V[p][tile][c] = Bᵀ d B,   U[p][c][k] = G g Gᵀ,   M[p] = V[p] · U[p],   y = Aᵀ M A

V and M are α²/m² times larger than x and y; written to memory they would cost more than they save.  So a task
takes few tiles through all three stages while they are in cache.  Where tiles are few and weights many (the last
layers of a network) it is the other way round: V of all tiles is made once, and a task makes the U of its
32 output channels, uses it and forgets it.

The gradient of the input is the same convolution with the filter turned by 180° and channels swapped.  The
gradient of the weights is the exact adjoint,

    dw = Gᵀ [ Σ_tiles (Bᵀ d B) ∘ (A dy Aᵀ) ] G

with the same V, a product over tiles per point, and sums in an order that does not depend on the threads.

Channels are in blocks of 16, a register's width.  Tiles that reach over an edge, or past the last channel, go
through a patch of zeros.  Of tensors in NCHW order, strips are transposed on the way into cache and out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from windlass.kernels.gemm import gemm_columns, gemm_rows
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.threads import parallel_for
from windlass.kernels.transform import clear, finish, move, prefetch, transform, transpose
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape

Array = npt.NDArray[np.float32]

AHEAD = 2
"""Tiles between the one that is transformed and the one whose pixels are fetched."""

STRIP = 14
"""Tiles of a strip: what is transposed at once of a tensor in NCHW order."""


class Geometry(NamedTuple):
    """Sizes and strides, in elements, of one convolution with stride 1 (of one group).

    x: channels × height × width, with `top` and `left` zeros before it; y: outputs × out_height × out_width.
    Weights stand at w_at with strides (wk, wc, wr, ws), which are negative for a turned filter.
    """

    channels: int
    outputs: int
    height: int
    width: int
    out_height: int
    out_width: int
    top: int
    left: int
    tiles_h: int
    tiles_w: int
    tiles: int
    xn: int
    xc: int
    xh: int
    xw: int
    yn: int
    yc: int
    yh: int
    yw: int
    w_at: int
    wk: int
    wc: int
    wr: int
    ws: int
    block: int  # tiles of a task
    panels: int  # panels of TILE_COLUMNS output channels of a task's M
    v_row: int
    v_plane: int
    u_plane: int
    m_plane: int
    stream: int  # whether y is written past the caches


def _odd_lines(numbers: int) -> int:
    """At least so many numbers, as an odd number of cache lines: planes at this distance do not share sets."""
    lines = -(-numbers // LANES)
    return (lines | 1) * LANES


@kernel
def _copy_in(x: Any, at: int, xc: int, xh: int, xw: int, rows: int, cols: int, channels: int,
             height: int, width: int, ih: int, iw: int, patch: Any, to: int) -> None:  # fmt: skip
    """patch[i, j, 16] = x at (ih + i, iw + j), zero outside the image and from `channels` on."""
    for i in range(rows):
        for j in range(cols):
            base = to + (i * cols + j) * LANES
            inside = 0 <= ih + i < height and 0 <= iw + j < width
            start = at + (ih + i) * xh + (iw + j) * xw
            if inside and xc == 1 and channels >= LANES:
                move(x, start, patch, base)
                continue
            clear(patch, base)
            if inside:
                for c in range(min(channels, LANES)):
                    patch[base + c] = x[start + c * xc]


@kernel
def _strip_in(x: Any, at: int, xc: int, xh: int, rows: int, cols: int, channels: int,
              height: int, width: int, ih: int, iw: int, strip: Any, to: int) -> None:  # fmt: skip
    """As `_copy_in` of an image with neighbouring columns side by side, 16 columns at a time.

    `strip` has room for cols rounded up to 16.
    """
    room = (cols + LANES - 1) // LANES * LANES
    for i in range(rows):
        line = to + i * room * LANES
        for j in range(0, cols, LANES):
            base = line + j * LANES
            start = at + (ih + i) * xh + iw + j
            if 0 <= ih + i < height and iw + j >= 0 and iw + j + LANES <= width and channels >= LANES:
                transpose(x, start, xc, strip, base, LANES)
                continue
            for q in range(LANES):
                inside = 0 <= ih + i < height and 0 <= iw + j + q < width
                for c in range(LANES):
                    if inside and c < channels:
                        strip[base + q * LANES + c] = x[start + q + c * xc]
                    else:
                        strip[base + q * LANES + c] = 0.0


@kernel
def _strip_out(strip: Any, at: int, cols: int, y: Any, to: int, yc: int, yh: int, rows_in: int, cols_in: int,
               channels: int) -> None:  # fmt: skip
    """y = the first rows_in × cols_in pixels and `channels` channels of a strip of `cols` columns."""
    for i in range(rows_in):
        for j in range(0, cols_in, LANES):
            base = at + (i * cols + j) * LANES
            start = to + i * yh + j
            if j + LANES <= cols_in and channels >= LANES:
                transpose(strip, base, LANES, y, start, yc)
                continue
            for q in range(min(LANES, cols_in - j)):
                for c in range(channels):
                    y[start + q + c * yc] = strip[base + q * LANES + c]


@kernel
def _weights_in(w: Any, at: int, wk: int, wc: int, wr: int, ws: int, r: int, outputs: int, channels: int,
                last: int, block: Any, to: int) -> None:  # fmt: skip
    """block[c, i, j, 16 k] = w[k, c, i, j] for 16 input channels, zero where there are fewer outputs.

    `last` is the offset of the last weight in memory, beyond which nothing may be read.
    """
    taps = r * r
    full = outputs >= LANES and channels >= LANES
    if full and wk == 1:
        for c in range(LANES):
            for tap in range(taps):
                start = at + c * wc + tap // r * wr + tap % r * ws
                for k in range(LANES):
                    block[to + (c * taps + tap) * LANES + k] = w[start + k]
    elif full and wc == 1:
        for tap in range(taps):
            transpose(w, at + tap // r * wr + tap % r * ws, wk, block, to + tap * LANES, taps * LANES)
    elif full and ws == 1 and wr == r and wc == taps:
        for j in range(taps):
            transpose(w, at + j * LANES, wk, block, to + j * LANES * LANES, LANES)
    else:
        for c in range(min(channels, LANES)):
            for tap in range(taps):
                start = at + c * wc + tap // r * wr + tap % r * ws
                for k in range(LANES):
                    value = np.float32(0.0)
                    if k < outputs:
                        value = w[start + k * wk]
                    block[to + (c * taps + tap) * LANES + k] = value


class Kernels(NamedTuple):
    """The compiled kernels of one F(m, r)."""

    by_tiles: Callable[..., None]
    by_outputs: Callable[..., None]
    weight: Callable[..., None]


@cache
def kernels(m: int, r: int) -> Kernels:
    """Kernels with the transforms of F(m×m, r×r) as straight-line code."""
    alpha = m + r - 1
    points = alpha * alpha
    taps = r * r
    strip_room = (STRIP * m + r - 1 + LANES - 1) // LANES * LANES
    key = (m, r)

    def tiles_in(x, g, first, last, V, v_at, patch, patch_at, channel, channels):  # type: ignore[no-untyped-def]
        """V = Bᵀ d B of tiles first…last, for `channels` channels from `channel` on."""
        t = first
        while t < last:
            n = t // (g.tiles_h * g.tiles_w)
            th = t // g.tiles_w % g.tiles_h
            tw = t % g.tiles_w
            ih = th * m - g.top
            iw = tw * m - g.left
            at = n * g.xn
            if g.xc != 1 and g.xw == 1:
                run = min(STRIP, g.tiles_w - tw, last - t)
                cols = run * m + r - 1
                room = (cols + LANES - 1) // LANES * LANES
                for c in range(0, channels, LANES):
                    _strip_in(x, at + (channel + c) * g.xc, g.xc, g.xh, alpha, cols, channels - c,
                              g.height, g.width, ih, iw, patch, patch_at)
                    for i in range(run):
                        transform("BT", m, r, patch, patch_at + i * m * LANES, room * LANES, LANES,
                                  V, v_at + (t + i - first) * g.v_row + c, alpha * g.v_plane, g.v_plane)
                t += run
                continue
            inside = g.xc == 1 and ih >= 0 and iw >= 0 and ih + alpha <= g.height and iw + alpha <= g.width
            for c in range(0, channels, LANES):
                if inside and channels - c >= LANES:
                    prefetch(alpha, m, x, at + ih * g.xh + (iw + AHEAD * m + r - 1) * g.xw + channel + c, g.xh, g.xw)
                    transform("BT", m, r, x, at + ih * g.xh + iw * g.xw + channel + c, g.xh, g.xw,
                              V, v_at + (t - first) * g.v_row + c, alpha * g.v_plane, g.v_plane)
                else:
                    _copy_in(x, at + (channel + c) * g.xc, g.xc, g.xh, g.xw, alpha, alpha, channels - c,
                             g.height, g.width, ih, iw, patch, patch_at)
                    transform("BT", m, r, patch, patch_at, alpha * LANES, LANES,
                              V, v_at + (t - first) * g.v_row + c, alpha * g.v_plane, g.v_plane)
            t += 1

    tiles_in = kernel(tiles_in, key=key)

    def tiles_out(y, g, first, last, M, m_at, m_row, bias, floor, patch, patch_at, output, outputs):  # type: ignore[no-untyped-def]
        """y = Aᵀ M A + bias of tiles first…last, for `outputs` channels from `output` on."""
        t = first
        while t < last:
            n = t // (g.tiles_h * g.tiles_w)
            th = t // g.tiles_w % g.tiles_h
            tw = t % g.tiles_w
            oh = th * m
            ow = tw * m
            rows = min(m, g.out_height - oh)
            at = n * g.yn + oh * g.yh + ow * g.yw
            if g.yc != 1 and g.yw == 1:
                run = min(STRIP, g.tiles_w - tw, last - t)
                cols = run * m
                for k in range(0, outputs, LANES):
                    for i in range(run):
                        finish(m, r, 0, M, m_at + (t + i - first) * m_row + k, alpha * g.m_plane, g.m_plane,
                               bias, output + k, floor, patch, patch_at + i * m * LANES, cols * LANES, LANES)
                    _strip_out(patch, patch_at, cols, y, at + (output + k) * g.yc, g.yc, g.yh, rows,
                               min(cols, g.out_width - ow), min(LANES, outputs - k))
                t += run
                continue
            cols = min(m, g.out_width - ow)
            for k in range(0, outputs, LANES):
                source = m_at + (t - first) * m_row + k
                whole = g.yc == 1 and rows == m and cols == m and outputs - k >= LANES
                if whole and g.stream:
                    finish(m, r, 1, M, source, alpha * g.m_plane, g.m_plane, bias, output + k, floor,
                           y, at + output + k, g.yh, g.yw)
                elif whole:
                    finish(m, r, 0, M, source, alpha * g.m_plane, g.m_plane, bias, output + k, floor,
                           y, at + output + k, g.yh, g.yw)
                else:
                    finish(m, r, 0, M, source, alpha * g.m_plane, g.m_plane, bias, output + k, floor,
                           patch, patch_at, m * LANES, LANES)
                    for i in range(rows):
                        for j in range(cols):
                            if g.yc == 1 and outputs - k >= LANES:
                                move(patch, patch_at + (i * m + j) * LANES, y, at + i * g.yh + j * g.yw + output + k)
                                continue
                            for c in range(min(LANES, outputs - k)):
                                y[at + i * g.yh + j * g.yw + (output + k + c) * g.yc] = patch[
                                    patch_at + (i * m + j) * LANES + c
                                ]
            t += 1

    tiles_out = kernel(tiles_out, key=key)

    def weights_in(w, g, panel, first, last, U, u_at, patch, patch_at, w_last):  # type: ignore[no-untyped-def]
        """U = G g Gᵀ of one panel of output channels and input channels first…last."""
        for half in range(TILE_COLUMNS // LANES):
            k = panel * TILE_COLUMNS + half * LANES
            for c in range(first, last, LANES):
                _weights_in(w, g.w_at + k * g.wk + c * g.wc, g.wk, g.wc, g.wr, g.ws, r, g.outputs - k, last - c,
                            w_last, patch, patch_at)
                for i in range(min(LANES, last - c)):
                    transform("G", m, r, patch, patch_at + i * taps * LANES, r * LANES, LANES,
                              U, u_at + (c + i) * TILE_COLUMNS + half * LANES, alpha * g.u_plane, g.u_plane)

    weights_in = kernel(weights_in, key=key)

    def multiply(g, count, V, v_at, U, u_at, M, m_at, m_row):  # type: ignore[no-untyped-def]
        """M[p] = V[p] · U[p] of one panel of output channels, for all points."""
        blocks = (count + TILE_ROWS - 1) // TILE_ROWS
        for p in range(points):
            for b in range(blocks):
                i = b * count // blocks
                rows = (b + 1) * count // blocks - i
                gemm_rows(rows, V, v_at + p * g.v_plane + i * g.v_row, g.v_row,
                          U, u_at + p * g.u_plane, TILE_COLUMNS,
                          M, m_at + p * g.m_plane + i * m_row, m_row, g.channels, 0)

    multiply = kernel(multiply, key=key)

    def weight_task(task, thread, w, g, U, patch, patch_size, w_last):  # type: ignore[no-untyped-def]
        chunks = (g.channels + LANES - 1) // LANES
        panel = task // chunks
        c = task % chunks * LANES
        weights_in(w, g, panel, c, min(c + LANES, g.channels), U, panel * points * g.u_plane,
                   patch, thread * patch_size, w_last)

    weight_task = kernel(weight_task, key=key)

    def tile_task(task, thread, x, y, g, U, V, v_size, M, m_size, patch, patch_size, bias, floor):  # type: ignore[no-untyped-def]
        first = task * g.block
        last = min(first + g.block, g.tiles)
        v_at, m_at, patch_at = thread * v_size, thread * m_size, thread * patch_size
        tiles_in(x, g, first, last, V, v_at, patch, patch_at, 0, g.channels)
        panels = (g.outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        m_row = g.panels * TILE_COLUMNS
        for panel in range(0, panels, g.panels):
            here = min(g.panels, panels - panel)
            for i in range(here):
                multiply(g, last - first, V, v_at, U, (panel + i) * points * g.u_plane,
                         M, m_at + i * TILE_COLUMNS, m_row)
            k = panel * TILE_COLUMNS
            tiles_out(y, g, first, last, M, m_at, m_row, bias, floor, patch, patch_at, k,
                      min(here * TILE_COLUMNS, g.outputs - k))

    tile_task = kernel(tile_task, key=key)

    def by_tiles(x, w, y, g, U, V, v_size, M, m_size, patch, patch_size, bias, floor, w_last, threads):  # type: ignore[no-untyped-def]
        panels = (g.outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        chunks = (g.channels + LANES - 1) // LANES
        parallel_for(weight_task, panels * chunks, threads, (w, g, U, patch, patch_size, w_last))
        tasks = (g.tiles + g.block - 1) // g.block
        parallel_for(
            tile_task, tasks, threads, (x, y, g, U, V, v_size, M, m_size, patch, patch_size, bias, floor)
        )

    def input_task(task, thread, x, g, V, patch, patch_size):  # type: ignore[no-untyped-def]
        """The V of all tiles in blocks: tiles × chunks of channels."""
        chunks = (g.channels + 4 * LANES - 1) // (4 * LANES)
        first = task // chunks * g.block
        c = task % chunks * 4 * LANES
        tiles_in(x, g, first, min(first + g.block, g.tiles), V, first * g.v_row + c, patch, thread * patch_size, c,
                 min(4 * LANES, g.channels - c))

    input_task = kernel(input_task, key=key)

    def output_task(task, thread, w, y, g, U, u_size, V, M, m_size, patch, patch_size, bias, floor, w_last):  # type: ignore[no-untyped-def]
        u_at, m_at, patch_at = thread * u_size, thread * m_size, thread * patch_size
        weights_in(w, g, task, 0, g.channels, U, u_at, patch, patch_at, w_last)
        multiply(g, g.tiles, V, 0, U, u_at, M, m_at, TILE_COLUMNS)
        k = task * TILE_COLUMNS
        tiles_out(y, g, 0, g.tiles, M, m_at, TILE_COLUMNS, bias, floor, patch, patch_at, k,
                  min(TILE_COLUMNS, g.outputs - k))

    output_task = kernel(output_task, key=key)

    def by_outputs(x, w, y, g, U, u_size, V, M, m_size, patch, patch_size, bias, floor, w_last, threads):  # type: ignore[no-untyped-def]
        chunks = (g.channels + 4 * LANES - 1) // (4 * LANES)
        tasks = (g.tiles + g.block - 1) // g.block * chunks
        parallel_for(input_task, tasks, threads, (x, g, V, patch, patch_size))
        panels = (g.outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        parallel_for(
            output_task, panels, threads,
            (w, y, g, U, u_size, V, M, m_size, patch, patch_size, bias, floor, w_last),
        )  # fmt: skip

    return Kernels(kernel(by_tiles, key=key), kernel(by_outputs, key=key), kernel(by_outputs, key=key))
