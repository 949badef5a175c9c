"""Direct convolution against the definition, and the arithmetic of its taps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from conv_cases import LANES, LAYOUTS, SHAPES, Array, assert_adjoint, assert_same_bits, conv, errors, problem, results

from windlass.kernels import blocking, depthwise, direct, im2col, reference, taps
from windlass.kernels.workspace import scratch


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_all_directions_agree_with_the_definition(name: str, layout: str) -> None:
    assert max(errors(results(direct, SHAPES[name], layout), SHAPES[name])) < 1


@pytest.mark.parametrize("name", ["many channels", "many small images", "wide", "groups", "1x1", "first layer"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    assert_same_bits(direct, SHAPES[name])


@pytest.mark.parametrize("name", ["uneven everything", "dilation and stride", "groups of 3"])
def test_gradients_are_the_adjoints(name: str) -> None:
    assert_adjoint(direct, SHAPES[name])


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
@pytest.mark.parametrize("name", ["odd sizes and channels", "many channels", "1x1"])
def test_relu_is_fused_and_nan_stays_nan(name: str, module: Any) -> None:
    shape = SHAPES[name]
    x, w, bias, dy = problem(shape)
    plain, fused = np.empty_like(dy), np.empty_like(dy)
    module.forward(x, w, bias, plain, shape=shape, threads=2)
    module.forward(x, w, bias, fused, shape=shape, threads=2, relu=True)
    assert (plain < 0).any()
    assert np.array_equal(fused, np.maximum(plain, 0))
    x[0, 0, 0, 0] = np.nan
    module.forward(x, w, bias, fused, shape=shape, threads=2, relu=True)
    assert np.isnan(fused[0, :, 0, 0]).all()
    assert not np.isnan(fused[1]).any()


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
@pytest.mark.parametrize("groups", [1, 16])
def test_an_empty_batch_gives_nothing_and_a_zero_gradient(groups: int, module: Any) -> None:
    shape = conv(0, 16, (8, 8), 16, (3, 3), groups=groups)
    y, dx, dw = results(module, shape)
    assert y.size == dx.size == 0
    assert (dw == 0).all()


def aligned(shape: tuple[int, int, int, int]) -> Array:
    """A channels_last array on a cache line."""
    n, c, h, w = shape
    room = np.zeros(n * c * h * w + 16, np.float32)
    start = (-room.ctypes.data % 64) // 4
    return room[start : start + n * c * h * w].reshape(n, h, w, c).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
@pytest.mark.parametrize("name", ["whole vectors", "depthwise", "1x1"])
def test_large_outputs_go_past_the_caches_unchanged(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**SHAPES, **LANES}[name]
    x, w, bias, dy = problem(shape)
    y = aligned(dy.shape)
    module.forward(x, w, bias, y, shape=shape, threads=2)
    kept = y.copy()
    y[...] = 0
    monkeypatch.setattr(taps, "STREAM_BYTES", 0)
    assert taps.streams(y)
    module.forward(x, w, bias, y, shape=shape, threads=2)
    assert np.array_equal(y, kept)


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
def test_arrays_that_kernels_cannot_read_are_copied(module: Any) -> None:
    """Read-only memory, and strides that run backwards, on the way in and out."""
    shape = SHAPES["whole vectors"]
    x, w, bias, dy = problem(shape)
    expected = np.empty_like(dy)
    module.forward(x, w, bias, expected, shape=shape, threads=2)
    x.flags.writeable = False
    backwards = np.empty_like(dy)[:, :, ::-1]
    module.forward(x, w[::-1].copy()[::-1], bias, backwards, shape=shape, threads=2)
    assert np.array_equal(backwards, expected)


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
def test_weights_that_are_too_many_are_packed_in_turns(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = conv(2, 32, (6, 6), 160, (3, 3))
    whole = results(module, shape)
    monkeypatch.setattr(blocking, "WEIGHT_BYTES", 2 * 32 * 9 * 32 * 4)
    blocking.blocks_of.cache_clear()
    turns = results(module, shape)
    blocking.blocks_of.cache_clear()
    assert all(np.array_equal(a, b) for a, b in zip(whole, turns, strict=True))


@pytest.mark.parametrize("module", [direct, im2col], ids=["direct", "im2col"])
@pytest.mark.parametrize("name", [*SHAPES, *LANES])
def test_scratch_is_at_most_what_workspace_says(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**SHAPES, **LANES}[name]
    taken: list[int] = []

    def counting(*sizes: int) -> Any:
        taken.append(4 * sum(sizes))
        return scratch(*sizes)

    for place in (direct, im2col, depthwise):
        monkeypatch.setattr(place, "scratch", counting)
    for layout in ("channels_last", "contiguous"):
        taken.clear()
        results(module, shape, layout)
        promised = [module.workspace_bytes(which, shape=shape, threads=2) for which in ("forward", "input", "weight")]
        assert len(taken) == 3
        assert all(t <= p for t, p in zip(taken, promised, strict=True))
        assert max(promised) <= 2 * 64 << 20


def test_every_output_pixel_has_the_taps_that_meet_it() -> None:
    """The phases of the gradient of the input, against a search through all pixels of dy."""
    for shape in (*SHAPES.values(), *LANES.values()):
        found = taps.adjoint_taps(shape)
        met: dict[int, list[tuple[int, int]]] = {h: [] for h in range(shape.height)}
        for p in range(shape.out_height):
            for r in range(shape.kernel[0]):
                h = p * shape.stride[0] + r * shape.dilation[0] - shape.padding[0]
                if h in met:
                    met[h].append((p, r))
        for phase in (phase for phase in found.phases if phase.col == 0):
            down = phase.down
            for i, h in enumerate(range(phase.row, shape.height, shape.stride[0])):
                pairs = [(i + down.offset + t * down.step, down.first + t * down.turn) for t in range(down.num)]
                assert sorted(met[h]) == sorted(pair for pair in pairs if 0 <= pair[0] < shape.out_height)


ON_ANOTHER_HOST = """
import sys
sys.path.insert(0, {folder!r})
from conv_cases import LANES, SHAPES, errors, results
from windlass.kernels import direct, im2col, jit
for name in {names}:
    shape = {{**SHAPES, **LANES}}[name]
    for module in (direct, im2col):
        for layout in {layouts}:
            assert max(errors(results(module, shape, layout), shape)) < 1, (name, module, layout)
