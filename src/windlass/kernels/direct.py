"""Direct convolution: no patches; a tile of outputs stays in registers over all taps.

    y[i, j, :] = Σ_tap x[i·step + offset(tap), j·step + offset(tap), :] · W[tap]

With channels side by side, 14 neighbouring output pixels are 14 rows of A at a fixed distance, and every tap is a
stretch of memory (every row of taps, where they are neighbours): one call of `accumulate` runs over all of them.
A block of input rows is copied once into the second cache, with zeros left and right; taps above and below the
image are left out.  Where no tap reaches over the sides, the input is read where it stands.

The gradient of the input is the same with the taps of `adjoint_taps`.  The gradient of the weights has input
channels as A's rows and pixels as the reduction,

    dW[tap][c, k] = Σ_pixels x[pixel · step + offset(tap), c] · dy[pixel, k],

a run for every output row.  Depthwise convolutions have kernels of their own, in `windlass.kernels.depthwise`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from windlass.kernels import depthwise
from windlass.kernels.blocking import Blocks, blocks_of, pack_task, pack_tasks, phase_at
from windlass.kernels.emit import flat
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.parts import Parts, parts_of, sum_task, sum_tasks
from windlass.kernels.pixels import fetch_pixels, rows_in, rows_out
from windlass.kernels.runs import GROUP, accumulate, accumulate_rows
from windlass.kernels.taps import (
    TapConv,
    adjoint_taps,
    filter_of,
    flattened,
    forward_taps,
    image_of,
    laid_out,
    places,
    plain,
    runs_of,
    streams,
    strides_of,
    thin,
    thinned,
)
from windlass.kernels.threads import parallel_for
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[np.float32]


@kernel
def product_task(task, thread, x, image, y, target, g, phases, table, packed, bias, first_unit, units,
                 buf, buf_size, tile, tile_size, patch, floor):  # fmt: skip
    """The output of one block of pixels and one unit of channels."""
    here = task % units
    unit = first_unit + here
    block = task // units
    group = unit // g.group_units
    n = block // (g.row_blocks * g.col_blocks)
    i0 = block // g.col_blocks % g.row_blocks * g.rows
    j0 = block % g.col_blocks * g.cols
    i1, j1 = min(i0 + g.rows, g.all_rows), min(j0 + g.cols, g.all_cols)
    source = x if g.in_place else buf
    if g.in_place:
        at = n * image.n + group * g.channels + i0 * g.step_h * image.h + j0 * g.step_w * image.w
    else:
        to = thread * buf_size
        rows_in(x, n * image.n + group * g.channels * image.c, image, g.channels, g.channels,
                i0 * g.step_h + g.low_h, (i1 - 1 - i0) * g.step_h + g.more_h,
                j0 * g.step_w + g.low_w, (j1 - 1 - j0) * g.step_w + g.more_w, 1,
                buf, to, g.row_pitch, g.pitch, patch, thread * LANES * LANES)  # fmt: skip
        at = to - g.low_h * g.row_pitch - g.low_w * g.pitch
    row = g.step_w * g.pitch
    top, left = i0 * g.spread_h, j0 * g.spread_w
    rows = min(target.height - top, (i1 - i0) * g.spread_h)
    cols = min(target.width - left, (j1 - j0) * g.spread_w)
    for panel in range(g.unit_panels):
        k = (unit % g.group_units * g.unit_panels + panel) * TILE_COLUMNS
        if k >= g.outputs:
            break
        blocks = (min(TILE_COLUMNS, g.outputs - k) + LANES - 1) // LANES
        width = blocks * LANES
        whole = target.c == 1 and g.outputs - k >= width
        corner = n * target.n + (group * g.outputs + k) * target.c + top * target.h + left * target.w
        result = y if whole else tile
        start = corner if whole else thread * tile_size
        out_h = target.h if whole else cols * TILE_COLUMNS
        out_w = target.w if whole else TILE_COLUMNS
        stream = g.stream if whole else 0
        weights = here * g.unit_size + panel * g.reduction * TILE_COLUMNS
        for p in range(phases.shape[0]):
            phase = phase_at(phases, p)
            count_j = min(j1, phase.cols) - j0
            tiles = (count_j + TILE_ROWS - 1) // TILE_ROWS
            for i in range(i0, min(i1, phase.rows)):
                h = i * g.step_h + phase.offset_h
                first = max(0, (phase.step_h - 1 - h) // phase.step_h)
                last = min(phase.taps_h, (image.height - 1 - h + phase.step_h) // phase.step_h)
                first, count = first * phase.runs, max(0, last - first) * phase.runs
                line = at + (i - i0) * g.step_h * g.row_pitch
                below = start + ((i - i0) * g.spread_h + phase.row) * out_h + phase.col * out_w
                for t in range(tiles):
                    j = t * count_j // tiles
                    accumulate_rows((t + 1) * count_j // tiles - j, blocks, source, line + j * row, row,
                                    table, phase.table + first, count, phase.depth,
                                    packed, weights + (phase.weights + first * phase.depth) * width,
                                    bias, group * g.outputs + k, 0, floor,
                                    result, below + j * g.spread_w * out_w, g.spread_w * out_w, stream)  # fmt: skip
        if not whole:
            rows_out(tile, thread * tile_size, cols * TILE_COLUMNS, TILE_COLUMNS, y, corner, target, rows, cols,
                     min(width, g.outputs - k))  # fmt: skip


@kernel
def product(x, image, w, filter, group_step, w_last, side, taps, y, target, g, phases, table, packed, bias,
            buf, buf_size, tile, tile_size, patch, floor, threads):  # fmt: skip
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
            (x, image, y, target, g, phases, table, packed, bias, first, units,
             buf, buf_size, tile, tile_size, patch, floor),
        )  # fmt: skip


@kernel
def gradient_task(task, thread, x, image, dy, source, g, table, zeros, buf, buf_size, panels, panel_size,
                  sums, patch, floor):  # fmt: skip
    """The sums over one part of the output rows, of one chunk of input and of output channels."""
    part = task % g.num_parts
    task = task // g.num_parts
    k0 = task % g.k_chunks * g.k_chunk
    c0 = task // g.k_chunks % g.c_chunks * g.c_chunk
    group = task // g.k_chunks // g.c_chunks
    channels, outputs = min(g.c_chunk, g.channels - c0), min(g.k_chunk, g.outputs - k0)
    held = x if g.in_place else buf
    to, panel_at = thread * buf_size, thread * panel_size
    patch_at = thread * LANES * LANES
    hollow = 1 if g.images == 1 else 0  # several images have one table of rows, so none is left out
    step = g.step_w * g.pitch
    # While a block is multiplied, the next one's pixels are fetched: in one stretch of memory a line at every step,
    # of pixels that are not used whole some before every tile.
    kept = max(0, (g.kernel_h - 1) * g.dilation_h + 1 - g.step_h) if g.images == 1 else 0
    tiles = (channels * g.kernel_w + TILE_ROWS - 1) // TILE_ROWS * g.kernel_h
    tiles *= (outputs + TILE_COLUMNS - 1) // TILE_COLUMNS
    x_pixels = g.images * g.rows * g.step_h * image.width if image.c == 1 else 0
    dy_pixels = g.images * g.rows * g.out_cols if source.c == 1 else 0
    x_lines = (x_pixels * image.w + LANES - 1) // LANES if image.w == channels else 0
    dy_lines = (dy_pixels * source.w + LANES - 1) // LANES if source.w == outputs else 0
    x_share = 0 if x_lines else (x_pixels + tiles - 1) // tiles
    dy_share = 0 if dy_lines else (dy_pixels + tiles - 1) // tiles
    first_block = part * g.part_blocks
    for block in range(first_block, min(first_block + g.part_blocks, g.blocks)):
        n = block // g.row_blocks * g.images
        images = min(g.images, g.batch - n)
        i0 = block % g.row_blocks * g.rows
        rows = min(g.rows, g.out_rows - i0)
        top = i0 * g.step_h - g.top
        pixels = images * rows * g.out_cols
        for m in range(images):
            if not g.in_place:
                rows_in(x, (n + m) * image.n + (group * g.channels + c0) * image.c, image, channels, channels,
                        top, (rows - 1) * g.step_h + (g.kernel_h - 1) * g.dilation_h + 1,
                        -g.left, (g.out_cols - 1) * g.step_w + (g.kernel_w - 1) * g.dilation_w + 1, hollow,
                        buf, to + m * g.image_pitch, g.row_pitch, g.pitch, patch, patch_at)  # fmt: skip
            for k in range(0, outputs, TILE_COLUMNS):
                width = min(TILE_COLUMNS, (outputs - k + LANES - 1) // LANES * LANES)
                rows_in(dy, (n + m) * source.n + (group * g.outputs + k0 + k) * source.c, source,
                        min(width, outputs - k), width, i0, rows, 0, g.out_cols, 1,
                        panels, panel_at + pixels * k + m * rows * g.out_cols * width, g.out_cols * width, width,
                        patch, patch_at)  # fmt: skip
        at = to
        if g.in_place:
            at = n * image.n + group * g.channels + c0 + top * image.h - g.left * image.w
        start = zeros if block == first_block else sums
        following = block + 1
        next_n, next_i = following // g.row_blocks * g.images, following % g.row_blocks * g.rows
        next_x = next_n * image.n + (next_i * g.step_h - g.top + kept) * image.h + group * g.channels + c0
        next_dy = next_n * source.n + next_i * source.h + group * g.outputs + k0
        calls = 0
        for k in range(0, outputs, TILE_COLUMNS):
            width = min(TILE_COLUMNS, (outputs - k + LANES - 1) // LANES * LANES)
            for r in range(g.kernel_h):
                h = top + r * g.dilation_h
                first, last = 0, images * rows
                if g.images == 1:
                    first = min(rows, max(0, (g.step_h - 1 - h) // g.step_h))
                    last = min(rows, (image.height - 1 - h + g.step_h) // g.step_h)
                count, depth = max(0, last - first), g.out_cols
                if g.even and count == images * rows:
                    count, depth = 1, pixels
                for s in range(1 if g.merged else g.kernel_w):
                    length = channels * g.kernel_w if g.merged else channels
                    tiles = (length + TILE_ROWS - 1) // TILE_ROWS
                    tap = at + r * g.dilation_h * g.row_pitch + s * g.dilation_w * g.pitch
                    below = part * g.sum_part + group * g.sum_group + k0 + k
                    below += ((r * g.kernel_w + s) * g.channels + c0) * g.sum_row
                    for t in range(tiles):
                        c = t * length // tiles
                        place = below + c * g.sum_row
                        ahead, ahead_at, ahead_step = panels, panel_at + pixels * k, 0
                        if calls * pixels < dy_lines:
                            ahead, ahead_at, ahead_step = dy, next_dy + calls * pixels * LANES, LANES
                        elif calls * pixels < dy_lines + x_lines:
                            ahead, ahead_at, ahead_step = x, next_x + (calls * pixels - dy_lines) * LANES, LANES
                        fetch_pixels(x, next_x, image.w, channels, calls * x_share, (calls + 1) * x_share)
                        fetch_pixels(dy, next_dy, source.w, outputs, calls * dy_share, (calls + 1) * dy_share)
                        calls += 1
                        accumulate("columns", (t + 1) * length // tiles - c, width // LANES, held, tap + c,
                                   1, GROUP, step, table, first, count, depth,
                                   panels, panel_at + pixels * k + first * g.out_cols * width,
                                   start, 0 if block == first_block else place,
                                   0 if block == first_block else g.sum_row, floor,
                                   sums, place, g.sum_row, 0, ahead, ahead_at, ahead_step)  # fmt: skip


@kernel
def gradient(x, image, dy, source, dw, filter, group_step, g, table, zeros, buf, buf_size, panels, panel_size,
             sums, patch, floor, threads):  # fmt: skip
    """A whole gradient of the weights."""
    tasks = g.groups * g.c_chunks * g.k_chunks * g.num_parts
    parallel_for(
        gradient_task, tasks, threads,
        (x, image, dy, source, g, table, zeros, buf, buf_size, panels, panel_size, sums, patch, floor),
    )  # fmt: skip
    parallel_for(sum_task, sum_tasks(g), threads, (g, sums, dw, filter, group_step, patch))


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int, relu: bool = False
) -> None:
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`."""
    if depthwise.takes(shape):
        depthwise.forward(x, w, bias, y, shape=shape, threads=threads, relu=relu)
        return
    x, shape = thin(x, shape), thinned(shape)
    multiply(forward_taps(shape), x, w, bias, y, group_step=shape.group_out, swapped=False, threads=threads, relu=relu)


