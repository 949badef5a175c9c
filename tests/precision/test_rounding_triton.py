"""The kernel for GPUs against those of the CPU, in Triton's interpreter and on a GPU, where there are such."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from windlass.errors import ConfigError
from windlass.precision import Counters, Key, quantize, rounding_triton
from windlass.precision.rounder import Rounder

PROGRAM = """
import sys
import torch
from windlass.precision import Counters, Key, parse_format
from windlass.precision.rounder import Rounder
from windlass.precision.rounding_triton import round_dense

KINDS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
INF = float("inf")
SPECIAL = torch.tensor([INF - INF, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 0.5, -0.5, 2.5])
WAYS = [("<4,12>", ["float32", "int16", "int32"]), ("fixed(8,0)", ["int8"]), ("fixed(24,0,symmetric)", ["int32"]),
        ("fixed(9,-100)", ["float32"]), ("fixed(24,126)", ["float32"]),
        ("float16", ["float32", "float16"]), ("bfloat16", ["float32", "bfloat16"])]


def bits(x):
    kept = torch.where(x.isnan(), torch.zeros_like(x), x) if x.is_floating_point() else x
    return kept.view(KINDS[x.itemsize])


def compare(name, dtype, rounding, size, first, device):
    number = parse_format(name)
    x = torch.randn(size) * torch.tensor(2.0) ** torch.randint(-10, 10, (size,)) * number.quantum ** 0.5
    x[20:100] = (torch.arange(80) - 40) * (number.quantum / 2)
    x[: len(SPECIAL)] = SPECIAL
    words = Key((1 << 63) + 12345678912345, (1 << 32) - 1, 7).words
    expected, out = torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype, device=device)
    sums = Counters()
    Rounder(number, rounding, dtype, counted=True)(x, expected, words, first, sums)
    done = round_dense(x.to(device), out, number, rounding, words, first, counted=True)
    what = name, dtype, rounding, size, first
    assert torch.equal(bits(out.cpu()), bits(expected)), what
    if dtype.is_floating_point:
        assert torch.equal(out.cpu().isnan(), expected.isnan()), what
    assert done[:3] == (sums.saturated, sums.zeroed, sums.not_a_number), (what, done, sums)
    assert abs(done[3] - sums.error_sum) <= 1e-4 * sums.error_sum, (what, done, sums)


torch.manual_seed(1)
for name, dtypes in WAYS:
    for dtype in dtypes:
        for rounding in ("stochastic", "nearest", "floor"):
            for size, first in ((1500, 0), (1021, 5), (300, (1 << 35) - 3)):
                compare(name, getattr(torch, dtype), rounding, size, first, sys.argv[1])
x = torch.randn(50, device=sys.argv[1])
done = round_dense(x, out := torch.empty_like(x), parse_format("<2,4>"), "nearest", (0, 0, 0, 0), 0, counted=False)
assert done == (0, 0, 0, 0.0) and torch.equal(out, (x * 16).round().clamp(-32, 31) / 16 + 0.0)
"""


def start(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device], capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_the_interpreted_kernel_has_the_bits_of_the_cpu() -> None:
    start("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_bits_of_the_cpu() -> None:
    start("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantize_rounds_on_a_gpu() -> None:
    x = torch.randn(3, 5, 6, 7).to("cuda", memory_format=torch.channels_last)
    for part in (x, x[:, 1:], x.t() if x.dim() == 2 else x[0, 0].t()):
        sums, expected_sums = Counters(), Counters()
        done = quantize(part, "<2,14>", generator=Key(1), counters=sums, first=3)
        expected = quantize(part.cpu(), "<2,14>", generator=Key(1), counters=expected_sums, first=3)
        assert torch.equal(done.cpu(), expected) and done.stride() == torch.empty_like(part).stride()
        assert (sums.elements, sums.saturated, sums.zeroed) == (part.numel(), expected_sums.saturated, sums.zeroed)


def test_without_triton_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed; the tensor's device is looked at before, so one of the CPU stands in."""
    monkeypatch.setattr(rounding_triton, "triton", None)
    rounder = Rounder("<2,14>", "nearest", torch.float32, counted=False)
    with pytest.raises(ConfigError, match=r"rounding on a GPU needs the package triton .*; install it, or move"):
        rounder._on_gpu(torch.zeros(3), torch.zeros(3), Key(1).words, 0)
