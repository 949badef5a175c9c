"""How a product by taps (forward, gradient of the input) is cut into tasks whose data stay in a core's cache.

A task has a block of pixels and a *unit* of output channels: the panels of TILE_COLUMNS outputs that share one
block's input.  Weights are packed panel by panel, in the order in which a tile needs them.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.pixels import weights_in
from windlass.kernels.taps import PhaseRow, TapConv

TASKS_PER_THREAD = 4
"""Tasks of a product to aim at.  No sum is divided between tasks, so their number may depend on the threads."""

BLOCK_BYTES = 384 << 10
"""Input of a block: with one panel of weights it fits the second cache."""

WEIGHT_BYTES = 32 << 20
"""Packed weights that are held at a time."""

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


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def _even(count: int, most: int) -> int:
    """`count` pixels in nearly equal blocks of at most `most`, or of a tile, in whole tiles."""
    each = ceil_div(count, ceil_div(count, max(most, TILE_ROWS)))
    return min(count, ceil_div(each, TILE_ROWS) * TILE_ROWS)


def pitch_of(channels: int, step: int) -> int:
    """Numbers from pixel to pixel: a tile's rows, `step` pixels apart, must not share a cache's sets.

    64 sets of lines: at 16 lines' distance 14 rows fall on four sets, beyond the ways of some caches.
    """
    if channels % LANES == 0 and channels // LANES * step % 16 == 0:
        return channels + LANES
    return channels


@cache
def blocks_of(
    conv: TapConv, *, strides: tuple[int, int, int] | None, stream: bool, threads: int, patches: bool = False
) -> Blocks:
    """Cuts a product.

    Args:
        conv: the convolution.
        strides: pixel, row and image stride of the input where it may be read in place, else None.
        stream: whether the output is written past the caches.
        threads: that will work.
        patches: whether all taps of a block's pixels are held, of several images if they are small.
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
    tasks = TASKS_PER_THREAD * threads
    enough = ceil_div(tasks, max(1, conv.batch * conv.groups))
    if size(1, 1, cols) > BLOCK_BYTES or (patches and cols > FEW_PIXELS):
        cols = _even(cols, max(FEW_PIXELS // 2, 0 if patches else cols * BLOCK_BYTES // size(1, 1, cols)))
    while rows > 1 and (
        size(1, rows, cols) > BLOCK_BYTES
        or (patches and rows * cols > FEW_PIXELS)
        or (ceil_div(conv.rows, rows) * ceil_div(conv.cols, cols) < enough and rows * cols > FEW_PIXELS)
    ):
        rows -= 1
    if rows == conv.rows == 1 and ceil_div(conv.cols, cols) < enough:
        cols = _even(conv.cols, max(FEW_PIXELS, ceil_div(conv.cols, enough)))
    rows = ceil_div(conv.rows, ceil_div(conv.rows, rows))
    if patches and rows == conv.rows and cols == conv.cols:
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
    blocks = ceil_div(conv.batch, num_images) * ceil_div(conv.rows, rows) * ceil_div(conv.cols, cols)
    reduction = sum(p.down.num * p.across.num for p in conv.phases) * conv.channels
    panels = ceil_div(conv.outputs, TILE_COLUMNS)
    wanted = ceil_div(tasks, max(1, blocks * conv.groups))
    unit_panels = max(1, min(ceil_div(panels, wanted), WEIGHT_BYTES // max(1, reduction * TILE_COLUMNS * 4)))
    unit_size = max(reduction, 1) * min(unit_panels * TILE_COLUMNS, ceil_div(conv.outputs, LANES) * LANES)
    group_units = ceil_div(panels, unit_panels)
    units = conv.groups * group_units
    return Blocks(
        conv.batch, conv.groups, conv.channels, conv.outputs, reduction, *conv.step, *conv.spread, conv.rows, conv.cols,
        num_images, rows, cols, ceil_div(conv.batch, num_images), ceil_div(conv.rows, rows), ceil_div(conv.cols, cols),
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
def pack_task(task, thread, w, filter, group_step, w_last, side, places, g, first_unit, packed, patch):
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
