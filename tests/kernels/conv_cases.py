"""What the tests of direct, im2col and depthwise convolution share: shapes, layouts, runs and the definition."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.kernels import reference
from windlass.plan.convolution import ConvShape

Array = npt.NDArray[Any]

LAYOUTS = ("channels_last", "contiguous", "view", "every second column")


def conv(batch: int, in_channels: int, size: tuple[int, int], out_channels: int, kernel: tuple[int, int],
         **more: Any) -> ConvShape:  # fmt: skip
    """A convolution, by default with the padding that keeps the size of odd filters."""
    down, across = kernel[0] // 2, kernel[1] // 2
    return ConvShape(
        batch=batch, in_channels=in_channels, height=size[0], width=size[1], out_channels=out_channels, kernel=kernel,
        **{"padding": (down, down, across, across), **more},
    )  # fmt: skip


SHAPES: dict[str, ConvShape] = {
    "whole vectors": conv(2, 32, (9, 14), 32, (3, 3)),
    "odd sizes and channels": conv(2, 21, (7, 9), 37, (3, 3)),
    "one pixel": conv(1, 17, (1, 1), 16, (3, 3)),
    "one of everything": conv(1, 1, (1, 1), 1, (1, 1)),
    "image smaller than the filter": conv(2, 4, (2, 3), 6, (7, 5)),
    "first layer": conv(2, 3, (23, 37), 64, (7, 7), stride=(2, 2)),
    "large stride": conv(1, 3, (31, 31), 24, (11, 11), stride=(4, 4), padding=(2, 2, 2, 2)),
    "stride beyond the filter": conv(1, 6, (8, 9), 20, (2, 2), stride=(3, 4), padding=(0, 0, 0, 0)),
    "only padding": conv(1, 4, (1, 1), 4, (1, 1), stride=(3, 3), padding=(1, 1, 1, 1)),
    "uneven everything": conv(2, 20, (8, 11), 40, (3, 2), stride=(2, 3), padding=(1, 0, 2, 1), dilation=(1, 2)),
    "dilation": conv(2, 16, (13, 17), 48, (3, 3), padding=(2, 2, 4, 4), dilation=(2, 4)),
    "dilation and stride": conv(1, 16, (20, 20), 16, (3, 3), stride=(2, 4), dilation=(3, 2)),
    "1x1": conv(3, 64, (7, 7), 80, (1, 1)),
    "1x1 with stride": conv(2, 32, (13, 12), 48, (1, 1), stride=(2, 3)),
    "1x1 of many channels": conv(1, 512, (5, 6), 32, (1, 1)),
    "many channels": conv(2, 272, (6, 6), 160, (3, 3)),
    "many small images": conv(9, 16, (4, 4), 32, (3, 3)),
    "wide": conv(1, 16, (5, 300), 16, (3, 3)),
    "groups": conv(2, 40, (6, 7), 36, (3, 3), groups=2),
    "groups of 3": conv(2, 12, (6, 7), 24, (3, 3), stride=(2, 2), groups=4),
}

LANES: dict[str, ConvShape] = {
    "depthwise": conv(2, 32, (9, 15), 32, (3, 3), groups=32),
    "depthwise, odd": conv(2, 37, (7, 33), 37, (3, 3), stride=(2, 2), groups=37),
    "depthwise, many vectors": conv(1, 144, (6, 6), 144, (3, 3), groups=144),
    "depthwise, large filter": conv(1, 16, (14, 14), 16, (13, 13), groups=16),
    "depthwise, very large filter": conv(1, 16, (9, 9), 16, (17, 15), groups=16),
    "depthwise, dilation": conv(2, 24, (15, 15), 24, (5, 3), padding=(2, 2, 2, 2), dilation=(3, 2), groups=24),
    "depthwise, dilation and stride": conv(2, 20, (15, 14), 20, (3, 3), stride=(2, 3), dilation=(3, 2), groups=20),
    "depthwise, two rows": conv(1, 16, (6, 6), 16, (2, 4), padding=(1, 1, 2, 2), groups=16),
    "multiplier": conv(2, 12, (8, 9), 36, (3, 3), stride=(2, 1), groups=12),
    "pairs": conv(2, 36, (7, 17), 36, (3, 3), groups=18),
    "fours": conv(2, 32, (9, 9), 32, (3, 3), stride=(2, 2), groups=8),
    "eights": conv(1, 48, (6, 16), 48, (3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), groups=6),
}


def arranged(array: Array, layout: str) -> Array:
    """The same numbers in float32, in one of `LAYOUTS`; around and between those of a view there is NaN."""
    array = array.astype(np.float32)
    n, c, h, w = array.shape
    if layout == "channels_last":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "view":
        room = np.full((n, h + 1, w + 2, c + 3), np.nan, np.float32)
        part = room[:, 1:, 1:-1, 2:-1].transpose(0, 3, 1, 2)
    elif layout == "every second column":
        part = np.full((n, c, h + 1, 2 * w), np.nan, np.float32)[:, :, :h, ::2]
    else:
        return np.ascontiguousarray(array)
    part[...] = array
    return part


def untouched(part: Array, layout: str) -> bool:
    """Whether what lies around a view is still NaN."""
    room = part.base
    return room is None or layout in LAYOUTS[:2] or int(np.isnan(room).sum()) == room.size - part.size


def problem(shape: ConvShape, layout: str = "channels_last") -> tuple[Array, Array, Array, Array]:
    """x, w, bias and dy of normal numbers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((shape.batch, shape.in_channels, shape.height, shape.width))
    w = rng.standard_normal((shape.out_channels, shape.group_in, *shape.kernel))
    bias = rng.standard_normal(shape.out_channels).astype(np.float32)
    dy = rng.standard_normal((shape.batch, shape.out_channels, shape.out_height, shape.out_width))
    return arranged(x, layout), arranged(w, layout), bias, arranged(dy, layout)