print(jit.TILE_ROWS, jit.TILE_COLUMNS)
"""


def on_another_host(names: list[str], layouts: list[str], **environment: str) -> str:
    folder = os.path.dirname(__file__)  # noqa: PTH120
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_ANOTHER_HOST.format(folder=folder, names=names, layouts=layouts)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_runs_as_plain_python() -> None:
    """Every intrinsic has a twin; this is also where coverage of kernels can be measured."""
    names = ["one pixel", "image smaller than the filter", "only padding", "1x1 with stride", "fours", "multiplier"]
    assert on_another_host(names, ["channels_last", "contiguous"], NUMBA_DISABLE_JIT="1")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 processors")
@pytest.mark.slow
def test_narrower_registers_get_smaller_tiles() -> None:
    names = ["odd sizes and channels", "first layer", "depthwise, odd", "fours"]
    assert on_another_host(names, ["channels_last"], NUMBA_CPU_NAME="x86-64-v3", NUMBA_CPU_FEATURES="") == "6 16"


def test_the_definition_is_what_torch_computes() -> None:
    """One shape with everything at once, so that these tests stand on more than their own definition."""
    import torch

    shape = SHAPES["uneven everything"]
    x, w, bias, _ = problem(shape)
    top, bottom, left, right = shape.padding
    padded = torch.nn.functional.pad(torch.from_numpy(x), (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(
        padded, torch.from_numpy(w), torch.from_numpy(bias), shape.stride, 0, shape.dilation, shape.groups
    )
    ours = reference.forward(x.astype(np.float64), w.astype(np.float64), bias.astype(np.float64), shape=shape)
    assert np.linalg.norm(theirs.numpy() - ours) < 1e-5 * np.linalg.norm(ours)
