"""Convolution in the Fourier domain against the definition in float64."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from windlass.errors import ConfigError
from windlass.kernels import fft, fft_blocks, fft_depthwise, fft_geometry, reference
from windlass.kernels.workspace import lasting, scratch
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[Any]

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "whole tiles": (16, {"in_channels": 32, "out_channels": 32, "height": 24, "width": 24}),
    "odd sizes and channels": (16, {"in_channels": 20, "out_channels": 33, "height": 17, "width": 29}),
    "few channels": (16, {"in_channels": 3, "out_channels": 5, "height": 13, "width": 30}),
    "one pixel": (16, {"in_channels": 17, "out_channels": 16, "height": 1, "width": 1}),
    "smaller than the filter": (16, {"in_channels": 16, "out_channels": 20, "height": 3, "width": 4, "kernel": (9, 9)}),
    "uneven": (16, {"height": 21, "width": 14, "kernel": (7, 5), "padding": (0, 4, 3, 1)}),
    "no padding": (16, {"height": 20, "width": 18, "padding": (0, 0, 0, 0)}),
    "more padding than filter": (16, {"height": 6, "width": 6, "padding": (7, 5, 6, 8)}),
    "dilation": (16, {"height": 19, "width": 23, "kernel": (3, 5), "dilation": (4, 3), "padding": (4, 4, 6, 6)}),
    "groups": (16, {"in_channels": 8, "out_channels": 12, "height": 15, "width": 12, "groups": 4}),
    "one tile of an image": (32, {"height": 25, "width": 25, "kernel": (15, 15)}),
    "tiles of 32": (32, {"in_channels": 20, "out_channels": 16, "height": 45, "width": 33, "kernel": (11, 11)}),
    "tiles of 64": (64, {"batch": 1, "out_channels": 8, "height": 50, "width": 70, "kernel": (31, 31)}),
    "depthwise": (16, {"in_channels": 20, "out_channels": 20, "height": 21, "width": 17, "groups": 20}),
    "depthwise, uneven": (16, {"in_channels": 16, "out_channels": 16, "height": 9, "width": 30, "kernel": (3, 9),
                               "padding": (2, 0, 8, 4), "groups": 16}),
    "depthwise with a multiplier": (16, {"in_channels": 6, "out_channels": 18, "height": 12, "width": 9, "groups": 6}),
    "depthwise, tiles of 32": (32, {"in_channels": 16, "out_channels": 16, "height": 40, "width": 20, "groups": 16,
                                    "kernel": (15, 15)}),
}  # fmt: skip


def conv(name: str) -> tuple[int, ConvShape]:
    tile, given = SHAPES[name]
    r, s = given.get("kernel", (5, 5))
    defaults = {"batch": 2, "in_channels": 16, "out_channels": 16, "kernel": (r, s)}
    return tile, ConvShape(**{**defaults, "padding": (r // 2, r // 2, s // 2, s // 2), **given})


def arranged(array: Array, layout: str) -> Array:
    """The same numbers in float32: channels_last, contiguous, in another order, or backwards."""
    array = array.astype(np.float32)
    if layout == "channels_last":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "columns first":
        return np.ascontiguousarray(array.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    if layout == "backwards":
        return np.ascontiguousarray(array[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]
    return np.ascontiguousarray(array)


def problem(shape: ConvShape, layout: str, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """x ≥ 0, He-normal weights, bias and dy."""
    rng = np.random.default_rng(seed)
    fan_in = shape.group_in * shape.kernel[0] * shape.kernel[1]
    x = np.maximum(rng.standard_normal((shape.batch, shape.in_channels, shape.height, shape.width)), 0)
    w = rng.standard_normal((shape.out_channels, shape.group_in, *shape.kernel)) * np.sqrt(2 / fan_in)
    bias = rng.standard_normal(shape.out_channels)
    dy = rng.standard_normal((shape.batch, shape.out_channels, shape.out_height, shape.out_width))
    return arranged(x, layout), arranged(w, layout), bias.astype(np.float32), arranged(dy, layout)


def computed(
    shape: ConvShape,
    tile: int,
    x: Array,
    w: Array,
    bias: Array | None,
    dy: Array,
    *,
    threads: int = 2,
    layout: str = "",
) -> tuple[Array, Array, Array]:
    """y, dx and dw, into arrays full of NaN."""
    y, dx, dw = (arranged(np.full(like.shape, np.nan), layout) for like in (dy, x, w))
    fft.forward(x, w, bias, y, shape=shape, tile=tile, threads=threads)
    fft.backward_input(dy, w, dx, shape=shape, tile=tile, threads=threads)
    fft.backward_weight(x, dy, dw, shape=shape, tile=tile, threads=threads)
    return y, dx, dw


def defined(shape: ConvShape, x: Array, w: Array, bias: Array | None, dy: Array) -> tuple[Array, Array, Array]:
    """The same in float64."""
    x, w, dy = (array.astype(np.float64) for array in (x, w, dy))
    return (
        reference.forward(x, w, None if bias is None else bias.astype(np.float64), shape=shape),
        reference.backward_input(dy, w, shape=shape),
        reference.backward_weight(x, dy, shape=shape),
    )


def error(got: Array, expected: Array) -> float:
    """Relative error in the Euclidean norm."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# A transform rounds each number some 2 · log₂ n times, there and back, independently: 6e-8 · √(4 · log₂ 64) / √3 =
