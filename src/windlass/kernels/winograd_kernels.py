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

with the same V, Z = A dy Aᵀ, and per point a product over tiles, dU[p] = V[p]ᵀ · Z[p].  A task has a block of
input and of output channels, and a part of the tiles that depends on the shape alone; parts are added in order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from windlass.kernels.gemm import gemm_columns, gemm_rows
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.strips import filter_in, filter_out, patch_in, patch_out, strip_in, strip_out
from windlass.kernels.threads import parallel_for
from windlass.kernels.transform import finish, prefetch, transform

AHEAD = 1
"""Tiles between the one that is transformed and the one whose pixels are fetched."""

STRIP = 14
"""Tiles of a strip: what is transposed at once of a tensor in NCHW order."""

DEPTH = 128
"""Channels that are summed in one go; longer sums would lose accuracy, their error grows with their length."""

CHANNELS_AT_ONCE = 4 * LANES
"""Input channels of a task that makes V for all."""


class Tiles(NamedTuple):
    """The tiles of a batch, and how a kernel's scratch memory is laid out, in elements.

    Attributes:
        rows, cols, total: tiles of an image down and across, and of the batch.
        block: tiles of a task.
        panels: panels of `TILE_COLUMNS` output channels in a task's M.
        v_row, v_plane: strides of tile and point in V; those of U, M and Z likewise.
        stream: whether y is written past the caches.
    """

    rows: int
    cols: int
    total: int
    block: int
    panels: int
    v_row: int
    v_plane: int
    u_plane: int
    m_plane: int
    stream: int


class Parts(NamedTuple):
    """How the gradient of the weights is divided: parts of the tiles, blocks of channels."""

    total: int
    tiles: int
    channels: int
    outputs: int
    z_row: int
    z_plane: int
    u_plane: int


class Kernels(NamedTuple):
    """The compiled kernels of one F(m, r)."""

    by_tiles: Callable[..., None]
    by_outputs: Callable[..., None]
    weight: Callable[..., None]


