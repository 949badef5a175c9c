"""How a gradient of the weights is cut into tasks, and how their sums become one.

A task has a chunk of input and of output channels, and a part of the output rows.  The parts depend on the shape
alone and their sums are added in order, so the bits do not depend on the threads.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from windlass.kernels.blocking import ceil_div, pitch_of
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.pixels import add, weights_out
from windlass.kernels.taps import TapConv

CHUNK_BYTES = 160 << 10
"""Sums of one task: with a block of x and dy they fit the second cache."""

NUM_PARTS = 16
"""Tasks to aim at by dividing the pixels: every part has sums of its own, which must be added."""

PART_PIXELS = 16 * TILE_ROWS
"""Output pixels of a block to aim at; a panel of their dy fits the first cache."""

SUM_BYTES = 32 << 20
"""All parts' sums."""

SUM_CHANNELS = LANES
"""Input channels of a task that adds the parts."""


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
        even: whether the pixels of a whole block are evenly spaced.
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
    even: int
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
        return self.pixels * ceil_div(self.k_chunk, LANES) * LANES + LANES


@cache
def parts_of(conv: TapConv, dilation: tuple[int, int], strides: tuple[int, int, int] | None) -> Parts:
    """Cuts the gradient of the weights of a forward convolution; `strides` as in `blocks_of`."""
    (low_h, high_h), (low_w, high_w) = conv.reach
    inside = low_w >= 0 and (conv.cols - 1) * conv.step[1] + high_w < conv.width
    rows = max(1, min(conv.rows, PART_PIXELS // conv.cols))
    rows = ceil_div(conv.rows, ceil_div(conv.rows, rows))
    images = max(1, min(conv.batch, PART_PIXELS // (rows * conv.cols))) if rows == conv.rows else 1
    in_place = strides is not None and inside and images == 1 and pitch_of(strides[0], conv.step[1]) == strides[0]
    c_chunk = min(conv.channels, 128 if conv.taps > 1 else 256)
    c_chunk = ceil_div(ceil_div(conv.channels, ceil_div(conv.channels, c_chunk)), LANES) * LANES
    c_chunk = min(conv.channels, c_chunk)
    k_chunk = max(TILE_COLUMNS, CHUNK_BYTES // (4 * conv.taps * c_chunk) // TILE_COLUMNS * TILE_COLUMNS)
    k_chunk = min(k_chunk, ceil_div(conv.outputs, TILE_COLUMNS) * TILE_COLUMNS)
    c_chunks, k_chunks = ceil_div(conv.channels, c_chunk), ceil_div(conv.outputs, k_chunk)
    rows_in = (rows - 1) * conv.step[0] + high_h - low_h + 1
    cols_in = (conv.cols - 1) * conv.step[1] + high_w - low_w + 1
    if in_place and strides is not None:
        pitch, row_pitch, image_pitch = strides
    else:
        pitch = pitch_of(c_chunk, conv.step[1])
        row_pitch = cols_in * pitch
        image_pitch = rows_in * row_pitch
    row_blocks = ceil_div(conv.rows, rows)
    blocks = ceil_div(conv.batch, images) * row_blocks
    even = conv.is_flat and row_pitch == conv.cols * pitch and (images == 1 or image_pitch == rows * row_pitch)
    sum_row = (ceil_div(conv.outputs, LANES) | 1) * LANES if conv.outputs > TILE_COLUMNS else TILE_COLUMNS
    sum_group = conv.taps * conv.channels * sum_row
    sum_part = conv.groups * sum_group
    parts = min(blocks, ceil_div(NUM_PARTS, conv.groups * c_chunks * k_chunks), max(1, SUM_BYTES // (4 * sum_part)))
    part_blocks = ceil_div(blocks, max(1, parts))
    return Parts(
        conv.batch, conv.groups, conv.channels, conv.outputs, *conv.kernel, *conv.step, *dilation, -low_h, -low_w,
        conv.rows, conv.cols, images, rows, row_blocks, blocks, ceil_div(blocks, part_blocks), part_blocks,
        c_chunk, c_chunks, k_chunk, k_chunks, int(in_place), pitch, row_pitch, image_pitch,
        int(pitch == conv.channels and c_chunks == 1 and dilation[1] == 1), int(even), sum_row, sum_group, sum_part,
    )  # fmt: skip


@kernel
def sum_task(task, thread, g, sums, dw, filter, group_step, patch):
    """Writes dw, the parts' sums added in order, of some input channels of a group."""
    chunks = (g.channels + SUM_CHANNELS - 1) // SUM_CHANNELS
    c = task % chunks * SUM_CHANNELS
    group = task // chunks
    channels = min(SUM_CHANNELS, g.channels - c)
    taps = g.kernel_h * g.kernel_w
    outputs = (g.outputs + LANES - 1) // LANES * LANES
    at = group * g.sum_group + c * g.sum_row
    for t in range(taps):
        for part in range(1, g.num_parts):
            for i in range(channels):
                base = at + (t * g.channels + i) * g.sum_row
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
