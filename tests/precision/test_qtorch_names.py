from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.precision.qtorch import (
    BlockFloatingPoint,
    FixedPoint,
    FloatingPoint,
    Quantizer,
    block_quantize,
    fixed_point_quantize,
    float_quantize,
    quantizer,
)


def test_fixed_point() -> None:
    x = torch.tensor([0.3, 9.0, -9.0, 0.03125, -0.0])
    assert fixed_point_quantize(x, 8, 4, rounding="nearest").tolist() == [0.3125, 7.9375, -8.0, 0.0, 0.0]
    assert fixed_point_quantize(x, 8, 4, symmetric=True, rounding="nearest")[2] == -7.9375
    assert fixed_point_quantize(x, 8, 4, clamp=False, rounding="nearest").tolist() == [0.3125, 9.0, -9.0, 0.0, 0.0]
    assert fixed_point_quantize(x, 4, -1, rounding="nearest").tolist() == [0.0, 8.0, -8.0, 0.0, 0.0]


def test_fixed_point_without_bounds_keeps_large_numbers() -> None:
    x = torch.tensor([2.0**30 + 128, -(2.0**23), 2.0**22 + 0.5, math.inf, math.nan])
    done = fixed_point_quantize(x, 8, 0, clamp=False, rounding="nearest")
    assert done[:4].tolist() == [2.0**30 + 128, -(2.0**23), 2.0**22, math.inf] and done[4].isnan()


@pytest.mark.parametrize(("exp", "man", "dtype"), [(8, 7, torch.bfloat16), (8, 23, torch.float32)])
def test_floats_are_those_of_pytorch(exp: int, man: int, dtype: torch.dtype) -> None:
    x = torch.randn(4000) * torch.tensor(2.0) ** torch.randint(-140, 100, (4000,))
    assert torch.equal(float_quantize(x, exp, man, "nearest"), x.to(dtype).float())


def test_small_floats_have_no_infinity() -> None:
    """QPyTorch keeps no exponent for it: with 5 bits the highest exponent is 16, where float16 ends at 15."""
    x = torch.tensor([65519.0, 7e4, 1e9, -math.inf, math.nan, 3 * 2.0**-26, 3.0])
    done = float_quantize(x, 5, 10, "nearest")
    assert done[:4].tolist() == [65504.0, 70016.0, 131008.0, -131008.0]
    assert done[4].isnan() and done[5] == 2.0**-24 and done[6] == 3.0
    small = torch.randn(4000)
    assert torch.equal(float_quantize(small, 5, 10, "nearest"), small.half().float())


def test_blocks_share_an_exponent() -> None:
    x = torch.tensor([[1.0, 0.3, -0.99], [8.0, 0.3, 15.9]])
    whole = block_quantize(x, 6, rounding="nearest")
    assert whole.tolist() == [[1.0, 0.5, -1.0], [8.0, 0.5, 15.5]]
    rows = block_quantize(x, 6, 0, "nearest")
    assert rows.tolist() == [[1.0, 0.3125, -1.0], [8.0, 0.5, 15.5]]
    columns = block_quantize(x, 6, 1, "nearest")
    assert columns[:, 1].tolist() == [0.296875, 0.296875]
    assert block_quantize(torch.zeros(3), 6).tolist() == [0.0] * 3
    assert block_quantize(torch.zeros(0), 6).shape == (0,)
    assert block_quantize(torch.tensor([math.nan, 1.0]), 6)[0].isnan()


@pytest.mark.parametrize("way", ["fixed", "float", "block"])
def test_stochastic_rounding_is_unbiased_and_repeats(way: str) -> None:
    def rounded(x: Tensor) -> Tensor:
        if way == "fixed":
            return fixed_point_quantize(x, 8, 4)
        return float_quantize(x, 5, 4) if way == "float" else block_quantize(x, 6)

    share = 0.3
    x = torch.full((20000,), 1.0 + share / 16)
    torch.manual_seed(1)
    up = (rounded(x) > 1.0).sum().item()
    torch.manual_seed(1)
    assert (rounded(x) > 1.0).sum().item() == up
    assert abs(up - share * 20000) < 5 * math.sqrt(20000 * share * (1 - share))
    exact = torch.arange(-31, 32) / 16
    assert torch.equal(rounded(exact), exact)


@pytest.mark.parametrize("number", [FixedPoint(8, 4), FloatingPoint(5, 2), BlockFloatingPoint(8)])
def test_quantizer_rounds_both_ways(number: FixedPoint | FloatingPoint | BlockFloatingPoint) -> None:
    x = torch.randn(50, requires_grad=True)
    module = Quantizer(number, FixedPoint(8, 2), "nearest", "nearest", backward_hooks=[lambda g: g * 2])
    y = module(x)
    y.backward(torch.full((50,), 0.3))
    assert x.grad is not None and x.grad.tolist() == [0.5] * 50
    assert not torch.equal(y, x) and torch.allclose(y, x, atol=0.26)


def test_gradients_of_saturated_numbers() -> None:
    x = torch.tensor([0.5, 9.0], requires_grad=True)
    quantizer(FixedPoint(8, 4), clamping_grad_zero=True)(x).backward(torch.ones(2))  # type: ignore[no-untyped-call]
    assert x.grad is not None and x.grad.tolist() == [1.0, 0.0]
    with pytest.raises(ConfigError, match="clamping_grad_zero needs a forward_number of FixedPoint"):
        quantizer(FloatingPoint(5, 2), clamping_grad_zero=True)


def test_memory_formats_are_kept() -> None:
    x = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    for done in (fixed_point_quantize(x, 8, 4), float_quantize(x, 5, 2), block_quantize(x, 8, 1)):
        assert done.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(2)
    first = float_quantize(x, 5, 2)
    torch.manual_seed(2)
    assert torch.equal(first, float_quantize(x.contiguous(), 5, 2))


def test_what_is_not_there_is_refused() -> None:
    x = torch.zeros(2, 2)
    with pytest.raises(ConfigError, match="exp is 1 to 8, got 9"):
        float_quantize(x, 9, 3)
    with pytest.raises(ConfigError, match="wl is 2 to 24, got 1"):
        BlockFloatingPoint(1)
    with pytest.raises(ConfigError, match=r"dim of a block is -1 or a dimension of \(2, 2\), got 2"):
        block_quantize(x, 8, 2)
    with pytest.raises(ConfigError, match="unknown rounding 'floor'"):
        fixed_point_quantize(x, 8, 4, rounding="floor")
    with pytest.raises(ConfigError, match=r"rounding needs a float32 tensor, got torch.float64"):
        float_quantize(x.double(), 5, 2)
    with pytest.raises(ConfigError, match="a number is FixedPoint"):
        quantizer(8)  # type: ignore[arg-type]
