"""Winograd's kernels against the definition in float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from windlass.kernels import reference, winograd
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape

Array = npt.NDArray[Any]

SHAPES: dict[str, dict[str, Any]] = {
    "whole tiles": {"in_channels": 32, "out_channels": 32, "height": 16, "width": 16},
    "odd sizes and channels": {"in_channels": 20, "out_channels": 33, "height": 7, "width": 9},
    "few channels": {"in_channels": 3, "out_channels": 5, "height": 6, "width": 5},
    "one pixel": {"in_channels": 17, "out_channels": 16, "height": 1, "width": 1},
    "uneven padding": {"in_channels": 16, "out_channels": 48, "height": 9, "width": 13, "padding": (0, 2, 1, 0)},
    "no padding": {"in_channels": 16, "out_channels": 16, "height": 8, "width": 8, "padding": (0, 0, 0, 0)},
    "much padding": {"in_channels": 16, "out_channels": 16, "height": 4, "width": 4, "padding": (4, 4, 4, 4)},
    "groups": {"in_channels": 40, "out_channels": 48, "height": 6, "width": 6, "groups": 2},
    "few tiles, many outputs": {"in_channels": 24, "out_channels": 160, "height": 7, "width": 7},
    "several strips": {"in_channels": 16, "out_channels": 16, "height": 5, "width": 70},
    "several blocks": {"in_channels": 144, "out_channels": 136, "height": 5, "width": 5, "batch": 1},
}


def conv(name: str, r: int = 3) -> ConvShape:
    defaults = {"batch": 2, "kernel": (r, r), "padding": (r // 2, r // 2, r // 2, r // 2)}
    return ConvShape(**{**defaults, **SHAPES[name]})


def arranged(array: Array, layout: str) -> Array:
    """The same numbers in float32: channels_last, contiguous, or as a view into a larger array."""
    array = array.astype(np.float32)
    if layout == "channels_last":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if layout == "view":
        n, c, h, w = array.shape
        room = np.full((n, h + 1, w + 2, c + 3), np.nan, np.float32)
        room[:, 1:, 1:-1, 2:-1] = array.transpose(0, 2, 3, 1)
        return room[:, 1:, 1:-1, 2:-1].transpose(0, 3, 1, 2)
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


def error(got: Array, expected: Array) -> float:
    """Relative error in the Euclidean norm."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# The bars of docs/convolution.md for 512 channels: 6e-7, 1.6e-6 and 6e-6.  Errors grow with the channels, so they
# hold here as well; a wrong tap or sign gives an error of 1e-2 and more.
BARS = {2: 6e-7, 4: 1.6e-6, 6: 6e-6}


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "view"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("m", [2, 4, 6])
def test_all_directions_agree_with_the_definition(m: int, name: str, layout: str) -> None:
    shape = conv(name)
    x, w, bias, dy = problem(shape, layout)
    y, dx, dw = (arranged(np.full(like.shape, np.nan), layout) for like in (dy, x, w))
    winograd.forward(x, w, bias, y, shape=shape, m=m, threads=2)
    winograd.backward_input(dy, w, dx, shape=shape, m=m, threads=2)
    winograd.backward_weight(x, dy, dw, shape=shape, m=m, threads=2)
    exact = [array.astype(np.float64) for array in (x, w, bias, dy)]
    assert error(y, reference.forward(*exact[:3], shape=shape)) < BARS[m]
    assert error(dx, reference.backward_input(exact[3], exact[1], shape=shape)) < BARS[m]
    assert error(dw, reference.backward_weight(exact[0], exact[3], shape=shape)) < BARS[m]


def test_other_filters_come_from_the_same_generator() -> None:
    """F(2×2, 7×7); the matrices of other sizes are tested where they are made, in exact fractions."""
    shape = conv("odd sizes and channels", 7)
    x, w, bias, dy = problem(shape, "channels_last")
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
    winograd.forward(x, w, bias, y, shape=shape, m=2, threads=2)
    winograd.backward_input(dy, w, dx, shape=shape, m=2, threads=2)
    winograd.backward_weight(x, dy, dw, shape=shape, m=2, threads=2)
    exact = [array.astype(np.float64) for array in (x, w, bias, dy)]
    assert error(y, reference.forward(*exact[:3], shape=shape)) < BARS[6]  # it has as many points
    assert error(dx, reference.backward_input(exact[3], exact[1], shape=shape)) < BARS[6]
    assert error(dw, reference.backward_weight(exact[0], exact[3], shape=shape)) < BARS[6]