# 1.7e-7, and sums of at most 128 products add as much again, in root mean square: 2.4e-7.  Where an output is small
# beside the tile's other pixels (an image smaller than the filter) it takes part of their error.  A wrong tap or
# frequency gives 1e-2 and more.
BAR = 4e-7


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SHAPES)
def test_all_directions_agree_with_the_definition(name: str, layout: str) -> None:
    tile, shape = conv(name)
    arrays = problem(shape, layout)
    for got, expected in zip(computed(shape, tile, *arrays, layout=layout), defined(shape, *arrays), strict=True):
        assert error(got, expected) < BAR


@pytest.mark.parametrize("layout", ["columns first", "backwards"])
@pytest.mark.parametrize("name", ["odd sizes and channels", "groups", "depthwise"])
def test_any_strides_will_do(name: str, layout: str) -> None:
    tile, shape = conv(name)
    arrays = problem(shape, layout)
    for got, expected in zip(computed(shape, tile, *arrays, layout=layout), defined(shape, *arrays), strict=True):
        assert error(got, expected) < BAR


def test_nothing_around_a_result_is_written() -> None:
    """Results that are part of a larger array; x with NaN around it."""
    tile, shape = conv("odd sizes and channels")
    x, w, bias, dy = problem(shape, "channels_last")
    for layout in ((0, 2, 3, 1), (0, 1, 2, 3)):
        back = tuple(np.argsort(layout))
        room = np.full([size + 2 for size in np.array(x.shape)[list(layout)]], np.nan, np.float32)
        inner = room[1:-1, 1:-1, 1:-1, 1:-1].transpose(back)
        inner[...] = x
        out = np.full([size + 2 for size in np.array(dy.shape)[list(layout)]], 7, np.float32)
        y = out[1:-1, 1:-1, 1:-1, 1:-1].transpose(back)
        fft.forward(inner, w, bias, y, shape=shape, tile=tile, threads=2)
        assert error(y, defined(shape, x, w, bias, dy)[0]) < BAR
        y[...] = 7
        assert (out == 7).all()


