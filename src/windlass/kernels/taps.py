"""Convolutions by taps: one definition for the forward pass and for the gradient of the input.

    out[n, i·spread + phase, :] = Σ_tap in[n, i·step + offset(tap), :] · W[tap],   zero outside the image

Down and across alike.  Forward, there is one phase, the step is the stride and tap r's offset is r·dilation - pad.
For the gradient of the input the step is 1 and the spread is the stride: row h = i·stride + phase of dx is met by
those taps r for which h + pad - r·dilation is a multiple of the stride, at row (h + pad - r·dilation) / stride of
dy.  So there is a phase per residue with its own few taps, and no work on zeros between pixels; a phase without
taps is zero.  Which taps those are is an arithmetic progression.

Pure arithmetic on sizes; the kernels are in `windlass.kernels.direct`, `im2col` and `depthwise`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from windlass.kernels.strips import Filter, Image
from windlass.plan.convolution import ConvShape, Pair

Array = npt.NDArray[np.float32]
Table = npt.NDArray[np.int64]


class Taps(NamedTuple):
    """Taps of one phase along one axis, by growing offset.

    Attributes:
        num: how many.
        offset, step: offset of the first, and from one to the next.
        first, turn: place in the filter of the first, and from one to the next.
    """

    num: int
    offset: int = 0
    step: int = 1
    first: int = 0
    turn: int = 1

    @property
    def last(self) -> int:
        """The largest offset."""
        return self.offset + (self.num - 1) * self.step


@dataclass(frozen=True, slots=True)
class Phase:
    """The output pixels row + i·spread, col + j·spread, with their taps."""

    row: int
    col: int
    down: Taps
    across: Taps


@dataclass(frozen=True, slots=True)
class TapConv:
    """A convolution by taps: `channels` to `outputs` channels in each of `groups` groups.

    Attributes:
        height, width: of the input; out_height, out_width: of the output.
        kernel: all taps down and across.
        step: input pixels between neighbouring i, j.
        spread: output pixels between them.
        phases: those that have output pixels.
    """

    batch: int
    groups: int
    channels: int
    outputs: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: Pair
    step: Pair
    spread: Pair
    phases: tuple[Phase, ...]

    @property
    def taps(self) -> int:
        """Taps of the filter."""
        return self.kernel[0] * self.kernel[1]

    @property
    def rows(self) -> int:
        """Values of i."""
        return -(-self.out_height // self.spread[0])

    @property
    def cols(self) -> int:
        """Values of j."""
        return -(-self.out_width // self.spread[1])

    @property
    def reach(self) -> tuple[Pair, Pair]:
        """(lowest, highest) offset down and across, over all phases; (0, 0) without taps."""
        down = [phase.down for phase in self.phases if phase.down.num]
        across = [phase.across for phase in self.phases if phase.across.num]
        return _reach(down), _reach(across)

    @property
    def is_flat(self) -> bool:
        """Whether an output pixel needs the input pixel at the same place and no other."""
        alone = self.step == self.spread == self.kernel == (1, 1)
        return alone and all(p.down.offset == p.across.offset == 0 for p in self.phases)


def _reach(taps: list[Taps]) -> Pair:
    return (min(t.offset for t in taps), max(t.last for t in taps)) if taps else (0, 0)


@cache
def forward_taps(shape: ConvShape) -> TapConv:
    """The convolution itself."""
    (r, s), (down, across) = shape.kernel, shape.dilation
    top, _, left, _ = shape.padding
    phase = Phase(0, 0, Taps(r, -top, down), Taps(s, -left, across))
    return TapConv(
        shape.batch, shape.groups, shape.group_in, shape.group_out, shape.height, shape.width,
        shape.out_height, shape.out_width, shape.kernel, shape.stride, (1, 1), (phase,),
    )  # fmt: skip


@cache
def adjoint_taps(shape: ConvShape) -> TapConv:
    """The gradient of the input: dy to dx."""
    top, _, left, _ = shape.padding
    down = [_residue(shape.kernel[0], shape.stride[0], shape.dilation[0], top, p) for p in range(shape.stride[0])]
    across = [_residue(shape.kernel[1], shape.stride[1], shape.dilation[1], left, p) for p in range(shape.stride[1])]
    phases = tuple(
        Phase(p, q, down[p], across[q])
        for p in range(min(shape.stride[0], shape.height))
        for q in range(min(shape.stride[1], shape.width))
    )
    return TapConv(
        shape.batch, shape.groups, shape.group_out, shape.group_in, shape.out_height, shape.out_width,
        shape.height, shape.width, shape.kernel, (1, 1), shape.stride, phases,
    )  # fmt: skip


def _residue(kernel: int, stride: int, dilation: int, pad: int, phase: int) -> Taps:
    """The taps that meet rows of one phase."""
    met = [r for r in reversed(range(kernel)) if (phase + pad - r * dilation) % stride == 0]
    offsets = [(phase + pad - r * dilation) // stride for r in met]
    if not met:
        return Taps(0)
    if len(met) == 1:
        return Taps(1, offsets[0], 1, met[0], 1)
    return Taps(len(met), offsets[0], offsets[1] - offsets[0], met[0], met[1] - met[0])


def places(conv: TapConv) -> Table:
    """Where each tap (row by row of the filter) stands in the packed weights, -1 where no pixel needs it.

    Packed are phase by phase the taps down and across by growing offset.
    """
    table = np.full(conv.taps, -1, np.int64)
    place = 0
    for phase in conv.phases:
        for i in range(phase.down.num):
            for j in range(phase.across.num):
                r = phase.down.first + i * phase.down.turn
                s = phase.across.first + j * phase.across.turn
                table[r * conv.kernel[1] + s] = place
                place += 1
    return table


class PhaseRow(NamedTuple):
    """What a kernel knows of a phase: a row of an integer table.

    Attributes:
        row, col: its first output pixel; rows, cols: its numbers of i and j.
        taps_h, offset_h, step_h: the taps down.
        runs, depth: runs of a row of taps, steps of a run.
        table: the phase's first run in the table of offsets.
        weights: rows of packed weights before its own.
    """

    row: int
    col: int
    rows: int
    cols: int
    taps_h: int
    offset_h: int
    step_h: int
    runs: int
    depth: int
    table: int
    weights: int


def runs_of(conv: TapConv, *, pitch: int, row_pitch: int, lanes: int = 1, merge: bool = True) -> tuple[Table, Table]:
    """The phases as `PhaseRow`s, and the offsets of their runs from the pixel (i·step, j·step), in elements.

    A row of taps is one run where its pixels lie side by side, else a run per tap.  A number of the reduction is
    `lanes` elements; a pixel of one number has its taps in one run even if they lie apart.  Without `merge` every tap
    is a run.
    """
    rows: list[PhaseRow] = []
    offsets: list[int] = []
    weights = 0
    for phase in conv.phases:
        down, across = phase.down, phase.across
        count = -(-(conv.out_height - phase.row) // conv.spread[0])
        merged = merge and pitch == conv.channels * lanes and across.num > 0
        merged = merged and (across.step == 1 or conv.channels < lanes == pitch)
        runs = 1 if merged else across.num
        depth = conv.channels * (across.num if merged else 1)
        taps = down.num if across.num else 0
        rows.append(
            PhaseRow(phase.row, phase.col, count, -(-(conv.out_width - phase.col) // conv.spread[1]),
                     taps, down.offset, down.step, runs, depth, len(offsets), weights)
        )  # fmt: skip
        for i in range(taps):
            for j in range(runs):
                offsets.append((down.offset + i * down.step) * row_pitch + (across.offset + j * across.step) * pitch)
        weights += taps * across.num * conv.channels
    return np.array(rows, np.int64).reshape(-1, len(PhaseRow._fields)), np.array([*offsets, 0], np.int64)


def image_of(array: Array) -> Image:
    """Strides in elements; those of axes of one pixel or channel as if the axis were dense."""
    n, c, h, w = (stride // 4 for stride in array.strides)
    _, channels, height, width = array.shape
    if channels == 1:
        c = 1
    if width == 1:
        w = channels if c == 1 else 1
    if height == 1:
        h = width * w
    if array.shape[0] == 1:
        n = height * h
    return Image(n, c, h, w, height, width, 0, 0)


def strides_of(image: Image) -> tuple[int, int, int] | None:
    """Pixel, row and image stride where channels lie side by side."""
    return (image.w, image.h, image.n) if image.c == 1 else None


def filter_of(w: Array, *, swapped: bool = False) -> Filter:
    """Strides in elements of weights, input and output channels exchanged if `swapped`."""
    k, c, r, s = (stride // 4 for stride in w.strides)
    if w.shape[3] == 1:
        s = 1
    if w.shape[2] == 1:
        r = w.shape[3] * s
    if w.shape[1] == 1:
        c = w.shape[2] * r
    return Filter(0, c, k, r, s) if swapped else Filter(0, k, c, r, s)


def plain(array: Array) -> Array:
    """The array, or a copy where a kernel cannot read it: strides negative or no whole numbers, memory read-only."""
    if array.flags.writeable and all(stride >= 0 and stride % 4 == 0 for stride in array.strides):
        return array
    return array.copy(order="C")


def flattened(conv: TapConv, image: Image, out: Image) -> tuple[TapConv, Image, Image]:
    """The same product with rows, and images, laid end to end, where pixels stand alone and nothing lies between."""
    if not conv.is_flat or image.h != image.width * image.w or out.h != out.width * out.w:
        return conv, image, out
    pixels = image.height * image.width
    image, out = (i._replace(h=pixels * i.w, height=1, width=pixels) for i in (image, out))
    conv, joined = laid_out(conv)
    if image.n != image.h or out.n != out.h:
        return conv, image, out
    pixels *= conv.batch
    image, out = (i._replace(n=pixels * i.w, h=pixels * i.w, width=pixels) for i in (image, out))
    return joined, image, out


def laid_out(conv: TapConv) -> tuple[TapConv, TapConv]:
    """A flat convolution with images of one row, and with one image of one row."""
    pixels = conv.height * conv.width
    rows = replace(conv, height=1, width=pixels, out_height=1, out_width=pixels)
    pixels *= conv.batch
    return rows, replace(rows, batch=1, width=pixels, out_width=pixels)


def thinned(shape: ConvShape) -> ConvShape:
    """A 1×1 convolution without padding needs only every stride-th pixel: the same with stride 1 on those."""
    if shape.kernel != (1, 1) or any(shape.padding):
        return shape
    return replace(shape, height=shape.out_height, width=shape.out_width, stride=(1, 1))


def thin(x: Array, shape: ConvShape) -> Array:
    """Of `x` the pixels that `thinned(shape)` is about."""
    if thinned(shape) is shape:
        return x
    return x[:, :, :: shape.stride[0], :: shape.stride[1]][:, :, : shape.out_height, : shape.out_width]


STREAM_BYTES = 32 << 20
"""Outputs from this size on are written past the caches, which they would only sweep."""


def streams(y: Array, group: int = 0) -> bool:
    """Whether `y` is large, and every block of 16 channels of a pixel a cache line of its own.

    Blocks start at the first channel of every group of `group` channels; 0: there are no groups.
    """
    strides = (y.strides[0], y.strides[2], y.strides[3], y.ctypes.data, 4 * group)
    return y.nbytes >= STREAM_BYTES and y.strides[1] == 4 and not any(stride % 64 for stride in strides)
