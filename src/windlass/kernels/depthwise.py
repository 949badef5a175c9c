"""Convolutions with many small groups: 16 output channels side by side, each with inputs of its own.

In a depthwise convolution output k sees input channel k alone, so there is no matrix product: 16 channels are a
vector, and a tap multiplies it number by number with 16 weights.  14 neighbouring output pixels of 16 channels
stay in registers over all taps.

With f input and o output channels per group, output k sees the channels k // o · f + i, i < f.  On the way into
cache a pixel is *spread* into f vectors, the i-th with the i-th input of each of the 16 outputs; then it is a
depthwise convolution with f times as many taps.  For f = o = 2, 4, 8 spreading is a shuffle of registers; a matrix
product would multiply 16 / o times as often.  Other depthwise multipliers are spread number by number.

The gradient of the input is the same with the taps of `adjoint_taps`, f and o exchanged.  In that of the weights
the vectors of a row of taps are the accumulators, and pixels are the reduction.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from windlass.kernels.blocking import TASKS_PER_THREAD
from windlass.kernels.emit import flat
from windlass.kernels.jit import LANES
from windlass.kernels.lanes import NUM_PARTS, SHUFFLED, Lanes, gradient, lanes_of, product
from windlass.kernels.taps import (
    Table,
    TapConv,
    adjoint_taps,
    filter_of,
    forward_taps,
    image_of,
    places,
    plain,
    runs_of,
    streams,
)
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[np.float32]


def takes(shape: ConvShape) -> bool:
    """Whether these kernels are the right ones."""
    return shape.is_depthwise or (shape.groups > 1 and shape.group_in == shape.group_out and shape.group_in in SHUFFLED)


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, threads: int, relu: bool = False
) -> None:
    """Writes y = conv(x, w) + bias, and max(y, 0) with `relu`."""
    multiply(forward_taps(shape), x, w, bias, y, group_step=shape.group_out, swapped=False, threads=threads, relu=relu)


def backward_input(dy: Array, w: Array, dx: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dx, the adjoint of `forward` in x."""
    multiply(adjoint_taps(shape), dy, w, None, dx, group_step=shape.group_out, swapped=True, threads=threads)


def multiply(conv: TapConv, x: Array, w: Array, bias: Array | None, y: Array, *, group_step: int, swapped: bool,
             threads: int, relu: bool = False) -> None:  # fmt: skip
    """One product by taps; `swapped` weights have input channels first."""
    if 0 in y.shape:
        return
    x, w, target = plain(x), plain(w), plain(y)
    g = lanes_of(conv, tasks=TASKS_PER_THREAD * threads, stream=streams(target))
    phases, table = runs_of(conv, pitch=g.fan * LANES, row_pitch=g.row_pitch, lanes=LANES)
    packed, tile, buf, patch, biases = scratch(*_sizes(g, threads))
    biases[:] = 0
    if bias is not None:
        biases[: bias.size] = bias
    filter, step = filter_of(w, swapped=swapped), group_step * w.strides[0] // 4
    if conv.outputs == 1:
        filter = filter._replace(k=step)
    product(
        flat(x), image_of(x), flat(w), filter, step, flat(w).size - 1, conv.kernel[1], places(conv), flat(target),
        image_of(target), g, phases, table, packed, biases, buf, tile, g.tile_numbers, patch,
        np.float32(0 if relu else -np.inf), threads,
    )  # fmt: skip
    if target is not y:
        y[...] = target


def _sizes(g: Lanes, threads: int) -> tuple[int, int, int, int, int]:
    """Numbers in packed weights, tiles, blocks, patches and bias."""
    vectors = g.all_vectors * LANES
    return (
        vectors * g.reduction, threads * g.tile_numbers, threads * g.block_numbers + LANES, threads * LANES * LANES,
        vectors,
    )  # fmt: skip


def backward_weight(x: Array, dy: Array, dw: Array, *, shape: ConvShape, threads: int) -> None:
    """Writes dw, the adjoint of `forward` in w."""
    if 0 in dy.shape:
        dw[...] = 0
        return
    x, dy, target = plain(x), plain(dy), plain(dw)
    g, d = _gradient_lanes(shape)
    table: Table = np.arange(g.rows, dtype=np.int64) * g.step_h * g.row_pitch
    buf, rows_of, sums, patch, zeros = scratch(*_gradient_sizes(g, d, threads))
    zeros[:] = 0
    gradient(
        flat(x), image_of(x), flat(dy), image_of(dy), flat(target), filter_of(target), g, d, *shape.kernel,
        *shape.dilation, table, zeros, buf, rows_of, d.block_numbers, sums, patch, np.float32(-np.inf), threads,
    )  # fmt: skip
    if target is not dw:
        dw[...] = target


def _gradient_lanes(shape: ConvShape) -> tuple[Lanes, Lanes]:
    """x, never spread unless by a multiplier, and dy, spread instead: a product of few vectors with few."""
    conv = forward_taps(shape)
    fan = conv.channels
    if fan > 1:
        conv = replace(conv, groups=conv.groups * fan, channels=1, outputs=1)
    g = lanes_of(conv, tasks=NUM_PARTS, out_fan=fan)
    pitch = g.all_cols * fan * LANES
    d = g._replace(channels=g.outputs, fan=fan, share=fan, plain=1, low_w=0, row_pitch=pitch, plane=g.rows * pitch)
    return g._replace(reduction=g.reduction * fan), d


def _gradient_sizes(g: Lanes, d: Lanes, threads: int) -> tuple[int, int, int, int, int]:
    """Numbers in blocks of x, blocks of dy, sums, patches and zeros."""
    sums = g.parts * g.chunks * g.vectors * g.reduction * LANES
    return (
        threads * g.block_numbers + LANES, threads * d.block_numbers + LANES, sums, threads * LANES * LANES,
        d.fan * LANES,
    )  # fmt: skip


def workspace_bytes(direction: Direction, *, shape: ConvShape, threads: int) -> int:
    """Bytes of scratch memory over all threads, at most."""
    if direction == "weight":
        return 4 * sum(_gradient_sizes(*_gradient_lanes(shape), threads))
    conv = adjoint_taps(shape) if direction == "input" else forward_taps(shape)
    return 4 * sum(_sizes(lanes_of(conv, tasks=TASKS_PER_THREAD * threads), threads))
