"""Convolution by patches: all taps of a pixel in one row, and a matrix product (Chellapilla et al. 2006).

    y[pixel, :] = Σ_{tap, c} patch[pixel, (tap, c)] · W[(tap, c), :]

Patches of whole images would be as many times larger than the images as there are taps.  Here they are made of a
block of pixels at a time, in the second cache, from the same padded copy of the input that `windlass.kernels.direct`
works on; long reductions in chunks.  A block may reach over rows and over small images, so tiles are full where
rows are short.  1×1 convolutions of neighbouring pixels need no patches: there the two algorithms are one.

In the gradient of the weights, the patches' columns are the rows of the result, and pixels are the reduction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.kernels import direct
from windlass.kernels.blocking import Blocks, blocks_of, pack_task, pack_tasks, phase_at
from windlass.kernels.emit import flat
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.parts import Parts, parts_of, sum_task, sum_tasks
from windlass.kernels.pixels import copy, rows_in, rows_out
from windlass.kernels.runs import GROUP, accumulate, accumulate_rows
from windlass.kernels.taps import (
    Table,
    TapConv,
    adjoint_taps,
    filter_of,
    forward_taps,
    image_of,
    laid_out,
    places,
    plain,
    runs_of,
    streams,
    thin,
    thinned,
)
from windlass.kernels.threads import parallel_for
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[np.float32]

CHUNK = 768
"""Steps of the reduction that are held as patches at a time."""

CHUNK_COLUMNS = 448
"""Columns of patches that the gradient of the weights holds at a time."""


@kernel
def gather(src: Any, at: int, row: int, col: int, rows: int, cols: int, table: Any, first: int, count: int,
           depth: int, patches: Any, to: int, pitch: int) -> None:  # fmt: skip
    """The patches of rows × cols pixels: runs first…first + count of each."""
    for i in range(rows):
        for j in range(cols):
            base = to + (i * cols + j) * pitch
            start = at + i * row + j * col
            for run in range(count):
                copy(src, start + table[first + run], depth, patches, base + run * depth)


@kernel
def product_task(task, thread, x, image, y, target, g, phases, table, chunk, pitch, packed, bias, first_unit, units,
                 buf, buf_size, patches, patches_size, tile, tile_size, patch, floor):  # fmt: skip
    """The output of one block of pixels and one unit of channels."""
    here = task % units
    unit = first_unit + here
    block = task // units
    group = unit // g.group_units
    n = block // (g.row_blocks * g.col_blocks) * g.images
    images = min(g.images, g.batch - n)
    i0 = block // g.col_blocks % g.row_blocks * g.rows
    j0 = block % g.col_blocks * g.cols
    i1, j1 = min(i0 + g.rows, g.all_rows), min(j0 + g.cols, g.all_cols)
    to, patches_at, tile_at = thread * buf_size, thread * patches_size, thread * tile_size
    for m in range(images):
        rows_in(x, (n + m) * image.n + group * g.channels * image.c, image, g.channels, g.channels,
                i0 * g.step_h + g.low_h, (i1 - 1 - i0) * g.step_h + g.more_h,
                j0 * g.step_w + g.low_w, (j1 - 1 - j0) * g.step_w + g.more_w, 0,
                buf, to + m * g.image_pitch, g.row_pitch, g.pitch, patch, thread * LANES * LANES)  # fmt: skip
    at = to - g.low_h * g.row_pitch - g.low_w * g.pitch
    top, left = i0 * g.spread_h, j0 * g.spread_w
    rows = min(target.height - top, (i1 - i0) * g.spread_h)
    cols = min(target.width - left, (j1 - j0) * g.spread_w)
    first_k = unit % g.group_units * g.unit_panels * TILE_COLUMNS
    last_k = min(g.outputs, first_k + g.unit_panels * TILE_COLUMNS)
    corner = n * target.n + group * g.outputs * target.c + top * target.h + left * target.w
    dense = target.h == cols * target.w and (images == 1 or target.n == rows * target.h)
    for p in range(phases.shape[0]):
        phase = phase_at(phases, p)
        count_i, count_j = min(i1, phase.rows) - i0, min(j1, phase.cols) - j0
        if count_i <= 0 or count_j <= 0:
            continue
        runs = phase.taps_h * phase.runs
        for first in range(0, max(1, runs), chunk):
            count = min(chunk, runs - first)
            last = first + chunk >= runs
            for m in range(images):
                gather(buf, at + m * g.image_pitch, g.step_h * g.row_pitch, g.step_w * g.pitch, count_i, count_j,
                       table, phase.table + first, count, phase.depth,
                       patches, patches_at + m * count_i * count_j * pitch, pitch)  # fmt: skip
            for k in range(first_k, last_k, TILE_COLUMNS):
                blocks = (min(TILE_COLUMNS, g.outputs - k) + LANES - 1) // LANES
                width = blocks * LANES
                whole = target.c == 1 and g.outputs - k >= width
                result = y if whole else tile
                out_w = target.w if whole else TILE_COLUMNS
                out_h = target.h if whole else cols * TILE_COLUMNS
                out_n = target.n if whole else rows * cols * TILE_COLUMNS
                start = corner + k if whole else tile_at + (k - first_k) * images * rows * cols
                start += phase.row * out_h + phase.col * out_w
                weights = here * g.unit_size + (k - first_k) * g.reduction
                weights += (phase.weights + first * phase.depth) * width
                # Where pixels follow each other in the output, all rows are one line.
                joined = g.spread_h * g.spread_w == 1 and (dense or not whole)
                line = images * count_i * count_j if joined else count_j
                tiles = (line + TILE_ROWS - 1) // TILE_ROWS
                for q in range(images * count_i * count_j // line):
                    below = start + q // count_i * out_n + q % count_i * g.spread_h * out_h
                    for t in range(tiles):
                        j = t * line // tiles
                        place = below + j * g.spread_w * out_w
                        accumulate_rows((t + 1) * line // tiles - j, blocks,
                                        patches, patches_at + (q * line + j) * pitch, pitch,
                                        table, table.size - 1, min(1, count), count * phase.depth, packed, weights,
                                        bias if first == 0 else result,
                                        group * g.outputs + k if first == 0 else place,
                                        0 if first == 0 else g.spread_w * out_w,
                                        floor if last else np.float32(-np.inf), result, place, g.spread_w * out_w,
                                        g.stream if whole and runs <= chunk else 0)  # fmt: skip
    for k in range(first_k, last_k, TILE_COLUMNS):
        if target.c != 1 or g.outputs - k < (min(TILE_COLUMNS, g.outputs - k) + LANES - 1) // LANES * LANES:
            for m in range(images):
                rows_out(tile, tile_at + ((k - first_k) * images + m * TILE_COLUMNS) * rows * cols,
                         cols * TILE_COLUMNS, TILE_COLUMNS, y, corner + m * target.n + k * target.c, target, rows, cols,
                         min(TILE_COLUMNS, g.outputs - k))  # fmt: skip


@kernel
def product(x, image, w, filter, group_step, w_last, side, taps, y, target, g, phases, table, chunk, pitch, packed,
            bias, buf, buf_size, patches, patches_size, tile, tile_size, patch, floor, threads):  # fmt: skip
    """A whole product: packs weights and multiplies, some units at a time."""
    blocks = g.image_blocks * g.row_blocks * g.col_blocks
    for first in range(0, g.units, g.units_at_once):
        units = min(g.units_at_once, g.units - first)
        parallel_for(
            pack_task, pack_tasks(g, units), threads,
            (w, filter, group_step, w_last, side, taps, g, first, packed, patch),
        )  # fmt: skip
        parallel_for(
            product_task, units * blocks, threads,
            (x, image, y, target, g, phases, table, chunk, pitch, packed, bias, first, units,
             buf, buf_size, patches, patches_size, tile, tile_size, patch, floor),
        )  # fmt: skip


@kernel
def gradient_task(task, thread, x, image, dy, source, g, table, runs, depth, chunk, pitch, zeros, buf, buf_size,
                  patches, patches_size, panels, panel_size, sums, patch, floor):  # fmt: skip
    """The sums over one part of the output rows, of one chunk of input and of output channels."""
    part = task % g.num_parts
    task = task // g.num_parts
    k0 = task % g.k_chunks * g.k_chunk
    c0 = task // g.k_chunks % g.c_chunks * g.c_chunk
    group = task // g.k_chunks // g.c_chunks
    channels, outputs = min(g.c_chunk, g.channels - c0), min(g.k_chunk, g.outputs - k0)
    to, patches_at, panel_at = thread * buf_size, thread * patches_size, thread * panel_size
    patch_at = thread * LANES * LANES
    at = to + g.top * g.row_pitch + g.left * g.pitch
    first_block = part * g.part_blocks
    for block in range(first_block, min(first_block + g.part_blocks, g.blocks)):
        n = block // g.row_blocks * g.images
        images = min(g.images, g.batch - n)
        i0 = block % g.row_blocks * g.rows
        rows = min(g.rows, g.out_rows - i0)
        each = rows * g.out_cols
        for m in range(images):
            rows_in(x, (n + m) * image.n + (group * g.channels + c0) * image.c, image, channels, channels,
                    i0 * g.step_h - g.top, (rows - 1) * g.step_h + (g.kernel_h - 1) * g.dilation_h + 1,
                    -g.left, (g.out_cols - 1) * g.step_w + (g.kernel_w - 1) * g.dilation_w + 1, 0,
                    buf, to + m * g.image_pitch, g.row_pitch, g.pitch, patch, patch_at)  # fmt: skip
            for k in range(0, outputs, TILE_COLUMNS):
                width = min(TILE_COLUMNS, (outputs - k + LANES - 1) // LANES * LANES)
                rows_in(dy, (n + m) * source.n + (group * g.outputs + k0 + k) * source.c, source,
                        min(width, outputs - k), width, i0, rows, 0, g.out_cols, 1,
                        panels, panel_at + images * each * k + m * each * width, g.out_cols * width, width,
                        patch, patch_at)  # fmt: skip
        start = zeros if block == first_block else sums
        for first in range(0, runs, chunk):
            count = min(chunk, runs - first)
            for m in range(images):
                gather(buf, at + m * g.image_pitch, g.step_h * g.row_pitch, g.step_w * g.pitch, rows, g.out_cols,
                       table, first, count, depth, patches, patches_at + m * each * pitch, pitch)  # fmt: skip
            for k in range(0, outputs, TILE_COLUMNS):
                width = min(TILE_COLUMNS, (outputs - k + LANES - 1) // LANES * LANES)
                below = part * g.sum_part + group * g.sum_group + k0 + k
                for stretch in range(1 if g.c_chunks == 1 else count):
                    length = count * depth if g.c_chunks == 1 else channels
                    row = first * depth if g.c_chunks == 1 else (first + stretch) * g.channels + c0
                    tiles = (length + TILE_ROWS - 1) // TILE_ROWS
                    for t in range(tiles):
                        c = t * length // tiles
                        place = below + (row + c) * g.sum_row
                        accumulate("columns", (t + 1) * length // tiles - c, width // LANES,
                                   patches, patches_at + stretch * depth + c, 1, GROUP, pitch,
                                   table, table.size - 1, 1, images * each, panels, panel_at + images * each * k,
                                   start, 0 if block == first_block else place,
                                   0 if block == first_block else g.sum_row, floor,
                                   sums, place, g.sum_row, 0, buf, 0, 0)  # fmt: skip


@kernel
def gradient(x, image, dy, source, dw, filter, group_step, g, table, runs, depth, chunk, pitch, zeros, buf, buf_size,
             patches, patches_size, panels, panel_size, sums, patch, floor, threads):  # fmt: skip
    """A whole gradient of the weights."""
    tasks = g.groups * g.c_chunks * g.k_chunks * g.num_parts
    parallel_for(
        gradient_task, tasks, threads,
        (x, image, dy, source, g, table, runs, depth, chunk, pitch, zeros, buf, buf_size, patches, patches_size,
         panels, panel_size, sums, patch, floor),
    )  # fmt: skip
    parallel_for(sum_task, sum_tasks(g), threads, (g, sums, dw, filter, group_step, patch))


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int, relu: bool = False
) -> None:
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`."""
    x, shape = thin(x, shape), thinned(shape)
    _multiply(forward_taps(shape), x, w, bias, y, group_step=shape.group_out, swapped=False, threads=threads, relu=relu)


