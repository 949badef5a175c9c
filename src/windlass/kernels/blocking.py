"""How a convolution by taps is cut into tasks whose data stay in a core's cache.

A task of a product (forward, gradient of the input) has a block of pixels and a *unit* of output channels: the
panels of TILE_COLUMNS outputs that share one block's input.  A task of the gradient of the weights has a chunk of
input and of output channels, and a part of the output rows.  All of it depends on the shape alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.pixels import add, weights_in, weights_out
from windlass.kernels.taps import PhaseRow, TapConv

NUM_TASKS = 32
"""Tasks to aim at: enough for 16 threads."""

BLOCK_BYTES = 384 << 10
"""Input of a block: with one panel of weights it fits the second cache."""

WEIGHT_BYTES = 32 << 20
"""Packed weights that are held at a time."""

SUM_BYTES = 32 << 20
"""Partial sums of the gradient of the weights."""

FEW_PIXELS = 8 * TILE_ROWS
"""Pixels of a block below which reading its weights is no longer cheap."""


class Blocks(NamedTuple):
    """A product's sizes and how it is cut, in elements.

    Attributes:
        batch, groups, channels, outputs: as in `TapConv`; reduction is rows of packed weights of a panel.
        step_h, step_w, spread_h, spread_w: as in `TapConv`.
        all_rows, all_cols: values of i and j.
        images, rows, cols: images, i and j of a block; image_blocks, row_blocks, col_blocks: how many there are.
        low_h, low_w: lowest offset of a tap; more_h, more_w: pixels from there to the highest.
        in_place: whether A is read from the input itself; otherwise from a copy with zeros around.
        pitch, row_pitch, image_pitch: strides of what A is read from.
        unit_panels, group_units, units: panels of a unit, units of a group and of all.
        units_at_once, unit_size: units packed at a time, and numbers of each.
        stream: whether the output is written past the caches.
    """

    batch: int
    groups: int
    channels: int
    outputs: int
    reduction: int
    step_h: int
    step_w: int
    spread_h: int
    spread_w: int
    all_rows: int
    all_cols: int
    images: int
    rows: int
    cols: int
    image_blocks: int
    row_blocks: int
    col_blocks: int
    low_h: int
    low_w: int
    more_h: int
    more_w: int
    in_place: int
    pitch: int
    row_pitch: int
    image_pitch: int
    unit_panels: int
    group_units: int
    units: int
    units_at_once: int
    unit_size: int
    stream: int

    @property
    def block_numbers(self) -> int:
        """Numbers in a block's input, with the room that copying needs."""
        return 0 if self.in_place else self.images * self.image_pitch + LANES

    @property
    def tile_numbers(self) -> int:
        """Numbers in a block's output of one panel."""
        pixels = self.images * self.rows * self.cols * self.spread_h * self.spread_w
        return pixels * TILE_COLUMNS

    @property
    def packed_numbers(self) -> int:
        """Numbers in the packed weights that are held at a time."""
        return self.units_at_once * self.unit_size


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def pitch_of(channels: int, step: int) -> int:
    """Numbers from pixel to pixel: a tile's rows, `step` pixels apart, must not share a cache's sets.

    64 sets of lines: at 16 lines' distance 14 rows fall on four sets, beyond the ways of some caches.
    """
    if channels % LANES == 0 and channels // LANES * step % 16 == 0:
        return channels + LANES
    return channels


