"""What a convolution costs by each algorithm: its operations, its bytes, and the seconds they should take.

A roofline: the time is that of the operations or that of the bytes, whichever is longer, plus what a call costs.
Operations run at a share of the machine's peak that was measured once per family (docs/convolution.md, Cost
model).  The model says which algorithms are worth measuring; it need not be exact, only seldom wrong by half.

Pure: no clock, no tensor, no kernel.

Legend as in `plan.convolution`; m × m Winograd output tile, α = m + r - 1; N × N Fourier tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from windlass.plan.convolution import CONV_ALGORITHMS, ConvAlgorithm, ConvShape, Direction

Layout = Literal["contiguous", "channels_last"]
"""Order of a tensor's dimensions in memory, NCHW or NHWC, by the name it has in the lever ``layout``."""

FLOAT_BYTES = 4
LANES = 16
"""Channels that a kernel computes at once; fewer leave lanes empty."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What the roofline needs to know.

    Attributes:
        peak_flops: float32 operations per second, all threads together, of the best dense kernel there is.
        bytes_per_s: of memory, all threads together.
        threads: how many.
    """

    peak_flops: float
    bytes_per_s: float
    threads: int


@dataclass(frozen=True, slots=True)
class Work:
    """What one direction of one convolution takes.

    Attributes:
        product_flops: operations of the matrix products, or of the taps where there are none.
        transform_flops: operations of Winograd's or Fourier's transforms.
        num_bytes: to and from memory.
    """

    product_flops: float
    transform_flops: float
    num_bytes: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What a family reaches.

    Attributes:
        product, transform: shares of peak, for wide convolutions.
        depthwise: share of peak in the kernels for depthwise convolutions; 0: it has none of its own.
        call_s: seconds of a call that does nothing; each group is one, unless the family has kernels for groups.
    """

    product: float
    transform: float
    depthwise: float
    call_s: float


EFFICIENCIES: dict[str, Efficiency] = {
    "direct": Efficiency(product=0.75, transform=1.0, depthwise=0.42, call_s=60e-6),
    "im2col": Efficiency(product=0.75, transform=1.0, depthwise=0.0, call_s=60e-6),
    "winograd": Efficiency(product=0.75, transform=0.30, depthwise=0.0, call_s=60e-6),
    "fft": Efficiency(product=0.65, transform=0.25, depthwise=0.10, call_s=80e-6),
}
"""Of Windlass's own families."""

TORCH_CALL_S = 15e-6
WIDE_KERNEL = 14
"""Filters wider than this leave oneDNN's direct kernels."""
FEW_CHANNELS = 16
SPLIT_BYTES = 16 << 20
"""Transformed weights larger than this do not stay in cache between their making and their use."""

_SLOTS = {2: 1, 3: 2, 4: 4, 5: 8, 6: 12, 7: 17, 8: 22}
"""Multiply-adds of one 1-D Winograd transform by α, with the even-odd split of symmetric points."""


def conv_work(algorithm: str, direction: Direction, shape: ConvShape, *, layout: Layout = "channels_last") -> Work:
    """Operations and bytes of one direction.

    >>> shape = ConvShape(batch=8, in_channels=64, height=224, width=224, out_channels=64, kernel=(3, 3),
    ...                   padding=(1, 1, 1, 1))
    >>> conv_work("winograd-4x4", "forward", shape).product_flops == 2 * 36 * (8 * 56 * 56) * 64 * 64
    True
    """
    entry = CONV_ALGORITHMS[algorithm]
    if entry.family == "winograd":
        return _winograd(entry, direction, shape)
    if entry.family == "fft":
        return _fft(entry, direction, shape)
    num_bytes = float(tensor_bytes(shape))
    if entry.family == "im2col":
        num_bytes += 2 * _matrix_bytes(shape)
    if entry.family == "torch" and layout == "contiguous":
        num_bytes += 2 * _image_bytes(shape)  # oneDNN copies images into its own order and back
    return Work(2.0 * shape.macs * useful_share(shape), 0.0, num_bytes)