def backward_input(dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dx, the adjoint of `forward` in x."""
    _multiply(adjoint_taps(shape), dy, w, None, dx, group_step=shape.group_out, swapped=True, threads=threads)


def _multiply(conv: TapConv, x: Array, w: Array, bias: Array | None, y: Array, *, group_step: int, swapped: bool,
              threads: int, relu: bool = False) -> None:  # fmt: skip
    if conv.is_flat:
        direct.multiply(conv, x, w, bias, y, group_step=group_step, swapped=swapped, threads=threads, relu=relu)
        return
    if 0 in y.shape:
        return
    x, w, target = plain(x), plain(w), plain(y)
    g = blocks_of(
        conv,
        strides=None,
        stream=streams(target, conv.outputs if conv.groups > 1 else 0),
        threads=threads,
        patches=True,
    )
    phases, table, chunk, pitch = _patches(conv, g)
    packed, buf, patches, tile, patch, biases = scratch(*_sizes(conv, g, threads))
    biases[:] = 0
    if bias is not None:
        biases[: bias.size] = bias
    product(
        flat(x), image_of(x), flat(w), filter_of(w, swapped=swapped), group_step * w.strides[0] // 4, flat(w).size - 1,
        conv.kernel[1], places(conv), flat(target), image_of(target), g, phases, table, chunk, pitch, packed, biases,
        buf, g.block_numbers, patches, patches.size // threads, tile, tile.size // threads, patch,
        np.float32(0 if relu else -np.inf), threads,
    )  # fmt: skip
    if target is not y:
        y[...] = target


def _patches(conv: TapConv, g: Blocks) -> tuple[Table, Table, int, int]:
    """Phases, offsets of runs, runs of a chunk, and a patch's numbers."""
    phases, table = runs_of(conv, pitch=g.pitch, row_pitch=g.row_pitch)
    depth = max(1, int(phases[:, 8].max()))
    chunk = max(1, CHUNK // depth)
    return phases, table, chunk, _odd_lines(min(chunk * depth, max(1, g.reduction)))


def _odd_lines(numbers: int) -> int:
    """At least so many numbers, as an odd number of cache lines: rows at this distance do not share sets."""
    return (-(-numbers // LANES) | 1) * LANES


def _sizes(conv: TapConv, g: Blocks, threads: int) -> tuple[int, int, int, int, int, int]:
    """Numbers in packed weights, blocks, patches, tiles, 16 × 16 patches and bias."""
    pitch = _patches(conv, g)[3]
    patches = threads * (g.images * g.rows * g.cols * pitch + LANES)
    tiles = threads * g.unit_panels * g.tile_numbers
    return (
        g.packed_numbers, threads * g.block_numbers, patches, tiles, threads * LANES * LANES,
        g.groups * g.outputs + TILE_COLUMNS,
    )  # fmt: skip


def backward_weight(x: Array, dy: Array, dw: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dw, the adjoint of `forward` in w."""
    if 0 in dy.shape:
        dw[...] = 0
        return
    x, shape = thin(x, shape), thinned(shape)
    x, dy, target = plain(x), plain(dy), plain(dw)
    g, phases, table, chunk, pitch = _gradient_patches(shape)
    buf, patches, panels, sums, patch, zeros = scratch(*_gradient_sizes(g, pitch, threads))
    zeros[:] = 0
    gradient(
        flat(x), image_of(x), flat(dy), image_of(dy), flat(target), filter_of(target),
        shape.group_out * target.strides[0] // 4, g, table, int(phases[0, 4] * phases[0, 7]), int(phases[0, 8]), chunk,
        pitch, zeros, buf, g.block_numbers, patches, patches.size // threads, panels, g.panel_numbers, sums, patch,
        np.float32(-np.inf), threads,
    )  # fmt: skip
    if target is not dw:
        dw[...] = target


def _gradient_patches(shape: ConvShape) -> tuple[Parts, Table, Table, int, int]:
    conv = forward_taps(shape)
    g = parts_of(conv, shape.dilation, None)
    chunk_conv = replace(conv, channels=g.c_chunk)
    phases, table = runs_of(chunk_conv, pitch=g.pitch, row_pitch=g.row_pitch, merge=g.c_chunks == 1)
    depth = int(phases[0, 8])
    chunk = max(1, CHUNK_COLUMNS // depth)
    return g, phases, table, chunk, _odd_lines(min(chunk, len(table) - 1) * depth)


def _gradient_sizes(g: Parts, pitch: int, threads: int) -> tuple[int, int, int, int, int, int]:
    """Numbers in blocks, patches, panels, sums, 16 × 16 patches and zeros."""
    return (
        threads * g.block_numbers, threads * (g.pixels * pitch + LANES), threads * g.panel_numbers,
        g.num_parts * g.sum_part, threads * LANES * LANES, TILE_COLUMNS,
    )  # fmt: skip


def workspace_bytes(direction: Direction, *, shape: ConvShape, threads: int) -> int:
    """Bytes of scratch memory over all threads, at most."""
    if direction == "weight":
        g, _, _, _, pitch = _gradient_patches(thinned(shape))
        return 4 * sum(_gradient_sizes(g, pitch, threads))
    conv = adjoint_taps(shape) if direction == "input" else forward_taps(thinned(shape))
    if conv.is_flat:
        blocks = [blocks_of(form, strides=None, stream=False, threads=threads) for form in (conv, *laid_out(conv))]
        return max(4 * sum(direct.sizes(g, threads)) for g in blocks)
    return 4 * sum(_sizes(conv, blocks_of(conv, strides=None, stream=False, threads=threads, patches=True), threads))