def results(module: ModuleType, shape: ConvShape, layout: str = "channels_last", threads: int = 2) -> tuple[Array, ...]:
    """y, dx and dw of `problem`, each written over NaN and nowhere else."""
    x, w, bias, dy = problem(shape, layout)
    y, dx, dw = (arranged(np.full(like.shape, np.nan), layout) for like in (dy, x, w))
    module.forward(x, w, bias, y, shape=shape, threads=threads)
    module.backward_input(dy, w, dx, shape=shape, threads=threads)
    module.backward_weight(x, dy, dw, shape=shape, threads=threads)
    assert all(untouched(part, layout) for part in (y, dx, dw))
    return y, dx, dw


def errors(got: tuple[Array, ...], shape: ConvShape) -> list[float]:
    """Each result's distance from the definition in float64, as a share of the most that rounding explains.

    A sum of n products of independent normal numbers grows like √n, and so do its partial sums; each of n additions
    rounds by at most 2⁻²⁴ of a partial sum.  As the roundings are independent, the sum's error is about
    2⁻²⁴ · √(n/2) · √n / √3, so relative to the result √n it is 2⁻²⁴ · √(n/6).  Allowed is 2⁻²⁴ · 4 · √(n + 4), about
    ten times that.  A wrong tap, channel or sign gives at least √(2/n) of the result: thousands of times more.
    """
    x, w, bias, dy = (array.astype(np.float64) for array in problem(shape))
    expected = (
        reference.forward(x, w, bias, shape=shape),
        reference.backward_input(dy, w, shape=shape),
        reference.backward_weight(x, dy, shape=shape),
    )
    taps = shape.kernel[0] * shape.kernel[1]
    lengths = (shape.group_in * taps, shape.group_out * taps, shape.batch * shape.out_height * shape.out_width)
    return [
        float(np.linalg.norm(a - b)) / max(1e-30, float(np.linalg.norm(b)) * 2**-24 * 4 * (n + 4) ** 0.5)
        if np.any(a != b)
        else 0.0
        for a, b, n in zip(got, expected, lengths, strict=True)
    ]


def assert_same_bits(module: ModuleType, shape: ConvShape) -> None:
    """The results do not depend on the number of threads."""
    first = results(module, shape, threads=1)
    for threads in (2, 3, 7):
        for a, b in zip(first, results(module, shape, threads=threads), strict=True):
            assert np.array_equal(a.view(np.int32), b.view(np.int32))


def assert_adjoint(module: ModuleType, shape: ConvShape) -> None:
    """⟨conv_w(x), dy⟩ = ⟨x, dx⟩ = ⟨w, dw⟩: the same number three ways."""
    x, w, bias, dy = problem(shape)
    y, dx, dw = (array.astype(np.float64) for array in results(module, shape))
    y -= bias.astype(np.float64)[:, None, None]
    product = float(np.sum(y * dy))
    # The rounding of y, about 1e-6 of its norm for the shapes here, times the norm of dy; the others are like it.
    slack = 1e-5 * float(np.linalg.norm(y) * np.linalg.norm(dy))
    assert abs(float(np.sum(x * dx)) - product) < slack
    assert abs(float(np.sum(w * dw)) - product) < slack
