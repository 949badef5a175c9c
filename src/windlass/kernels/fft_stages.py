"""The stages of dense convolution in the Fourier domain (`windlass.kernels.fft`), each a loop of parallel tasks.

Spectra lie by frequency: X[f][tile][re C, im C], M[f][tile][re K, im K] and, in panels of TILE_COLUMNS lanes,
U[panel][f][depth][re, im].  Every task writes its own part.

Products are with conjugates.  A number with its parts exchanged is i · conj(z), and i · conj(x) · conj(u) =
i · conj(x · u): so a product that finds X's and M's parts exchanged multiplies with U itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from windlass.kernels.cgemm import ACCUMULATE, CTILE_ROWS, cgemm_columns, cgemm_rows
from windlass.kernels.jit import LANES, TILE_COLUMNS, kernel
from windlass.kernels.spectra import (
    columns,
    columns_back,
    filter_in,
    filter_out,
    prepare,
    rows_in,
    rows_out,
    weights_in,
    weights_out,
)
from windlass.kernels.threads import parallel_for
from windlass.kernels.transform import prefetch, transpose

GROUP = 4 * LANES
"""Channels of a task that transforms tiles."""

FREQUENCIES = 8
"""Frequencies of a task that multiplies."""


class Layout(NamedTuple):
    """Where spectra stand, in floats from one to the next: rows, imaginary parts, frequencies, panels."""

    row: int
    im: int
    plane: int
    panel: int


@kernel
def _image_task(task: int, thread: int, x: Any, image: Any, tiling: Any, first: int, channel: int, channels: int,
                X: Any, layout: Any, codes: Any, work: Any, room: Any) -> None:  # fmt: skip
    """Spectra of one tile for a group of channels."""
    groups = (channels + GROUP - 1) // GROUP
    t = task // groups
    at = thread * room.all
    start = task % groups * GROUP
    for c in range(start, min(channels, start + GROUP), LANES):
        rows_in(x, image, tiling, first + t, channel + c, channels - c, codes, work, at, at + room.buffer)
        columns(work, at, codes, X, t * layout.row + c, layout.plane, layout.im)


@kernel
def images(x: Any, image: Any, tiling: Any, first: int, tiles: int, channel: int, channels: int,
           X: Any, layout: Any, codes: Any, work: Any, room: Any, threads: int) -> None:  # fmt: skip
    """Spectra of tiles from `first` on and channels from `channel` on."""
    groups = (channels + GROUP - 1) // GROUP
    parallel_for(
        _image_task, tiles * groups, threads, (x, image, tiling, first, channel, channels, X, layout, codes, work, room)
    )


@kernel
def _output_task(task: int, thread: int, y: Any, image: Any, tiling: Any, first: int, output: int, outputs: int,
                 M: Any, layout: Any, codes: Any, work: Any, room: Any, scale: Any, bias: Any,
                 floor: Any, stream: int) -> None:  # fmt: skip
    """Pixels of one tile for a group of channels."""
    groups = (outputs + GROUP - 1) // GROUP
    t = task // groups
    at = thread * room.all
    start = task % groups * GROUP
    for k in range(start, min(outputs, start + GROUP), LANES):
        columns_back(M, t * layout.row + k, layout.plane, layout.im, codes, work, at)
        rows_out(
            work,
            at,
            y,
            image,
            tiling,
            first + t,
            output + k,
            outputs - k,
            scale,
            bias,
            floor,
            stream,
            codes,
            at + room.buffer,
        )


@kernel
def outputs(y: Any, image: Any, tiling: Any, first: int, tiles: int, output: int, outputs: int, M: Any, layout: Any,
            codes: Any, work: Any, room: Any, scale: Any, bias: Any, floor: Any, stream: int,
            threads: int) -> None:  # fmt: skip
    """Pixels of tiles from `first` on and channels from `output` on."""
    groups = (outputs + GROUP - 1) // GROUP
    parallel_for(
        _output_task,
        tiles * groups,
        threads,
        (y, image, tiling, first, output, outputs, M, layout, codes, work, room, scale, bias, floor, stream),
    )


@kernel
def _filter_task(task: int, thread: int, w: Any, taps: Any, nonzero: int, depth: int, depths: int, panel: int,
                 U: Any, layout: Any, codes: Any, work: Any, room: Any) -> None:  # fmt: skip
    """Spectra of one panel of lanes and 16 of the depth."""
    chunks = (depths + LANES - 1) // LANES
    d = task % chunks * LANES
    count = min(LANES, depths - d)
    at = thread * room.all
    prepare(nonzero, codes, work, at, at + room.buffer)
    for half in range(0, TILE_COLUMNS, LANES):
        k = (panel + task // chunks) * TILE_COLUMNS + half
        if k < taps.lanes:
            weights_in(w, k * taps.lane + (depth + d) * taps.depth, taps, taps.lanes - k, count, work, at + room.block)
            for i in range(count):
                filter_in(
                    work,
                    at + room.block + i * taps.rows * taps.cols * LANES,
                    taps,
                    codes,
                    at,
                    at + room.buffer,
                    U,
                    task // chunks * layout.panel + (d + i) * layout.row + half,
                    layout.plane,
                    layout.im,
                )


@kernel
def filters(w: Any, taps: Any, nonzero: int, depth: int, depths: int, panel: int, panels: int, U: Any, layout: Any,
             codes: Any, work: Any, room: Any, threads: int) -> None:  # fmt: skip
    """Spectra of panels from `panel` on and the depth from `depth` on."""
    chunks = (depths + LANES - 1) // LANES
    parallel_for(
        _filter_task, panels * chunks, threads, (w, taps, nonzero, depth, depths, panel, U, layout, codes, work, room)
    )


@kernel
def _gradient_task(task: int, thread: int, dw: Any, taps: Any, depth: int, depths: int, panel: int, U: Any, layout: Any,
                   codes: Any, work: Any, room: Any, scale: Any, zeros: Any) -> None:  # fmt: skip
    """Weights of one panel of lanes and 16 of the depth from their spectra."""
    chunks = (depths + LANES - 1) // LANES
    d = task % chunks * LANES
    count = min(LANES, depths - d)
    at = thread * room.all
    for half in range(0, TILE_COLUMNS, LANES):
        k = (panel + task // chunks) * TILE_COLUMNS + half
        if k < taps.lanes:
            for i in range(count):
                columns_back(
                    U,
                    task // chunks * layout.panel + (d + i) * layout.row + half,
                    layout.plane,
                    layout.im,
                    codes,
                    work,
                    at,
                )
                filter_out(work, at, taps, codes, at + room.buffer, at + room.block + i * taps.rows * taps.cols * LANES)
            weights_out(
                work,
                at + room.block,
                taps,
                taps.lanes - k,
                count,
                scale,
                zeros,
                dw,
                k * taps.lane + (depth + d) * taps.depth,
            )


@kernel
def gradients(dw: Any, taps: Any, depth: int, depths: int, panel: int, panels: int, U: Any, layout: Any,
               codes: Any, work: Any, room: Any, scale: Any, zeros: Any, threads: int) -> None:  # fmt: skip
    """Weights of panels from `panel` on and the depth from `depth` on."""
    chunks = (depths + LANES - 1) // LANES
    parallel_for(
        _gradient_task,
        panels * chunks,
        threads,
        (dw, taps, depth, depths, panel, U, layout, codes, work, room, scale, zeros),
    )


@kernel
def _product_task(task: int, thread: int, num: int, tiles: int, depths: int, panels: int, X: Any, xl: Any,
                  U: Any, ul: Any, M: Any, ml: Any, turned: int, flags: int, chunk: int) -> None:  # fmt: skip
    """M[f] = X[f] · conj(U[f]) of a few frequencies, or X[f] · U[f]."""
    blocks = (tiles + CTILE_ROWS - 1) // CTILE_ROWS
    x, m, sign = turned * xl.im, turned * ml.im, 1 - 2 * turned
    for f in range(task * FREQUENCIES, min(num, task * FREQUENCIES + FREQUENCIES)):
        for p in range(panels):
            for b in range(blocks):
                i, following = b * tiles // blocks, (b + 1) * tiles // blocks
                next_x = f * xl.plane + following * xl.row
                if following == tiles:
                    next_x = (f + (p + 1) // panels) * xl.plane
                next_u = (p + 1) % panels * ul.panel + (f + (p + 1) // panels) * ul.plane + b * depths * LANES
                for d in range(0, depths, chunk):
                    cgemm_rows(
                        following - i,
                        X,
                        f * xl.plane + i * xl.row + d + x,
                        xl.row,
                        sign * xl.im,
                        U,
                        p * ul.panel + f * ul.plane + d * ul.row,
                        ul.row,
                        ul.im,
                        M,
                        f * ml.plane + i * ml.row + p * TILE_COLUMNS + m,
                        ml.row,
                        sign * ml.im,
                        min(chunk, depths - d),
                        X,
                        next_x + d * LANES,
                        U,
                        next_u + d * LANES,
                        flags | min(d, ACCUMULATE),
                    )


@kernel
def products(num: int, tiles: int, depths: int, panels: int, X: Any, xl: Any, U: Any, ul: Any,
              M: Any, ml: Any, flags: int, chunk: int, turned: int, threads: int) -> None:  # fmt: skip
    """M = X · conj(U), or X · U where `turned` is 1."""
    parallel_for(
        _product_task,
        (num + FREQUENCIES - 1) // FREQUENCIES,
        threads,
        (num, tiles, depths, panels, X, xl, U, ul, M, ml, turned, flags, chunk),
    )


@kernel
def _pack(U: Any, at: int, following: int, fetch: bool, layout: Any, lanes: int, depths: int, block: Any,
          to: int) -> None:  # fmt: skip
    """block[depth][re, im of a panel of lanes] from U[panel of depths][lane][re, im]; may `fetch` the following one."""
    row = 2 * TILE_COLUMNS
    for lane in range(0, lanes, LANES):
        for d in range(0, depths, LANES):
            offset = d // TILE_COLUMNS * layout.panel + lane * layout.row + d % TILE_COLUMNS
            start, here = at + offset, to + d * row + lane
            if fetch:
                prefetch(LANES, 2, U, following + offset, layout.row, layout.im)
            transpose(U, start, layout.row, block, here, row)
            transpose(U, start + layout.im, layout.row, block, here + TILE_COLUMNS, row)


@kernel
def _kept_task(task: int, thread: int, num: int, tiles: int, depth: int, depths: int, panel: int, panels: int,
               lanes: int, X: Any, xl: Any, U: Any, ul: Any, M: Any, ml: Any, flags: int, chunk: int,
               work: Any, room: Any) -> None:  # fmt: skip
    """M[f] = X[f] · U[f]ᵀ of a few frequencies; the panel that is multiplied is transposed into the work space."""
    blocks = (tiles + CTILE_ROWS - 1) // CTILE_ROWS
    at = thread * room.all + room.block
    row = 2 * TILE_COLUMNS
    for f in range(task * FREQUENCIES, min(num, task * FREQUENCIES + FREQUENCIES)):
        for p in range(panels):
            lane = (panel + p) * TILE_COLUMNS
            for d in range(0, depths, chunk):
                count = min(chunk, depths - d)
                u = f * ul.plane + (depth + d) // TILE_COLUMNS * ul.panel + lane * ul.row
                following_u = u + (chunk // TILE_COLUMNS) * ul.panel
                if d + chunk >= depths:
                    following_u = (f + (p + 1) // panels) * ul.plane + depth // TILE_COLUMNS * ul.panel
                    following_u += (panel + (p + 1) % panels) * TILE_COLUMNS * ul.row
                fetch = blocks * LANES < row  # the products would not get to the end of it
                _pack(U, u, following_u, fetch, ul, min(TILE_COLUMNS, lanes - lane), count, work, at)
                for b in range(blocks):
                    i, following = b * tiles // blocks, (b + 1) * tiles // blocks
                    next_x = f * xl.plane + following * xl.row + d
                    if following == tiles and d + chunk >= depths:
                        next_x = (f + (p + 1) // panels) * xl.plane
                    line = b * count * LANES
                    next_u = following_u + line // (TILE_COLUMNS * row) * ul.panel + line % (TILE_COLUMNS * row)
                    cgemm_rows(
                        following - i,
                        X,
                        f * xl.plane + i * xl.row + d + xl.im,
                        xl.row,
                        -xl.im,
                        work,
                        at,
                        row,
                        TILE_COLUMNS,
                        M,
                        f * ml.plane + i * ml.row + p * TILE_COLUMNS + ml.im,
                        ml.row,
                        -ml.im,
                        count,
                        X,
                        next_x,
                        U,
                        next_u,
                        flags | min(d, ACCUMULATE),
                    )


@kernel
def kept_products(tiles: int, depth: int, depths: int, panel: int, panels: int, lanes: int, X: Any, xl: Any, U: Any,
                  ul: Any, M: Any, ml: Any, flags: int, chunk: int, work: Any, room: Any, num: int,
                  threads: int) -> None:  # fmt: skip
    """M = X · Uᵀ with all spectra U of the forward pass, whose lanes are the depth here."""
    parallel_for(
        _kept_task,
        (num + FREQUENCIES - 1) // FREQUENCIES,
        threads,
        (num, tiles, depth, depths, panel, panels, lanes, X, xl, U, ul, M, ml, flags, chunk, work, room),
    )


@kernel
def _adjoint_task(task: int, thread: int, num: int, tiles: int, depths: int, panels: int, X: Any, xl: Any,
                  M: Any, ml: Any, U: Any, ul: Any, flags: int, chunk: int) -> None:  # fmt: skip
    """U[f] (+)= X[f]ᵀ · conj(M[f]) of a few frequencies."""
    blocks = (depths + CTILE_ROWS - 1) // CTILE_ROWS
    for f in range(task * FREQUENCIES, min(num, task * FREQUENCIES + FREQUENCIES)):
        for p in range(panels):
            for b in range(blocks):
                i, following = b * depths // blocks, (b + 1) * depths // blocks
                ahead = (p * blocks + b) * tiles * LANES
                for t in range(0, tiles, chunk):
                    cgemm_columns(
                        following - i,
                        X,
                        f * xl.plane + i + t * xl.row,
                        xl.row,
                        xl.im,
                        M,
                        f * ml.plane + p * TILE_COLUMNS + t * ml.row,
                        ml.row,
                        ml.im,
                        U,
                        p * ul.panel + f * ul.plane + i * ul.row,
                        ul.row,
                        ul.im,
                        min(chunk, tiles - t),
                        X,
                        (f + 1) * xl.plane + ahead + t * LANES,
                        M,
                        (f + 1) * ml.plane + ahead + t * LANES,
                        flags | min(t, ACCUMULATE),
                    )


@kernel
def adjoints(num: int, tiles: int, depths: int, panels: int, X: Any, xl: Any, M: Any, ml: Any, U: Any, ul: Any,
              flags: int, chunk: int, threads: int) -> None:  # fmt: skip
    """U (+)= Xᵀ · conj(M), over the tiles in their order."""
    parallel_for(
        _adjoint_task,
        (num + FREQUENCIES - 1) // FREQUENCIES,
        threads,
        (num, tiles, depths, panels, X, xl, M, ml, U, ul, flags, chunk),
    )