def predicted_s(
    algorithm: str, direction: Direction, shape: ConvShape, *, machine: Machine, layout: Layout = "channels_last"
) -> float:
    """Seconds that one direction should take."""
    work = conv_work(algorithm, direction, shape, layout=layout)
    family = CONV_ALGORITHMS[algorithm].family
    if family == "torch":
        rate, call_s = torch_efficiency(direction, shape, layout=layout), TORCH_CALL_S
        compute_s = work.product_flops / (machine.peak_flops * rate)
    else:
        rates = EFFICIENCIES[family]
        own_kernels = shape.is_depthwise and rates.depthwise > 0
        share = rates.depthwise if own_kernels else rates.product * _lane_share(direction, shape)
        compute_s = work.product_flops / (machine.peak_flops * share)
        compute_s += work.transform_flops / (machine.peak_flops * rates.transform)
        call_s = rates.call_s * (1 if own_kernels or family == "direct" else shape.groups)
    return max(compute_s, work.num_bytes / machine.bytes_per_s) + call_s


def torch_efficiency(direction: Direction, shape: ConvShape, *, layout: Layout) -> float:
    """The share of peak that PyTorch's convolution reaches, as measured over kinds of shapes.

    oneDNN's direct kernels stand near the peak.  They leave out the gradient of weights for filters wider than
    14 (in channels_last nothing but its reference code is left), depthwise gradients, and in NCHW wide filters
    altogether; images of few channels fill their lanes badly.
    """
    last = layout == "channels_last"
    wide = shape.kernel[1] > WIDE_KERNEL
    if shape.is_depthwise:
        return _depthwise_efficiency(direction, shape, last=last)
    if wide:
        share = {"forward": 0.6, "input": 0.6, "weight": 0.003} if last else dict.fromkeys(_ALL, 0.15)
    else:
        share = dict.fromkeys(_ALL, 0.88 if last else 0.80)
        if shape.group_in < FEW_CHANNELS:
            share = {"forward": 0.65, "input": 0.16, "weight": 0.55}
    narrow = min(1.0, min(shape.group_in, shape.group_out) / LANES) if shape.groups > 1 else 1.0
    return share[direction] * narrow


_ALL: tuple[Direction, ...] = ("forward", "input", "weight")


def _depthwise_efficiency(direction: Direction, shape: ConvShape, *, last: bool) -> float:
    wide = shape.kernel[1] > WIDE_KERNEL
    if direction == "weight":
        return 0.015 if wide or not last or shape.kernel[1] > 3 else 0.12
    if direction == "forward" and not last:
        return 0.015 if wide else 0.2
    return 0.25 if direction == "input" else 0.45


def useful_share(shape: ConvShape) -> float:
    """Share of the definition's multiply-adds that are not with padding; every kernel may leave the others out.

    >>> useful_share(ConvShape(batch=1, in_channels=1, height=2, width=2, out_channels=1, kernel=(3, 3),
    ...                        padding=(1, 1, 1, 1)))
    0.4444444444444444
    """
    return _useful(shape, 0) * _useful(shape, 1)


def tensor_bytes(shape: ConvShape) -> int:
    """Bytes of input, output and weights, each once."""
    return _image_bytes(shape) + FLOAT_BYTES * shape.num_weights


def num_tiles(shape: ConvShape, direction: Direction, *, outputs: int) -> int:
    """Tiles of `outputs` × `outputs` that cover what a direction computes (the output, for gradients of weights)."""
    height, width = (shape.height, shape.width) if direction == "input" else (shape.out_height, shape.out_width)
    return shape.batch * math.ceil(height / outputs) * math.ceil(width / outputs)