@pytest.mark.parametrize("name", ["odd sizes and channels", "tiles of 32", "depthwise", "depthwise with a multiplier"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    tile, shape = conv(name)
    arrays = problem(shape, "channels_last")
    first, *others = (computed(shape, tile, *arrays, threads=threads) for threads in (1, 2, 3, 5))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert np.array_equal(a.view(np.int32), b.view(np.int32))


def test_the_bits_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over 192 channels and 100 tiles, in one block and in the smallest."""
    shape = ConvShape(batch=1, in_channels=192, height=95, width=95, out_channels=40, kernel=(7, 7))
    arrays = problem(shape, "channels_last")
    whole = computed(shape, 16, *arrays)
    monkeypatch.setattr(fft_blocks, "LIMIT", 0)
    fft_blocks.blocks_of.cache_clear()
    try:
        sizes = fft_blocks.sizes_of(16, 81, 192, 40)
        assert (
            len(list(fft_blocks.steps(sizes, fft_blocks.blocks_of(sizes, weight=False, threads=2), weight=False))) > 8
        )
        parts = computed(shape, 16, *arrays)
    finally:
        fft_blocks.blocks_of.cache_clear()
    for a, b in zip(whole, parts, strict=True):
        assert np.array_equal(a.view(np.int32), b.view(np.int32))


def assert_kept_spectra_change_nothing(shape: ConvShape, tile: int, arrays: tuple[Array, ...], layout: str) -> None:
    """The same bits as when they are made anew; the weights are not looked at again."""
    x, w, bias, dy = arrays
    y, dx, _ = computed(shape, tile, x, w, bias, dy, layout=layout)
    kept = lasting(fft.kept_floats(shape=shape, tile=tile))
    kept[...] = np.nan
    again = arranged(np.full_like(y, np.nan), layout), arranged(np.full_like(dx, np.nan), layout)
    fft.forward(x, w, bias, again[0], shape=shape, tile=tile, threads=2, kept=kept)
    fft.backward_input(dy, np.full_like(w, np.nan), again[1], shape=shape, tile=tile, threads=2, kept=kept)
    for got, expected in zip(again, (y, dx), strict=True):
        assert np.array_equal(got.view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", SHAPES)
def test_kept_spectra_give_the_same_bits(name: str, layout: str) -> None:
    tile, shape = conv(name)
    assert_kept_spectra_change_nothing(shape, tile, problem(shape, layout), layout)


@pytest.mark.parametrize("limit", [fft_blocks.LIMIT, 0])
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "tile"), [(192, 200, 1, 16), (72, 180, 1, 64), (80, 96, 2, 32)]
)
def test_kept_spectra_of_many_channels(
    channels: int, outputs: int, groups: int, tile: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in several chunks over several panels, in one block and in the smallest."""
    shape = ConvShape(
        batch=1, in_channels=channels, height=70, width=70, out_channels=outputs, kernel=(7, 7), groups=groups
    )
    monkeypatch.setattr(fft_blocks, "LIMIT", limit)
    fft_blocks.blocks_of.cache_clear()
    try:
        assert_kept_spectra_change_nothing(shape, tile, problem(shape, "channels_last"), "channels_last")
    finally:
        fft_blocks.blocks_of.cache_clear()


@pytest.mark.parametrize("name", ["odd sizes and channels", "groups", "depthwise"])
def test_kept_spectra_are_of_the_weights_alone(name: str) -> None:
    """Kept from one batch, used for another of other images."""
    tile, shape = conv(name)
    other = dataclasses.replace(shape, batch=3, height=shape.height + 9, width=shape.width + 20)
    (x, w, bias, dy), (_, _, _, other_dy) = problem(shape, "contiguous"), problem(other, "contiguous")
    kept = lasting(fft.kept_floats(shape=shape, tile=tile))
    assert kept.size == fft.kept_floats(shape=other, tile=tile)
    fft.forward(x, w, bias, np.empty_like(dy), shape=shape, tile=tile, threads=2, kept=kept)
    dx, expected = (np.empty((3, other.in_channels, other.height, other.width), np.float32) for _ in range(2))
    fft.backward_input(other_dy, w, dx, shape=other, tile=tile, threads=2, kept=kept)
    fft.backward_input(other_dy, w, expected, shape=other, tile=tile, threads=2)
    assert np.array_equal(dx, expected)


@pytest.mark.parametrize("name", ["whole tiles", "depthwise"])
def test_spectra_are_kept_only_where_they_fit(name: str) -> None:
    tile, shape = conv(name)
    x, w, bias, dy = problem(shape, "contiguous")
    num = fft.kept_floats(shape=shape, tile=tile)
    for kept in (lasting(num - 16), lasting(num + 1)[1:], lasting(2 * num)[::2]):
        with pytest.raises(ConfigError, match=f"fft-16 keeps {num} numbers in a row, aligned to 64 bytes"):
            fft.forward(x, w, bias, np.empty_like(dy), shape=shape, tile=tile, threads=2, kept=kept)
        with pytest.raises(ConfigError, match=f"fft-16 keeps {num} numbers in a row, aligned to 64 bytes"):
            fft.backward_input(dy, w, np.empty_like(x), shape=shape, tile=tile, threads=2, kept=kept)


@pytest.mark.parametrize("name", ["whole tiles", "dilation", "depthwise"])
def test_the_gradients_are_exact_adjoints(name: str) -> None:
    """⟨conv_w(x), dy⟩ = ⟨w, dw⟩ = ⟨x, dx⟩: the same number three ways."""
    tile, shape = conv(name)
    x, w, _, dy = problem(shape, "channels_last")
    y, dx, dw = computed(shape, tile, x, w, None, dy)
    products = [float(np.sum(a.astype(np.float64) * b)) for a, b in ((y, dy), (w, dw), (x, dx))]
    # Each product has an error of at most the bar times the norms of its two factors.
    slack = BAR * float(np.linalg.norm(y) * np.linalg.norm(dy))
    assert products[1] == pytest.approx(products[0], abs=slack)
    assert products[2] == pytest.approx(products[0], abs=slack)


@pytest.mark.parametrize("name", ["whole tiles", "depthwise"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_relu_is_fused_and_nan_stays_nan(name: str, layout: str) -> None:
    tile, shape = conv(name)
    x, w, bias, dy = problem(shape, layout)
    plain, fused = arranged(dy, layout), arranged(dy, layout)
    fft.forward(x, w, bias, plain, shape=shape, tile=tile, threads=2)
    fft.forward(x, w, bias, fused, shape=shape, tile=tile, threads=2, relu=True)
    assert (plain < 0).any()
    assert np.array_equal(fused, np.maximum(plain, 0))
    x[0, 0, 0, 0] = np.nan
    fft.forward(x, w, bias, fused, shape=shape, tile=tile, threads=2, relu=True)
    assert np.isnan(fused[0, 0, 0, 0])
    assert not np.isnan(fused[1]).any()


def test_what_goes_past_the_caches_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ConvShape(
        batch=1, in_channels=16, height=20, width=20, out_channels=32, kernel=(5, 5), padding=(2, 2, 2, 2)
    )
    x, w, bias, dy = problem(shape, "channels_last")
    room = np.zeros(400 * 32 + 16, np.float32)
    start = (-room.ctypes.data % 64) // 4
    y = room[start : start + 400 * 32].reshape(1, 20, 20, 32).transpose(0, 3, 1, 2)
    fft.forward(x, w, bias, y, shape=shape, tile=16, threads=2)
    kept, gradient = y.copy(), np.empty_like(w)
    fft.backward_weight(x, dy, gradient, shape=shape, tile=16, threads=2)
    y[...] = 0
    monkeypatch.setattr(fft_geometry, "STREAM_BYTES", 0)
    monkeypatch.setattr(fft, "CACHE_BYTES", 0)
    assert fft_geometry.streams(y)
    dw = np.empty_like(w)
    fft.forward(x, w, bias, y, shape=shape, tile=16, threads=2)
    fft.backward_weight(x, dy, dw, shape=shape, tile=16, threads=2)
    assert np.array_equal(y, kept)
    assert np.array_equal(dw, gradient)


@pytest.mark.parametrize("groups", [1, 16])
def test_an_empty_batch_gives_nothing_and_a_zero_gradient(groups: int) -> None:
    shape = ConvShape(batch=0, in_channels=16, height=8, width=8, out_channels=16, kernel=(5, 5), groups=groups)
    _, _, dw = computed(shape, 16, *problem(shape, "contiguous"))
    assert (dw == 0).all()
    assert fft.workspace_bytes("forward", shape=shape, tile=16, threads=2) == 0


@pytest.mark.parametrize("name", SHAPES)
def test_scratch_is_what_workspace_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile, shape = conv(name)
    x, w, bias, dy = problem(shape, "contiguous")
    taken: list[int] = []

    def counting(*sizes: int) -> Any:
        taken.append(4 * sum(sizes))
        return scratch(*sizes)

    for module in (fft, fft_depthwise):
        monkeypatch.setattr(module, "scratch", counting)
    calls: dict[Direction, Any] = {
        "forward": lambda: fft.forward(x, w, bias, np.empty_like(dy), shape=shape, tile=tile, threads=2),
        "input": lambda: fft.backward_input(dy, w, np.empty_like(x), shape=shape, tile=tile, threads=2),
        "weight": lambda: fft.backward_weight(x, dy, np.empty_like(w), shape=shape, tile=tile, threads=2),
    }
    for direction, call in calls.items():
        taken.clear()
        call()
        assert max(taken) == fft.workspace_bytes(direction, shape=shape, tile=tile, threads=2)
    kept = lasting(fft.kept_floats(shape=shape, tile=tile))
    taken.clear()
    fft.forward(x, w, bias, np.empty_like(dy), shape=shape, tile=tile, threads=2, kept=kept)
    assert max(taken) <= fft.workspace_bytes("forward", shape=shape, tile=tile, threads=2)
    taken.clear()
    fft.backward_input(dy, w, np.empty_like(x), shape=shape, tile=tile, threads=2, kept=kept)
    assert max(taken) <= fft.workspace_bytes("input", shape=shape, tile=tile, threads=2)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("direction", ["forward", "input", "weight"])
def test_large_convolutions_keep_to_64_mib_a_thread(direction: Direction, threads: int) -> None:
    for channels, size, k, tile in ((256, 56, 31, 64), (512, 14, 7, 16), (128, 112, 15, 32), (64, 224, 7, 32)):
        shape = ConvShape(
            batch=8, in_channels=channels, height=size, width=size, out_channels=channels, kernel=(k, k),
            padding=(k // 2,) * 4,
        )  # fmt: skip
        assert fft.workspace_bytes(direction, shape=shape, tile=tile, threads=threads) <= threads << 26


def test_blocks_take_every_part_once_and_sum_in_order() -> None:
    sizes = fft_blocks.sizes_of(32, 100, 300, 70)
    for weight in (False, True):
        blocks = fft_blocks.Blocks(96 if weight else 24, 128, 2, "panels")
        seen: dict[tuple[int, int, int], int] = {}
        summed: dict[tuple[int, int], list[int]] = {}
        for (t, tiles), (d, depths), (p, panels) in fft_blocks.steps(sizes, blocks, weight=weight):
            for corner in ((t, d, p), (t + tiles - 1, d + depths - 1, p + panels - 1)):
                seen[corner] = seen.get(corner, 0) + 1
            summed.setdefault((d, p) if weight else (t, p), []).append(t if weight else d)
        assert (0, 0, 0) in seen
        assert (99, 299, 2) in seen
        assert all(first == sorted(first) for first in summed.values())


def test_what_it_cannot_do_is_refused() -> None:
    shape = ConvShape(batch=1, in_channels=4, height=20, width=20, out_channels=4, kernel=(9, 9), stride=(2, 2))
    with pytest.raises(ConfigError, match="fft-16 needs stride 1, got 2x2"):
        fft.workspace_bytes("forward", shape=shape, tile=16, threads=1)
    shape = ConvShape(batch=1, in_channels=4, height=20, width=20, out_channels=4, kernel=(9, 9), dilation=(2, 1))
    with pytest.raises(ConfigError, match="fft-16 needs a filter smaller than its tile of 16, got 17"):
        fft.workspace_bytes("forward", shape=shape, tile=16, threads=1)


ON_ANOTHER_HOST = """
import numpy as np
from windlass.kernels import fft, reference
from windlass.kernels.cgemm import CTILE_ROWS
from windlass.kernels.jit import TILE_COLUMNS
from windlass.kernels.workspace import lasting
from windlass.plan.convolution import ConvShape
for groups in (1, {channels}):
    shape = ConvShape(batch=1, in_channels={channels}, height=7, width=13, out_channels={channels}, kernel=(5, 5),
                      padding=(2, 2, 2, 2), groups=groups)
    rng = np.random.default_rng(0)
    for layout in ((0, 1, 2, 3), (0, 2, 3, 1)):
        back = np.argsort(layout)
        x = rng.standard_normal(np.array((1, {channels}, 7, 13))[list(layout)]).astype(np.float32).transpose(back)
        w = rng.standard_normal(({channels}, {channels} // groups, 5, 5)).astype(np.float32)
        y, dx, dw = np.empty_like(x), np.empty_like(x), np.empty_like(w)
        fft.forward(x, w, None, y, shape=shape, tile=16, threads=2)
        fft.backward_input(x, w, dx, shape=shape, tile=16, threads=2)
        fft.backward_weight(x, x, dw, shape=shape, tile=16, threads=2)
        again, kept = np.empty_like(dx), lasting(fft.kept_floats(shape=shape, tile=16))
        fft.forward(x, w, None, y, shape=shape, tile=16, threads=2, kept=kept)
        fft.backward_input(x, w, again, shape=shape, tile=16, threads=2, kept=kept)
        assert np.linalg.norm(again - dx) <= 1e-7 * np.linalg.norm(dx)  # plain Python's products sum as BLAS does
        x, w = x.astype(float), w.astype(float)
        for got, truth in ((y, reference.forward(x, w, None, shape=shape)),
                           (dx, reference.backward_input(x, w, shape=shape)),
                           (dw, reference.backward_weight(x, x, shape=shape))):
            assert np.linalg.norm(got - truth) < 4e-7 * np.linalg.norm(truth)
print(CTILE_ROWS, TILE_COLUMNS)
"""


def on_another_host(channels: int, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_HOST.format(channels=channels)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_runs_as_plain_python() -> None:
    assert on_another_host(5, NUMBA_DISABLE_JIT="1")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 processors")
@pytest.mark.parametrize(("name", "tile"), [("x86-64-v3", "2 16"), ("x86-64-v2", "1 16")])
@pytest.mark.slow
def test_narrower_registers_get_smaller_tiles(name: str, tile: str) -> None:
    assert on_another_host(20, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") == tile