def backward_input(dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dx, the adjoint of `forward` in x."""
    if depthwise.takes(shape):
        depthwise.backward_input(dy, w, dx, shape=shape, threads=threads)
        return
    multiply(adjoint_taps(shape), dy, w, None, dx, group_step=shape.group_out, swapped=True, threads=threads)


def multiply(conv: TapConv, x: Array, w: Array, bias: Array | None, y: Array, *, group_step: int, swapped: bool,
             threads: int, relu: bool = False) -> None:  # fmt: skip
    """One product by taps; `swapped` weights have input channels first."""
    if 0 in y.shape:
        return
    x, w, target = plain(x), plain(w), plain(y)
    conv, image, out = flattened(conv, image_of(x), image_of(target))
    g = blocks_of(
        conv, strides=strides_of(image), stream=streams(target, conv.outputs if conv.groups > 1 else 0), threads=threads
    )
    phases, table = runs_of(conv, pitch=g.pitch, row_pitch=g.row_pitch)
    whole = out.c == 1 and conv.outputs % LANES == 0
    packed, buf, tile, patch, biases = scratch(*sizes(g, threads, whole=whole))
    biases[:] = 0
    if bias is not None:
        biases[: bias.size] = bias
    product(
        flat(x), image, flat(w), filter_of(w, swapped=swapped), group_step * w.strides[0] // 4, flat(w).size - 1,
        conv.kernel[1], places(conv), flat(target), out, g, phases, table, packed, biases, buf, g.block_numbers,
        tile, tile.size // threads, patch, np.float32(0 if relu else -np.inf), threads,
    )  # fmt: skip
    if target is not y:
        y[...] = target


def sizes(g: Blocks, threads: int, *, whole: bool = False) -> tuple[int, int, int, int, int]:
    """Numbers in packed weights, blocks, tiles (unless written in place as a whole), patches and bias."""
    tiles = 0 if whole else threads * g.tile_numbers
    biases = g.groups * g.outputs + TILE_COLUMNS
    return g.packed_numbers, threads * g.block_numbers, tiles, threads * LANES * LANES, biases


def backward_weight(x: Array, dy: Array, dw: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dw, the adjoint of `forward` in w."""
    if 0 in dy.shape:
        dw[...] = 0
        return
    if depthwise.takes(shape):
        depthwise.backward_weight(x, dy, dw, shape=shape, threads=threads)
        return
    x, shape = thin(x, shape), thinned(shape)
    x, dy, target = plain(x), plain(dy), plain(dw)
    image = image_of(x)
    g = parts_of(forward_taps(shape), shape.dilation, strides_of(image))
    table = np.array(
        [m * g.image_pitch + i * g.step_h * g.row_pitch for m in range(g.images) for i in range(g.rows)], np.int64
    )
    buf, panels, sums, patch, zeros = scratch(*_gradient_sizes(g, threads))
    zeros[:] = 0
    gradient(
        flat(x), image, flat(dy), image_of(dy), flat(target), filter_of(target),
        shape.group_out * target.strides[0] // 4, g, table, zeros, buf, g.block_numbers, panels, g.panel_numbers,
        sums, patch, np.float32(-np.inf), threads,
    )  # fmt: skip
    if target is not dw:
        dw[...] = target


def _gradient_sizes(g: Parts, threads: int) -> tuple[int, int, int, int, int]:
    """Numbers in blocks, panels, sums, patches and zeros."""
    panels = threads * g.panel_numbers
    return threads * g.block_numbers, panels, g.num_parts * g.sum_part, threads * LANES * LANES, TILE_COLUMNS


def workspace_bytes(direction: Direction, *, shape: ConvShape, threads: int) -> int:
    """Bytes of scratch memory over all threads, at most."""
    if depthwise.takes(shape):
        return depthwise.workspace_bytes(direction, shape=shape, threads=threads)
    if direction == "weight":
        return 4 * sum(_gradient_sizes(parts_of(forward_taps(thinned(shape)), shape.dilation, None), threads))
    conv = adjoint_taps(shape) if direction == "input" else forward_taps(thinned(shape))
    forms = (conv, *laid_out(conv)) if conv.is_flat else (conv,)
    blocks = [blocks_of(form, strides=None, stream=False, threads=threads) for form in forms]
    return max(4 * sum(sizes(g, threads)) for g in blocks)