def patch_numbers(m: int, r: int) -> int:
    """Scratch of a thread for patches, strips and blocks of weights."""
    room = -(-(STRIP * m + r - 1) // LANES) * LANES
    return max((m + r - 1) * room * LANES, r * r * LANES * LANES)


def _tiles_in(m: int, r: int, which: str) -> Any:
    """The kernel that transforms tiles with "BT" (α × α, of the input) or "A" (m × m, of the output)."""
    points = m + r - 1
    side = points if which == "BT" else m

    def tiles_in(x, image, tiles, first, last, V, at, row, plane, patch, patch_at, channel, channels):
        """V of tiles first…last, for `channels` channels from `channel` on."""
        t = first
        while t < last:
            n = t // (tiles.rows * tiles.cols)
            tw = t % tiles.cols
            ih = t // tiles.cols % tiles.rows * m - image.top
            iw = tw * m - image.left
            start = n * image.n + channel * image.c
            to = at + (t - first) * row
            if image.c != 1 and image.w == 1:
                run = min(STRIP, tiles.cols - tw, last - t)
                cols = (run - 1) * m + side
                room = (cols + LANES - 1) // LANES * LANES
                for c in range(0, channels, LANES):
                    strip_in(x, start + c * image.c, image, side, cols, channels - c, ih, iw, patch, patch_at)
                    for i in range(run):
                        transform(
                            which,
                            m,
                            r,
                            patch,
                            patch_at + i * m * LANES,
                            room * LANES,
                            LANES,
                            V,
                            to + i * row + c,
                            points * plane,
                            plane,
                        )
                t += run
                continue
            inside = image.c == 1 and ih >= 0 and iw >= 0 and ih + side <= image.height and iw + side <= image.width
            corner = start + ih * image.h + iw * image.w
            for c in range(0, channels, LANES):
                if inside and channels - c >= LANES:
                    prefetch(side, m, x, corner + (AHEAD * m + side - m) * image.w + c, image.h, image.w)
                    transform(which, m, r, x, corner + c, image.h, image.w, V, to + c, points * plane, plane)
                else:
                    patch_in(x, start + c * image.c, image, side, side, channels - c, ih, iw, patch, patch_at)
                    transform(which, m, r, patch, patch_at, side * LANES, LANES, V, to + c, points * plane, plane)
            t += 1

    return kernel(tiles_in, key=(m, r, side))


def _tiles_out(m: int, r: int) -> Any:
    points = m + r - 1

    def tiles_out(y, image, tiles, first, last, M, m_at, m_row, bias, floor, patch, patch_at, output, outputs):
        """`y` = Aᵀ M A + bias of tiles first…last, for `outputs` channels from `output` on."""
        plane = tiles.m_plane
        t = first
        while t < last:
            n = t // (tiles.rows * tiles.cols)
            tw = t % tiles.cols
            oh = t // tiles.cols % tiles.rows * m
            ow = tw * m
            rows = min(m, image.height - oh)
            at = n * image.n + oh * image.h + ow * image.w + output * image.c
            source = m_at + (t - first) * m_row
            if image.c != 1 and image.w == 1:
                run = min(STRIP, tiles.cols - tw, last - t)
                cols = run * m
                for k in range(0, outputs, LANES):
                    for i in range(run):
                        finish(
                            m,
                            r,
                            0,
                            M,
                            source + i * m_row + k,
                            points * plane,
                            plane,
                            bias,
                            output + k,
                            floor,
                            patch,
                            patch_at + i * m * LANES,
                            cols * LANES,
                            LANES,
                        )
                    strip_out(
                        patch,
                        patch_at,
                        cols,
                        y,
                        at + k * image.c,
                        image,
                        rows,
                        min(cols, image.width - ow),
                        outputs - k,
                    )
                t += run
                continue
            cols = min(m, image.width - ow)
            for k in range(0, outputs, LANES):
                whole = image.c == 1 and rows == m and cols == m and outputs - k >= LANES
                if whole and tiles.stream:
                    finish(
                        m,
                        r,
                        1,
                        M,
                        source + k,
                        points * plane,
                        plane,
                        bias,
                        output + k,
                        floor,
                        y,
                        at + k,
                        image.h,
                        image.w,
                    )
                elif whole:
                    finish(
                        m,
                        r,
                        0,
                        M,
                        source + k,
                        points * plane,
                        plane,
                        bias,
                        output + k,
                        floor,
                        y,
                        at + k,
                        image.h,
                        image.w,
                    )
                else:
                    finish(
                        m,
                        r,
                        0,
                        M,
                        source + k,
                        points * plane,
                        plane,
                        bias,
                        output + k,
                        floor,
                        patch,
                        patch_at,
                        m * LANES,
                        LANES,
                    )
                    patch_out(patch, patch_at, m, y, at + k * image.c, image, rows, cols, outputs - k)
            t += 1

    return kernel(tiles_out, key=(m, r))


@cache
def kernels(m: int, r: int) -> Kernels:
    """Kernels with the transforms of F(m×m, r×r) as straight-line code."""
    alpha = m + r - 1
    points = alpha * alpha
    taps = r * r
    key = (m, r)
    tiles_in, gradients_in, tiles_out = _tiles_in(m, r, "BT"), _tiles_in(m, r, "A"), _tiles_out(m, r)

    def weights_in(w, filter, outputs, plane, panel, first, last, U, u_at, patch, patch_at):
        """U = G g Gᵀ of one panel of output channels and input channels first…last."""
        for half in range(TILE_COLUMNS // LANES):
            k = panel * TILE_COLUMNS + half * LANES
            for c in range(first, last, LANES):
                filter_in(w, filter.at + k * filter.k + c * filter.c, filter, r, outputs - k, last - c, patch, patch_at)
                for i in range(min(LANES, last - c)):
                    transform(
                        "G",
                        m,
                        r,
                        patch,
                        patch_at + i * taps * LANES,
                        r * LANES,
                        LANES,
                        U,
                        u_at + (c + i) * TILE_COLUMNS + half * LANES,
                        alpha * plane,
                        plane,
                    )

    weights_in = kernel(weights_in, key=key)

    def multiply(tiles, count, channels, V, v_at, U, u_at, M, m_at, m_row):
        """M[p] = V[p] · U[p] of one panel of output channels, for all points."""
        blocks = (count + TILE_ROWS - 1) // TILE_ROWS
        for p in range(points):
            for b in range(blocks):
                i = b * count // blocks
                rows = (b + 1) * count // blocks - i
                for c in range(0, channels, DEPTH):
                    gemm_rows(
                        rows,
                        V,
                        v_at + p * tiles.v_plane + i * tiles.v_row + c,
                        tiles.v_row,
                        U,
                        u_at + p * tiles.u_plane + c * TILE_COLUMNS,
                        TILE_COLUMNS,
                        M,
                        m_at + p * tiles.m_plane + i * m_row,
                        m_row,
                        min(DEPTH, channels - c),
                        c,
                    )

    multiply = kernel(multiply, key=key)

    def weight_task(task, thread, w, filter, channels, outputs, plane, U, patch, patch_size):
        chunks = (channels + LANES - 1) // LANES
        panel = task // chunks
        c = task % chunks * LANES
        weights_in(
            w,
            filter,
            outputs,
            plane,
            panel,
            c,
            min(c + LANES, channels),
            U,
            panel * points * plane,
            patch,
            thread * patch_size,
        )

    weight_task = kernel(weight_task, key=key)

    def tile_task(task, thread, x, image_x, y, image_y, channels, outputs, tiles, U, V, v_size, M, m_size,
                  patch, patch_size, bias, floor):  # fmt: skip
        first = task * tiles.block
        last = min(first + tiles.block, tiles.total)
        v_at, m_at, patch_at = thread * v_size, thread * m_size, thread * patch_size
        tiles_in(x, image_x, tiles, first, last, V, v_at, tiles.v_row, tiles.v_plane, patch, patch_at, 0, channels)
        panels = (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
        m_row = tiles.panels * TILE_COLUMNS
        for panel in range(0, panels, tiles.panels):
            here = min(tiles.panels, panels - panel)
            for i in range(here):
                multiply(
                    tiles,
                    last - first,
                    channels,
                    V,
                    v_at,
                    U,
                    (panel + i) * points * tiles.u_plane,
                    M,
                    m_at + i * TILE_COLUMNS,
                    m_row,
                )
            k = panel * TILE_COLUMNS
            tiles_out(
                y,
                image_y,
                tiles,
                first,
                last,
                M,
                m_at,
                m_row,
                bias,
                floor,
                patch,
                patch_at,
                k,
                min(here * TILE_COLUMNS, outputs - k),
            )

    tile_task = kernel(tile_task, key=key)

    def by_tiles(x, image_x, w, filter, y, image_y, channels, outputs, tiles, U, V, v_size, M, m_size,
                 patch, patch_size, bias, floor, threads):  # fmt: skip
        tasks = (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS * ((channels + LANES - 1) // LANES)
        parallel_for(weight_task, tasks, threads,
                     (w, filter, channels, outputs, tiles.u_plane, U, patch, patch_size))  # fmt: skip
        parallel_for(tile_task, (tiles.total + tiles.block - 1) // tiles.block, threads,
                     (x, image_x, y, image_y, channels, outputs, tiles, U, V, v_size, M, m_size,
                      patch, patch_size, bias, floor))  # fmt: skip

    def input_task(task, thread, x, image, channels, tiles, V, patch, patch_size):
        """A piece of V: a block of tiles, a chunk of channels."""
        chunks = (channels + CHANNELS_AT_ONCE - 1) // CHANNELS_AT_ONCE
        first = task // chunks * tiles.block
        c = task % chunks * CHANNELS_AT_ONCE
        tiles_in(
            x,
            image,
            tiles,
            first,
            min(first + tiles.block, tiles.total),
            V,
            first * tiles.v_row + c,
            tiles.v_row,
            tiles.v_plane,
            patch,
            thread * patch_size,
            c,
            min(CHANNELS_AT_ONCE, channels - c),
        )

    input_task = kernel(input_task, key=key)

    def output_task(task, thread, w, filter, y, image, channels, outputs, tiles, U, u_size, V, M, m_size,
                    patch, patch_size, bias, floor):  # fmt: skip
        u_at, m_at, patch_at = thread * u_size, thread * m_size, thread * patch_size
        weights_in(w, filter, outputs, tiles.u_plane, task, 0, channels, U, u_at, patch, patch_at)
        multiply(tiles, tiles.total, channels, V, 0, U, u_at, M, m_at, TILE_COLUMNS)
        k = task * TILE_COLUMNS
        tiles_out(
            y,
            image,
            tiles,
            0,
            tiles.total,
            M,
            m_at,
            TILE_COLUMNS,
            bias,
            floor,
            patch,
            patch_at,
            k,
            min(TILE_COLUMNS, outputs - k),
        )

    output_task = kernel(output_task, key=key)

    def by_outputs(x, image_x, w, filter, y, image_y, channels, outputs, tiles, U, u_size, V, M, m_size,
                   patch, patch_size, bias, floor, threads):  # fmt: skip
        chunks = (channels + CHANNELS_AT_ONCE - 1) // CHANNELS_AT_ONCE
        blocks = (tiles.total + tiles.block - 1) // tiles.block
        parallel_for(input_task, blocks * chunks, threads, (x, image_x, channels, tiles, V, patch, patch_size))
        parallel_for(output_task, (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS, threads,
                     (w, filter, y, image_y, channels, outputs, tiles, U, u_size, V, M, m_size,
                      patch, patch_size, bias, floor))  # fmt: skip

    def gradient_task(task, thread, x, image_x, dy, image_y, channels, outputs, tiles, parts, V, v_size, Z, z_size,
                      U, u_size, patch, patch_size, D):  # fmt: skip
        """D[part][k / 16][c][tap][16 k] = Gᵀ dU G of a block of channels over a part of the tiles."""
        blocks_c = (channels + parts.channels - 1) // parts.channels
        blocks_k = (outputs + parts.outputs - 1) // parts.outputs
        part = task // (blocks_c * blocks_k)
        c0 = task // blocks_k % blocks_c * parts.channels
        k0 = task % blocks_k * parts.outputs
        num_c, num_k = min(parts.channels, channels - c0), min(parts.outputs, outputs - k0)
        v_at, z_at, u_at, patch_at = thread * v_size, thread * z_size, thread * u_size, thread * patch_size
        panels = (num_k + TILE_COLUMNS - 1) // TILE_COLUMNS
        blocks = (num_c + TILE_ROWS - 1) // TILE_ROWS
        u_row = panels * TILE_COLUMNS
        begin = part * parts.tiles
        end = min(begin + parts.tiles, tiles.total)
        for first in range(begin, end, tiles.block):
            last = min(first + tiles.block, end)
            tiles_in(x, image_x, tiles, first, last, V, v_at, tiles.v_row, tiles.v_plane, patch, patch_at, c0, num_c)
            gradients_in(
                dy, image_y, tiles, first, last, Z, z_at, parts.z_row, parts.z_plane, patch, patch_at, k0, num_k
            )
            for p in range(points):
                for panel in range(panels):
                    for b in range(blocks):
                        c = b * num_c // blocks
                        gemm_columns(
                            (b + 1) * num_c // blocks - c, V, v_at + p * tiles.v_plane + c, tiles.v_row,
                            Z, z_at + p * parts.z_plane + panel * TILE_COLUMNS, parts.z_row,
                            U, u_at + p * parts.u_plane + c * u_row + panel * TILE_COLUMNS, u_row,
                            last - first, first - begin,
                        )  # fmt: skip
        all_k = (outputs + LANES - 1) // LANES
        for k in range(0, num_k, LANES):
            for c in range(num_c):
                place = ((part * all_k + (k0 + k) // LANES) * channels + c0 + c) * taps * LANES
                transform(
                    "GT",
                    m,
                    r,
                    U,
                    u_at + c * u_row + k,
                    alpha * parts.u_plane,
                    parts.u_plane,
                    D,
                    place,
                    r * LANES,
                    LANES,
                )

    gradient_task = kernel(gradient_task, key=key)

    def sum_task(task, thread, channels, outputs, parts, D, dw, filter):
        """`dw` of 16 × 16 channels: the parts, added in order."""
        chunks = (channels + LANES - 1) // LANES
        k = task // chunks * LANES
        c = task % chunks * LANES
        size = min(LANES, channels - c) * taps * LANES
        part_size = (outputs + LANES - 1) // LANES * channels * taps * LANES
        at = (k // LANES * channels + c) * taps * LANES
        for part in range(1, parts.total):
            for i in range(size):
                D[at + i] += D[at + part * part_size + i]
        filter_out(D, at, r, outputs - k, channels - c, dw, filter.at + k * filter.k + c * filter.c, filter)

    sum_task = kernel(sum_task, key=key)

    def weight(x, image_x, dy, image_y, dw, filter, channels, outputs, tiles, parts, V, v_size, Z, z_size,
               U, u_size, patch, patch_size, D, threads):  # fmt: skip
        blocks_c = (channels + parts.channels - 1) // parts.channels
        blocks_k = (outputs + parts.outputs - 1) // parts.outputs
        parallel_for(gradient_task, parts.total * blocks_c * blocks_k, threads,
                     (x, image_x, dy, image_y, channels, outputs, tiles, parts, V, v_size, Z, z_size,
                      U, u_size, patch, patch_size, D))  # fmt: skip
        tasks = (outputs + LANES - 1) // LANES * ((channels + LANES - 1) // LANES)
        parallel_for(sum_task, tasks, threads, (channels, outputs, parts, D, dw, filter))

    return Kernels(kernel(by_tiles, key=key), kernel(by_outputs, key=key), kernel(weight, key=key))