def test_512_channels_keep_the_bars_of_accuracy() -> None:
    shape = ConvShape(
        batch=1, in_channels=512, height=12, width=12, out_channels=512, kernel=(3, 3), padding=(1, 1, 1, 1)
    )
    x, w, _, dy = problem(shape, "channels_last")
    exact = [array.astype(np.float64) for array in (x, w, dy)]
    expected = (
        reference.forward(exact[0], exact[1], None, shape=shape),
        reference.backward_input(exact[2], exact[1], shape=shape),
        reference.backward_weight(exact[0], exact[2], shape=shape),
    )
    for m, bar in BARS.items():
        y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
        winograd.forward(x, w, None, y, shape=shape, m=m, threads=2)
        winograd.backward_input(dy, w, dx, shape=shape, m=m, threads=2)
        winograd.backward_weight(x, dy, dw, shape=shape, m=m, threads=2)
        for got, truth in zip((y, dx, dw), expected, strict=True):
            assert error(got, truth) < bar


@pytest.mark.parametrize("name", ["several strips", "few tiles, many outputs", "several blocks"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    shape = conv(name)
    x, w, bias, dy = problem(shape, "channels_last")
    results = []
    for threads in (1, 2, 3, 5):
        y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
        winograd.forward(x, w, bias, y, shape=shape, m=4, threads=threads)
        winograd.backward_input(dy, w, dx, shape=shape, m=4, threads=threads)
        winograd.backward_weight(x, dy, dw, shape=shape, m=4, threads=threads)
        results.append((y, dx, dw))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert np.array_equal(first.view(np.int32), second.view(np.int32))


def test_the_gradient_of_the_weights_is_the_exact_adjoint() -> None:
    """⟨conv_w(x), dy⟩ = ⟨w, dw⟩ = ⟨x, dx⟩: the same number three ways."""
    shape = conv("whole tiles")
    x, w, _, dy = problem(shape, "channels_last")
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
    winograd.forward(x, w, None, y, shape=shape, m=4, threads=2)
    winograd.backward_input(dy, w, dx, shape=shape, m=4, threads=2)
    winograd.backward_weight(x, dy, dw, shape=shape, m=4, threads=2)
    products = [float(np.sum(a.astype(np.float64) * b)) for a, b in ((y, dy), (w, dw), (x, dx))]
    # Each product has an error of at most the bar times the norms of its two factors.
    slack = BARS[4] * float(np.linalg.norm(y) * np.linalg.norm(dy))
    assert products[1] == pytest.approx(products[0], abs=slack)
    assert products[2] == pytest.approx(products[0], abs=slack)


def test_relu_is_fused_and_nan_stays_nan() -> None:
    shape = conv("whole tiles")
    x, w, bias, dy = problem(shape, "channels_last")
    plain, fused = np.empty_like(dy), np.empty_like(dy)
    winograd.forward(x, w, bias, plain, shape=shape, m=4, threads=2)
    winograd.forward(x, w, bias, fused, shape=shape, m=4, threads=2, relu=True)
    assert (plain < 0).any()
    assert np.array_equal(fused, np.maximum(plain, 0))
    x[0, 0, 0, 0] = np.nan
    winograd.forward(x, w, bias, fused, shape=shape, m=4, threads=2, relu=True)
    assert np.isnan(fused[0, :, 0, 0]).all()
    assert not np.isnan(fused[1]).any()


def test_large_outputs_go_past_the_caches_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ConvShape(
        batch=1, in_channels=16, height=20, width=20, out_channels=32, kernel=(3, 3), padding=(1, 1, 1, 1)
    )
    x, w, bias, _ = problem(shape, "channels_last")
    room = np.zeros(400 * 32 + 16, np.float32)
    start = (-room.ctypes.data % 64) // 4
    y = room[start : start + 400 * 32].reshape(1, 20, 20, 32).transpose(0, 3, 1, 2)
    winograd.forward(x, w, bias, y, shape=shape, m=4, threads=2)
    kept = y.copy()
    y[...] = 0
    monkeypatch.setattr(winograd, "STREAM_BYTES", 0)
    winograd.forward(x, w, bias, y, shape=shape, m=4, threads=2)
    assert np.array_equal(y, kept)


def test_an_empty_batch_gives_nothing_and_a_zero_gradient() -> None:
    shape = ConvShape(batch=0, in_channels=16, height=8, width=8, out_channels=16, kernel=(3, 3))
    x, w, bias, dy = problem(shape, "contiguous")
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.full_like(w, np.nan)
    winograd.forward(x, w, bias, y, shape=shape, m=4, threads=2)
    winograd.backward_input(dy, w, dx, shape=shape, m=4, threads=2)
    winograd.backward_weight(x, dy, dw, shape=shape, m=4, threads=2)
    assert (dw == 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_scratch_is_what_workspace_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = conv(name)
    x, w, bias, dy = problem(shape, "contiguous")
    taken: list[int] = []

    def counting(*sizes: int) -> Any:
        taken.append(4 * sum(sizes))
        return scratch(*sizes)

    monkeypatch.setattr(winograd, "scratch", counting)
    winograd.forward(x, w, bias, np.empty_like(dy), shape=shape, m=4, threads=2)
    assert max(taken) == winograd.workspace_bytes("forward", shape=shape, m=4, threads=2)
    taken.clear()
    winograd.backward_input(dy, w, np.empty_like(x), shape=shape, m=4, threads=2)
    assert max(taken) == winograd.workspace_bytes("input", shape=shape, m=4, threads=2)
    taken.clear()
    winograd.backward_weight(x, dy, np.empty_like(w), shape=shape, m=4, threads=2)
    assert max(taken) == winograd.workspace_bytes("weight", shape=shape, m=4, threads=2)


ON_ANOTHER_HOST = """
import numpy as np
from windlass.kernels import jit, reference, winograd
from windlass.plan.convolution import ConvShape
shape = ConvShape(batch=1, in_channels={channels}, height=5, width=6, out_channels={channels}, kernel=(3, 3),
                  padding=(1, 1, 1, 1))
rng = np.random.default_rng(0)
x = rng.standard_normal((1, {channels}, 5, 6)).astype(np.float32)
w = rng.standard_normal(({channels}, {channels}, 3, 3)).astype(np.float32)
y, dx, dw = np.empty_like(x), np.empty_like(x), np.empty_like(w)
winograd.forward(x, w, None, y, shape=shape, m=2, threads=2)
winograd.backward_input(x, w, dx, shape=shape, m=2, threads=2)
winograd.backward_weight(x, x, dw, shape=shape, m=2, threads=2)
x, w = x.astype(float), w.astype(float)
for got, truth in ((y, reference.forward(x, w, None, shape=shape)),
                   (dx, reference.backward_input(x, w, shape=shape)),
                   (dw, reference.backward_weight(x, x, shape=shape))):
    assert np.linalg.norm(got - truth) < 6e-7 * np.linalg.norm(truth)
print(jit.TILE_ROWS, jit.TILE_COLUMNS)
"""


def on_another_host(channels: int, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ON_ANOTHER_HOST.format(channels=channels)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_runs_as_plain_python() -> None:
    """Every intrinsic has a twin; this is also where coverage of kernels can be measured."""
    assert on_another_host(5, NUMBA_DISABLE_JIT="1")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 processors")
@pytest.mark.parametrize(("name", "tile"), [("x86-64-v3", "6 16"), ("x86-64-v2", "2 16")])
@pytest.mark.slow
def test_narrower_registers_get_smaller_tiles(name: str, tile: str) -> None:
    assert on_another_host(20, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="") == tile
