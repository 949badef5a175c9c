"""The kernels of `windlass.kernels.depthwise`: 16 output channels side by side, each with inputs of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.blocking import ceil_div, phase_at
from windlass.kernels.jit import DISABLED, LANES, TILE_BLOCKS, TILE_ROWS, kernel
from windlass.kernels.pixels import AHEAD, add, rows_out, take, weights_in, weights_out, zero
from windlass.kernels.runs import GROUP, accumulate
from windlass.kernels.strips import Image
from windlass.kernels.taps import TapConv
from windlass.kernels.threads import parallel_for
from windlass.kernels.transform import clear, move, prefetch, transpose

SHUFFLED = (2, 4, 8)
"""Channels of a group that are spread by a shuffle."""

CHUNK = 8
"""Vectors of a pixel that are fetched at once: neighbours in memory."""

BLOCK_BYTES = 512 << 10
"""Pixels of a block: most of the second cache."""

PLANE_BYTES = 8 << 20
"""A block of one row is narrowed to fewer channels until it is no larger."""

NUM_PARTS = 16
"""Tasks to aim at in the gradient of the weights, whatever the number of threads."""


@intrinsic(prefer_literal=True)
def _spread(typing_context, fan, src, src_at, dst, dst_at):
    width = fan.literal_value

    def generate(context, builder, signature, values):
        value = emit.load(builder, emit.pointer(context, builder, src, values[1]), values[2])
        target = emit.pointer(context, builder, dst, values[3])
        for i in range(width):
            lanes = [lane // width * width + i for lane in range(LANES)]
            mask = ir.Constant(ir.VectorType(emit.i32, LANES), lanes)
            part = builder.shuffle_vector(value, ir.Constant(emit.vector, ir.Undefined), mask)
            emit.store(builder, part, target, builder.add(values[4], emit.constant(i * LANES)))
        return context.get_dummy_value()

    return types.void(fan, src, types.int64, dst, types.int64), generate


def _spread_python(fan: int, src: Any, src_at: int, dst: Any, dst_at: int) -> None:
    value = emit.flat(src)[src_at:][:LANES].copy()
    for i in range(fan):
        emit.flat(dst)[dst_at + i * LANES :][:LANES] = value[np.arange(LANES) // fan * fan + i]


spread: Callable[..., None] = _spread_python if DISABLED else _spread
"""spread(fan, src, src_at, dst, dst_at): `fan` vectors of 16 channels, every `fan` neighbours all the i-th of them."""


@kernel
def vector_in(src: Any, at: int, fan: int, dst: Any, to: int) -> None:
    """One vector of a pixel, spread."""
    if fan == 1:
        move(src, at, dst, to)
    elif fan == 2:
        spread(2, src, at, dst, to)
    elif fan == 4:
        spread(4, src, at, dst, to)
    else:
        spread(8, src, at, dst, to)


class Lanes(NamedTuple):
    """Sizes of a convolution by lanes and how it is cut, in elements.

    Attributes:
        batch, channels, outputs: images, input and output channels of all groups.
        fan, share: f input and o output channels of a group; plain: whether they are spread by vectors.
        step_h, step_w, spread_h, spread_w, all_rows, all_cols, low_h, low_w, more_h, more_w: as in `Blocks`.
        rows, row_blocks: rows of a block, blocks of an image.
        vectors, chunks: vectors of a chunk, chunks of all.
        lane_step: from tap to tap of a run.
        row_pitch, plane: strides of row and vector in a block; a pixel has f vectors.
        reduction: vectors of packed weights of 16 outputs.
        stream: whether the output is written past the caches.
        parts, part_blocks: of the gradient of the weights: parts, and blocks of each.
    """

    batch: int
    channels: int
    outputs: int
    fan: int
    share: int
    plain: int
    step_h: int
    step_w: int
    spread_h: int
    spread_w: int
    all_rows: int
    all_cols: int
    low_h: int
    low_w: int
    more_h: int
    more_w: int
    rows: int
    row_blocks: int
    vectors: int
    chunks: int
    lane_step: int
    row_pitch: int
    plane: int
    reduction: int
    stream: int
    parts: int
    part_blocks: int

    @property
    def block_numbers(self) -> int:
        """Numbers in a block's input."""
        return self.vectors * self.plane

    @property
    def tile_numbers(self) -> int:
        """Numbers in a block's output of one vector per pixel."""
        return self.rows * self.all_cols * self.spread_h * self.spread_w * LANES

    @property
    def all_vectors(self) -> int:
        """Vectors of all output channels."""
        return -(-self.outputs // LANES)


@cache
def lanes_of(conv: TapConv, *, tasks: int, stream: bool = False, out_fan: int = 0) -> Lanes:
    """Cuts a convolution by lanes into at least `tasks` tasks, where it can.

    With `out_fan`, the output is held beside the input, in as many vectors per pixel.
    """
    (low_h, high_h), (low_w, high_w) = conv.reach
    fan, share = conv.channels, conv.outputs
    more_h, more_w = high_h - low_h + 1, high_w - low_w + 1
    row_pitch = ((conv.cols - 1) * conv.step[1] + more_w) * fan * LANES

    def plane(rows: int) -> int:
        return ((rows - 1) * conv.step[0] + more_h) * row_pitch

    def size(vectors: int, rows: int) -> int:
        return 4 * vectors * (plane(rows) + rows * conv.cols * out_fan * LANES)

    count = ceil_div(conv.groups * share, LANES)
    vectors = min(count, max(2, CHUNK // max(fan, out_fan)))
    while vectors > 1 and size(vectors, 1) > PLANE_BYTES:
        vectors -= 1
    chunks = ceil_div(count, vectors)
    vectors = ceil_div(count, chunks)
    rows = conv.rows
    enough = ceil_div(tasks, max(1, conv.batch * chunks))
    while rows > 1 and (size(vectors, rows) > BLOCK_BYTES or (ceil_div(conv.rows, rows) < enough and rows > more_h)):
        rows -= 1
    row_blocks = ceil_div(conv.rows, rows)
    rows = ceil_div(conv.rows, row_blocks)
    blocks = max(1, conv.batch * row_blocks)
    part_blocks = ceil_div(blocks, min(blocks, ceil_div(tasks, chunks)))
    steps = [phase.across.step for phase in conv.phases if phase.across.num > 1]
    return Lanes(
        conv.batch, conv.groups * fan, conv.groups * share, fan, share, int(fan == share and fan in (1, *SHUFFLED)),
        *conv.step, *conv.spread, conv.rows, conv.cols, low_h, low_w, more_h, more_w, rows, row_blocks,
        vectors, chunks, LANES * (steps[0] if steps and fan == 1 else 1), row_pitch, plane(rows),
        sum(p.down.num * p.across.num for p in conv.phases) * fan, int(stream),
        ceil_div(blocks, part_blocks), part_blocks,
    )  # fmt: skip


@kernel
def lanes_in(x: Any, at: int, image: Image, g: Lanes, first: int, vectors: int, row: int, rows: int,
             hollow: int, buf: Any, to: int, patch: Any, patch_at: int) -> None:  # fmt: skip
    """buf[vector, i, j, f, 16] = x at (row + i, low_w + j), zero outside the image, spread.

    With `hollow` 1, rows outside the image are left as they were.
    """
    pixel = g.fan * LANES
    cols = g.row_pitch // pixel
    low = min(max(0, -g.low_w), cols)
    high = max(low, min(cols, image.width - g.low_w))
    for i in range(rows):
        h = row + i
        line = to + i * g.row_pitch
        if h < 0 or h >= image.height:
            if not hollow:
                for v in range(vectors):
                    zero(buf, line + v * g.plane, g.row_pitch)
            continue
        for v in range(vectors):
            zero(buf, line + v * g.plane, low * pixel)
            zero(buf, line + v * g.plane + high * pixel, (cols - high) * pixel)
        start = at + h * image.h + (low + g.low_w) * image.w
        if not g.plain:
            for v in range(vectors):
                for j in range(low, high):
                    for f in range(g.fan):
                        base = line + v * g.plane + j * pixel + f * LANES
                        clear(buf, base)
                        for lane in range(min(LANES, g.outputs - (first + v) * LANES)):
                            c = ((first + v) * LANES + lane) // g.share * g.fan + f
                            buf[base + lane] = x[start + (j - low) * image.w + c * image.c]
        elif image.c == 1:
            whole = min(vectors, g.channels // LANES - first)
            for j in range(low, high):
                source = start + (j - low) * image.w + first * LANES
                if g.fan == 1:
                    for v in range(whole):
                        prefetch(1, 1, x, source + v * LANES + AHEAD, 0, 0)
                        move(x, source + v * LANES, buf, line + v * g.plane + j * LANES)
                else:
                    for v in range(whole):
                        prefetch(1, 1, x, source + v * LANES + AHEAD, 0, 0)
                        vector_in(x, source + v * LANES, g.fan, buf, line + v * g.plane + j * pixel)
                if whole < vectors:
                    take(x, source + whole * LANES, g.channels - (first + whole) * LANES, patch, patch_at)
                    vector_in(patch, patch_at, g.fan, buf, line + whole * g.plane + j * pixel)
        else:
            for v in range(vectors):
                c = (first + v) * LANES
                for j in range(low, high, LANES):
                    source = start + (j - low) * image.w + c * image.c
                    count = min(LANES, high - j)
                    if image.w == 1 and count == LANES and g.channels - c >= LANES:
                        transpose(x, source, image.c, patch, patch_at, LANES)
                    else:
                        for q in range(count):
                            clear(patch, patch_at + q * LANES)
                        for lane in range(min(LANES, g.channels - c)):
                            for q in range(count):
                                patch[patch_at + q * LANES + lane] = x[source + q * image.w + lane * image.c]
                    for q in range(count):
                        vector_in(patch, patch_at + q * LANES, g.fan, buf, line + v * g.plane + (j + q) * pixel)


@kernel
def pack_lanes(task, thread, w, filter, group_step, w_last, side, taps, g, packed, patch):
    """packed[vector][place · f + i][16] = the weights of 16 outputs."""
    k = task * LANES
    to = task * g.reduction * LANES
    if group_step == g.share * filter.k:
        weights_in(w, filter.at + k * filter.k, filter, side, taps.size, g.outputs - k, g.fan, taps,
                   packed, to, LANES, g.fan, patch, thread * LANES * LANES, w_last)  # fmt: skip
        return
    for t in range(taps.size):
        if taps[t] < 0:
            continue
        start = filter.at + t // side * filter.r + t % side * filter.s
        for i in range(g.fan):
            base = to + (taps[t] * g.fan + i) * LANES
            clear(packed, base)
            for lane in range(min(LANES, g.outputs - k)):
                place = (k + lane) // g.share * group_step + (k + lane) % g.share * filter.k + i * filter.c
                packed[base + lane] = w[start + place]


@kernel
def product_lanes(task, thread, x, image, y, target, g, phases, table, packed, bias, buf, tile, tile_size,
                  patch, floor):  # fmt: skip
    """The output of a block of rows and a chunk of channels."""
    first = task % g.chunks * g.vectors
    block = task // g.chunks
    n = block // g.row_blocks
    i0 = block % g.row_blocks * g.rows
    i1 = min(i0 + g.rows, g.all_rows)
    vectors = min(g.vectors, (g.outputs + LANES - 1) // LANES - first)
    to = thread * g.vectors * g.plane
    lanes_in(x, n * image.n, image, g, first, vectors, i0 * g.step_h + g.low_h, (i1 - 1 - i0) * g.step_h + g.more_h, 1,
             buf, to, patch, thread * LANES * LANES)  # fmt: skip
    pixel = g.fan * LANES
    row = g.step_w * pixel
    top = i0 * g.spread_h
    rows = min(target.height - top, (i1 - i0) * g.spread_h)
    for v in range(vectors):
        k = (first + v) * LANES
        at = to + v * g.plane - g.low_h * g.row_pitch - g.low_w * pixel
        whole = target.c == 1 and g.outputs - k >= LANES
        corner = n * target.n + k * target.c + top * target.h
        result = y if whole else tile
        start = corner if whole else thread * tile_size
        out_h = target.h if whole else target.width * LANES
        out_w = target.w if whole else LANES
        stream = g.stream if whole else 0
        for p in range(phases.shape[0]):
            phase = phase_at(phases, p)
            tiles = (phase.cols + TILE_ROWS - 1) // TILE_ROWS
            # Down a strip of columns: what the taps of neighbouring rows share stays in the first cache.
            for t in range(tiles):
                j = t * phase.cols // tiles
                for i in range(i0, min(i1, phase.rows)):
                    h = i * g.step_h + phase.offset_h
                    low = max(0, (phase.step_h - 1 - h) // phase.step_h)
                    high = min(phase.taps_h, (image.height - 1 - h + phase.step_h) // phase.step_h)
                    low, count = low * phase.runs, max(0, high - low) * phase.runs
                    line = at + (i - i0) * g.step_h * g.row_pitch
                    below = start + ((i - i0) * g.spread_h + phase.row) * out_h + phase.col * out_w
                    accumulate("lanes", (t + 1) * phase.cols // tiles - j, 1, buf, line + j * row, row, GROUP * row,
                               g.lane_step, table, phase.table + low, count, phase.depth,
                               packed, (((first + v) * g.reduction) + phase.weights + low * phase.depth) * LANES,
                               bias, k, 0, floor, result, below + j * g.spread_w * out_w, g.spread_w * out_w,
                               stream, buf, 0, 0)  # fmt: skip
        if not whole:
            rows_out(tile, thread * tile_size, target.width * LANES, LANES, y, corner, target, rows, target.width,
                     min(LANES, g.outputs - k))  # fmt: skip


@kernel
def product(x, image, w, filter, group_step, w_last, side, taps, y, target, g, phases, table, packed, bias, buf,
            tile, tile_size, patch, floor, threads):  # fmt: skip
    """A whole product."""
    vectors = (g.outputs + LANES - 1) // LANES
    parallel_for(pack_lanes, vectors, threads, (w, filter, group_step, w_last, side, taps, g, packed, patch))
    parallel_for(
        product_lanes, g.batch * g.row_blocks * g.chunks, threads,
        (x, image, y, target, g, phases, table, packed, bias, buf, tile, tile_size, patch, floor),
    )  # fmt: skip


@kernel
def gradient_lanes(task, thread, x, image, dy, source, g, d, kernel_h, kernel_w, dilation_h, dilation_w, table, zeros,
                   buf, rows_of, rows_size, sums, patch, floor):  # fmt: skip
    """The sums over one part of the rows, of one chunk of channels; `d` is dy as lanes."""
    part = task % g.parts
    first = task // g.parts * g.vectors
    vectors = min(g.vectors, (g.outputs + LANES - 1) // LANES - first)
    to, dy_at, patch_at = thread * g.vectors * g.plane, thread * rows_size, thread * LANES * LANES
    most = max(1, min(TILE_ROWS, TILE_ROWS * TILE_BLOCKS // d.fan))
    joined = most // GROUP if kernel_w == GROUP else 0
    begin = part * g.part_blocks
    for block in range(begin, min(begin + g.part_blocks, g.batch * g.row_blocks)):
        n = block // g.row_blocks
        i0 = block % g.row_blocks * g.rows
        rows = min(g.rows, g.all_rows - i0)
        top = i0 * g.step_h + g.low_h
        lanes_in(x, n * image.n, image, g, first, vectors, top, (rows - 1) * g.step_h + g.more_h,
                 1 if joined == 0 else 0, buf, to, patch, patch_at)  # fmt: skip
        lanes_in(dy, n * source.n, source, d, first, vectors, i0, rows, 1, rows_of, dy_at, patch, patch_at)
        start = zeros if block == begin else sums
        for v in range(vectors):
            at = to + v * g.plane
            below = ((part * g.chunks * g.vectors + first + v) * g.reduction) * LANES
            for r in range(0, kernel_h, max(1, joined)):
                h = top + r * dilation_h
                low, high = 0, rows
                if joined == 0:
                    low = min(rows, max(0, (g.step_h - 1 - h) // g.step_h))
                    high = min(rows, (image.height - 1 - h + g.step_h) // g.step_h)
                length = kernel_w * min(max(1, joined), kernel_h - r)
                row = dilation_w * LANES
                tiles = (length + most - 1) // most
                for t in range(tiles):
                    i = t * length // tiles
                    place = below + (r * kernel_w + i) * d.fan * LANES
                    accumulate("outer", (t + 1) * length // tiles - i, d.fan,
                               buf, at + r * dilation_h * g.row_pitch + i * row, row,
                               dilation_h * g.row_pitch if joined else GROUP * row, g.step_w * LANES,
                               table, low, max(0, high - low), g.all_cols,
                               rows_of, dy_at + v * d.plane + low * d.row_pitch,
                               start, 0 if block == begin else place, 0 if block == begin else d.fan * LANES, floor,
                               sums, place, d.fan * LANES, 0, buf, 0, 0)  # fmt: skip


@kernel
def sum_lanes(task, thread, g, sums, dw, filter, side, taps, fan, patch):
    """Writes dw, the parts' sums added in order, of 16 channels; fan > 1: of 16 inputs and `fan` outputs of each."""
    size = g.chunks * g.vectors * g.reduction * LANES
    at = task * g.reduction * LANES
    for row in range(g.reduction):
        for part in range(1, g.parts):
            add(sums, at + part * size + row * LANES, sums, at + row * LANES)
    if fan == 1:
        weights_out(sums, at, LANES, 1, dw, filter.at + task * LANES * filter.k, filter, side, taps,
                    g.outputs - task * LANES, 1, patch, thread * LANES * LANES)  # fmt: skip
        return
    for t in range(taps):
        start = filter.at + t // side * filter.r + t % side * filter.s
        for f in range(fan):
            base = at + (t * fan + f) * LANES
            for lane in range(min(LANES, g.outputs - task * LANES)):
                k = (task * LANES + lane) // fan * fan + f
                dw[start + k * filter.k + lane % fan * filter.c] = sums[base + lane]


@kernel
def gradient(x, image, dy, source, dw, filter, g, d, kernel_h, kernel_w, dilation_h, dilation_w, table, zeros,
             buf, rows_of, rows_size, sums, patch, floor, threads):  # fmt: skip
    """A whole gradient of the weights."""
    parallel_for(
        gradient_lanes, g.chunks * g.parts, threads,
        (x, image, dy, source, g, d, kernel_h, kernel_w, dilation_h, dilation_w, table, zeros, buf, rows_of, rows_size,
         sums, patch, floor),
    )  # fmt: skip
    parallel_for(
        sum_lanes, (g.outputs + LANES - 1) // LANES, threads,
        (g, sums, dw, filter, kernel_w, kernel_h * kernel_w, d.fan, patch),
    )  # fmt: skip