def blocks_of(conv: TapConv, *, strides: tuple[int, int, int] | None, images: bool, stream: bool) -> Blocks:
    """Cuts a product.

    Args:
        conv: the convolution.
        strides: pixel, row and image stride of the input where it may be read in place, else None.
        images: whether a block may hold several images.
        stream: whether the output is written past the caches.
    """
    (low_h, high_h), (low_w, high_w) = conv.reach
    more_h, more_w = high_h - low_h + 1, high_w - low_w + 1
    inside = low_w >= 0 and (conv.cols - 1) * conv.step[1] + high_w < conv.width
    pitch = pitch_of(conv.channels, conv.step[1])
    in_place = strides is not None and inside and pitch_of(strides[0], conv.step[1]) == strides[0]

    def size(num_images: int, rows: int, cols: int) -> int:
        rows_in, cols_in = (rows - 1) * conv.step[0] + more_h, (cols - 1) * conv.step[1] + more_w
        return num_images * rows_in * cols_in * pitch * 4

    rows, cols, num_images = conv.rows, conv.cols, 1
    if size(1, 1, cols) > BLOCK_BYTES:
        cols = max(FEW_PIXELS, cols * BLOCK_BYTES // size(1, 1, cols)) // TILE_ROWS * TILE_ROWS
        cols = min(conv.cols, max(TILE_ROWS, cols))
    enough = _ceil(NUM_TASKS, max(1, conv.batch * conv.groups))
    while rows > 1 and (
        size(1, rows, cols) > BLOCK_BYTES
        or (_ceil(conv.rows, rows) * _ceil(conv.cols, cols) < enough and rows * cols > FEW_PIXELS)
    ):
        rows -= 1
    while rows == 1 and _ceil(conv.rows, rows) * _ceil(conv.cols, cols) < enough and cols > FEW_PIXELS:
        cols = max(FEW_PIXELS, _ceil(conv.cols, _ceil(conv.cols, cols) + 1))
        cols = _ceil(cols, TILE_ROWS) * TILE_ROWS
    rows = _ceil(conv.rows, _ceil(conv.rows, rows))
    if images and rows == conv.rows and cols == conv.cols:
        while (
            num_images < conv.batch
            and num_images * rows * cols < FEW_PIXELS
            and size(num_images + 1, rows, cols) <= BLOCK_BYTES
        ):
            num_images += 1
    rows_in, cols_in = (rows - 1) * conv.step[0] + more_h, (cols - 1) * conv.step[1] + more_w
    if in_place and strides is not None:
        pitch, row_pitch, image_pitch = strides
    else:
        row_pitch = cols_in * pitch
        image_pitch = rows_in * row_pitch
    blocks = _ceil(conv.batch, num_images) * _ceil(conv.rows, rows) * _ceil(conv.cols, cols)
    reduction = sum(p.down.count * p.across.count for p in conv.phases) * conv.channels
    panels = _ceil(conv.outputs, TILE_COLUMNS)
    wanted = _ceil(NUM_TASKS, max(1, blocks * conv.groups))
    unit_panels = max(1, min(_ceil(panels, wanted), WEIGHT_BYTES // max(1, reduction * TILE_COLUMNS * 4)))
    unit_size = max(reduction, 1) * min(unit_panels * TILE_COLUMNS, _ceil(conv.outputs, LANES) * LANES)
    group_units = _ceil(panels, unit_panels)
    units = conv.groups * group_units
    return Blocks(
        conv.batch, conv.groups, conv.channels, conv.outputs, reduction, *conv.step, *conv.spread, conv.rows, conv.cols,
        num_images, rows, cols, _ceil(conv.batch, num_images), _ceil(conv.rows, rows), _ceil(conv.cols, cols),
        low_h, low_w, more_h, more_w, int(in_place), pitch, row_pitch, image_pitch, unit_panels, group_units, units,
        max(1, min(units, WEIGHT_BYTES // (unit_size * 4))), unit_size, int(stream),
    )  # fmt: skip


@kernel
def phase_at(phases: Any, p: int) -> PhaseRow:
    """Row p of the table of phases."""
    return PhaseRow(
        phases[p, 0], phases[p, 1], phases[p, 2], phases[p, 3], phases[p, 4], phases[p, 5], phases[p, 6],
        phases[p, 7], phases[p, 8], phases[p, 9], phases[p, 10],
    )  # fmt: skip


PACK_CHANNELS = 4 * LANES
"""Input channels that one task packs."""


@kernel
def pack_task(task, thread, w, filter, group_step, w_last, side, places, g, first_unit, packed, patch):  # type: ignore[no-untyped-def]
    """packed[unit][panel][place · channels + c][TILE_COLUMNS or fewer] = the weights of 64 input channels."""
    chunks = (g.channels + PACK_CHANNELS - 1) // PACK_CHANNELS
    c = task % chunks * PACK_CHANNELS
    panel = task // chunks % g.unit_panels
    here = task // chunks // g.unit_panels
    unit = first_unit + here
    k = (unit % g.group_units * g.unit_panels + panel) * TILE_COLUMNS
    width = min(TILE_COLUMNS, (g.outputs - k + LANES - 1) // LANES * LANES)
    to = here * g.unit_size + panel * g.reduction * TILE_COLUMNS + c * width
    start = filter.at + unit // g.group_units * group_step + c * filter.c
    for half in range(0, width, LANES):
        weights_in(w, start + (k + half) * filter.k, filter, side, places.size, g.outputs - k - half,
                   min(PACK_CHANNELS, g.channels - c), places, packed, to + half, width, g.channels,
                   patch, thread * LANES * LANES, w_last)  # fmt: skip


@kernel
def pack_tasks(g: Blocks, units: int) -> int:
    """Tasks of packing `units` units."""
    return units * g.unit_panels * ((g.channels + PACK_CHANNELS - 1) // PACK_CHANNELS)


class Parts(NamedTuple):
    """The sizes of a gradient of the weights and how it is cut, in elements.

    Attributes:
        batch, groups, channels, outputs: of x and dy, channels per group.
        kernel_h, kernel_w, step_h, step_w, dilation_h, dilation_w, top, left: of the convolution.
        out_rows, out_cols: of dy.
        images, rows: of a block; row_blocks, blocks: blocks of an image, and of all.
        num_parts, part_blocks: parts, and blocks of each.
        c_chunk, c_chunks, k_chunk, k_chunks: chunks of input and output channels.
        in_place, pitch, row_pitch, image_pitch: as in `Blocks`.
        merged: whether a row of taps is one stretch of memory.
        sum_row, sum_group, sum_part: strides of the sums [part][group][tap · channels + c][k].
    """

    batch: int
    groups: int
    channels: int
    outputs: int
    kernel_h: int
    kernel_w: int
    step_h: int
    step_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    out_rows: int
    out_cols: int
    images: int
    rows: int
    row_blocks: int
    blocks: int
    num_parts: int
    part_blocks: int
    c_chunk: int
    c_chunks: int
    k_chunk: int
    k_chunks: int
    in_place: int
    pitch: int
    row_pitch: int
    image_pitch: int
    merged: int
    sum_row: int
    sum_group: int
    sum_part: int

    @property
    def tasks(self) -> int:
        """Tasks in all."""
        return self.groups * self.c_chunks * self.k_chunks * self.num_parts

    @property
    def pixels(self) -> int:
        """Output pixels of a block."""
        return self.images * self.rows * self.out_cols

    @property
    def block_numbers(self) -> int:
        """Numbers in a block's input, with the room that copying needs."""
        return 0 if self.in_place else self.images * self.image_pitch + LANES

    @property
    def panel_numbers(self) -> int:
        """Numbers in a block's dy."""
        return self.pixels * _ceil(self.k_chunk, LANES) * LANES + LANES


CHUNK_BYTES = 320 << 10
"""Sums of one task: with a block of x and dy they fit the second cache."""

PART_PIXELS = 16 * TILE_ROWS
"""Output pixels of a block to aim at; a panel of their dy fits the first cache."""


@cache
def parts_of(conv: TapConv, dilation: tuple[int, int], strides: tuple[int, int, int] | None) -> Parts:
    """Cuts the gradient of the weights of a forward convolution; `strides` as in `blocks_of`."""
    (low_h, high_h), (low_w, high_w) = conv.reach
    inside = low_w >= 0 and (conv.cols - 1) * conv.step[1] + high_w < conv.width
    rows = max(1, min(conv.rows, PART_PIXELS // conv.cols))
    rows = _ceil(conv.rows, _ceil(conv.rows, rows))
    images = max(1, min(conv.batch, PART_PIXELS // (rows * conv.cols))) if rows == conv.rows else 1
    in_place = strides is not None and inside and images == 1
    c_chunk = min(conv.channels, 128 if conv.taps > 1 else 256)
    c_chunk = _ceil(_ceil(conv.channels, _ceil(conv.channels, c_chunk)), LANES) * LANES
    c_chunk = min(conv.channels, c_chunk)
    k_chunk = max(TILE_COLUMNS, CHUNK_BYTES // (4 * conv.taps * c_chunk) // TILE_COLUMNS * TILE_COLUMNS)
    k_chunk = min(k_chunk, _ceil(conv.outputs, TILE_COLUMNS) * TILE_COLUMNS)
    c_chunks, k_chunks = _ceil(conv.channels, c_chunk), _ceil(conv.outputs, k_chunk)
    rows_in, cols_in = (rows - 1) * conv.step[0] + high_h - low_h + 1, (conv.cols - 1) * conv.step[1] + high_w - low_w + 1
    if in_place and strides is not None:
        pitch, row_pitch, image_pitch = strides
    else:
        pitch = c_chunk
        row_pitch = cols_in * pitch
        image_pitch = rows_in * row_pitch
    row_blocks = _ceil(conv.rows, rows)
    blocks = _ceil(conv.batch, images) * row_blocks
    sum_row = (_ceil(conv.outputs, LANES) | 1) * LANES if conv.outputs > TILE_COLUMNS else TILE_COLUMNS
    sum_group = conv.taps * conv.channels * sum_row
    sum_part = conv.groups * sum_group
    parts = min(blocks, _ceil(NUM_TASKS, conv.groups * c_chunks * k_chunks), max(1, SUM_BYTES // (4 * sum_part)))
    part_blocks = _ceil(blocks, max(1, parts))
    return Parts(
        conv.batch, conv.groups, conv.channels, conv.outputs, *conv.kernel, *conv.step, *dilation, -low_h, -low_w,
        conv.rows, conv.cols, images, rows, row_blocks, blocks, _ceil(blocks, part_blocks), part_blocks,
        c_chunk, c_chunks, k_chunk, k_chunks, int(in_place), pitch, row_pitch, image_pitch,
        int(pitch == conv.channels and c_chunks == 1 and dilation[1] == 1), sum_row, sum_group, sum_part,
    )  # fmt: skip


SUM_CHANNELS = LANES
"""Input channels of a task that adds the parts."""


@kernel
def sum_task(task, thread, g, sums, dw, filter, group_step, patch):  # type: ignore[no-untyped-def]
    """dw = the parts' sums, added in order, of some input channels of a group."""
    chunks = (g.channels + SUM_CHANNELS - 1) // SUM_CHANNELS
    c = task % chunks * SUM_CHANNELS
    group = task // chunks
    channels = min(SUM_CHANNELS, g.channels - c)
    taps = g.kernel_h * g.kernel_w
    outputs = (g.outputs + LANES - 1) // LANES * LANES
    at = group * g.sum_group + c * g.sum_row
    for t in range(taps):
        for i in range(channels):
            base = at + (t * g.channels + i) * g.sum_row
            for part in range(1, g.num_parts):
                for k in range(0, outputs, LANES):
                    add(sums, base + part * g.sum_part + k, sums, base + k)
    start = filter.at + group * group_step + c * filter.c
    for k in range(0, outputs, LANES):
        weights_out(sums, at + k, g.sum_row, g.channels, dw, start + k * filter.k, filter, g.kernel_w, taps,
                    g.outputs - k, channels, patch, thread * LANES * LANES)  # fmt: skip


@kernel
def sum_tasks(g: Parts) -> int:
    """Tasks of `sum_task`."""
    return g.groups * ((g.channels + SUM_CHANNELS - 1) // SUM_CHANNELS)


Array = npt.NDArray[np.float32]