def _winograd(entry: ConvAlgorithm, direction: Direction, shape: ConvShape) -> Work:
    """F(m×m, r×r): 2·α² operations per tile, input and output channel, and the transforms."""
    alpha = entry.tile + shape.kernel[0] - 1
    tiles = num_tiles(shape, direction, outputs=entry.tile)
    product = 2.0 * alpha**2 * tiles * shape.group_in * shape.out_channels
    slots = _SLOTS.get(alpha, alpha**2 // 3)
    images = 2 * alpha * _lanes(shape.group_in) + (alpha + entry.tile) * _lanes(shape.group_out)
    filters = (alpha + shape.kernel[0]) * shape.group_in * shape.out_channels
    transforms = 2.0 * slots * (tiles * shape.groups * images + filters)
    return Work(product, transforms, tensor_bytes(shape) + _spilled(alpha**2 * shape.group_in * shape.out_channels))


def _fft(entry: ConvAlgorithm, direction: Direction, shape: ConvShape) -> Work:
    """Overlap-save: N²/2 complex products of 8 operations, 2.5·N²·log2(N²) operations a transform."""
    size = entry.tile
    extent = max(d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel, strict=True))
    tiles = num_tiles(shape, direction, outputs=size - extent + 1)
    pairs = shape.group_in * shape.out_channels
    pruned = (1 + extent / size) / 2  # only `extent` of a filter's rows are not zero
    transforms = tiles * shape.groups * (_lanes(shape.group_in) + _lanes(shape.group_out)) + pruned * pairs
    if shape.is_depthwise:
        transforms = tiles * (_lanes(shape.in_channels) + _lanes(shape.out_channels)) + pruned * _lanes(pairs)
    return Work(
        4.0 * size**2 * tiles * pairs,
        2.5 * size**2 * math.log2(size**2) * transforms,
        tensor_bytes(shape) + _spilled(size**2 * pairs),
    )


def _spilled(num_elements: int) -> int:
    """Bytes by which transformed weights pass memory: written and read where they do not stay in cache."""
    num_bytes = FLOAT_BYTES * num_elements
    return 2 * num_bytes if num_bytes > SPLIT_BYTES else 0


def _image_bytes(shape: ConvShape) -> int:
    inputs = shape.in_channels * shape.height * shape.width
    return FLOAT_BYTES * shape.batch * (inputs + shape.out_channels * shape.out_height * shape.out_width)


def _matrix_bytes(shape: ConvShape) -> int:
    """The columns that im2col writes; none for 1×1 filters of stride 1, whose input is the matrix."""
    if shape.kernel == (1, 1) and shape.stride == (1, 1) and not any(shape.padding):
        return 0
    taps = shape.kernel[0] * shape.kernel[1]
    return FLOAT_BYTES * shape.batch * shape.out_height * shape.out_width * shape.in_channels * taps


def _lane_share(direction: Direction, shape: ConvShape) -> float:
    """Share of the vector lanes that carry channels: those of the output, of the input for its gradient."""
    channels = shape.group_in if direction == "input" else shape.group_out
    return channels / _lanes(channels)


def _lanes(channels: int) -> int:
    """Channels with those that fill the last vector up: all cost the same."""
    return LANES * math.ceil(channels / LANES)


def _useful(shape: ConvShape, axis: int) -> float:
    size, outputs = ((shape.height, shape.out_height), (shape.width, shape.out_width))[axis]
    before = shape.padding[2 * axis]
    taps = shape.kernel[axis]
    inside = sum(_inside(size, before, p * shape.stride[axis], taps, shape.dilation[axis]) for p in range(outputs))
    return inside / (outputs * taps)


def _inside(size: int, before: int, start: int, taps: int, dilation: int) -> int:
    """Taps of one output that fall into the image."""
    return sum(1 for position in _positions(start - before, taps, dilation) if 0 <= position < size)


def _positions(start: int, taps: int, dilation: int) -> Iterator[int]:
    return iter(range(start, start + taps * dilation, dilation))
