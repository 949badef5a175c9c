"""QPyTorch's names: ``from windlass.precision.qtorch import ...`` in place of ``from qtorch.quant import ...``.

Arguments, order and results are QPyTorch's (Zhang et al., "QPyTorch: A Low-Precision Arithmetic Simulation Framework",
2019), but for what docs/precision.md lists: ties go to even, numbers of the format never change, FL may be negative,
memory formats are kept, `torch.manual_seed` repeats every rounding, and NaN stays NaN.  With ``from windlass.precision
import qtorch``, ``qtorch.quant.quantizer`` and ``qtorch.optim.OptimLP`` are found where QPyTorch has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from windlass.errors import ConfigError, unknown
from windlass.plan.number import Fixed, Rounding
from windlass.precision.lower import append_rounding, round_outputs
from windlass.precision.optimlp import OptimLP
from windlass.precision.quantize import quantize

__all__ = [
    "BlockFloatingPoint",
    "FixedPoint",
    "FloatingPoint",
    "Number",
    "OptimLP",
    "Quantizer",
    "block_quantize",
    "fixed_point_quantize",
    "float_quantize",
    "lower",
    "quantizer",
    "sequential_lower",
]

auto_low = number = optim = quant = sys.modules[__name__]  # QPyTorch's parts: all names are here

_ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest")


@dataclass(frozen=True)
class FixedPoint:
    """Fixed point of `wl` bits, `fl` behind the point; with `clamp` saturating, else without bounds."""

    wl: int
    fl: int
    clamp: bool = True
    symmetric: bool = False

    def __post_init__(self) -> None:
        Fixed(self.wl, self.fl)


@dataclass(frozen=True)
class FloatingPoint:
    """Floating point of `exp` bits of exponent (1 to 8) and `man` of mantissa (0 to 23), saturating."""

    exp: int
    man: int

    def __post_init__(self) -> None:
        _check("exp", self.exp, 1, 8)
        _check("man", self.man, 0, 23)


@dataclass(frozen=True)
class BlockFloatingPoint:
    """Codes of `wl` bits with one exponent for each index of `dim`, or one for all with -1."""

    wl: int
    dim: int = -1

    def __post_init__(self) -> None:
        _check("wl", self.wl, 2, 24)


Number = FixedPoint | FloatingPoint | BlockFloatingPoint


def fixed_point_quantize(
    x: Tensor, wl: int, fl: int, clamp: bool = True, symmetric: bool = False, rounding: str = "stochastic"
) -> Tensor:
    """`x` in fixed point: k · 2^-fl; saturated to `wl` bits if `clamp`, without the lowest code if `symmetric`."""
    how = _rounding(rounding)
    if clamp:
        return quantize(x.detach(), Fixed(wl, fl, symmetric), how)
    Fixed(wl, fl)
    whole = x.detach().abs() >= 2.0 ** (23 - fl)  # all of them multiples of the step, and NaN is not among them
    return torch.where(whole, x.detach(), quantize(x.detach(), Fixed(24, fl), how))


def float_quantize(x: Tensor, exp: int, man: int, rounding: str = "stochastic") -> Tensor:
    """`x` in floating point with `exp` and `man` bits: a sign, subnormal numbers, saturation instead of infinity."""
    FloatingPoint(exp, man)
    how, lowest = _rounding(rounding), 2 - 2 ** (exp - 1)
    wide = _float32(x).double()
    highest = (2.0 - 2.0**-man) * 2.0 ** min(2 ** (exp - 1), 127)  # no exponent is kept for infinity
    wide = wide.clamp(-highest, highest)
    exponent = torch.frexp(wide.nan_to_num()).exponent.sub_(1).clamp_(min=lowest) - man
    step = torch.ldexp(torch.ones_like(wide), exponent)
    return _whole(wide / step, how).mul_(step).float()


def block_quantize(x: Tensor, wl: int, dim: int = -1, rounding: str = "stochastic") -> Tensor:
    """`x` in block floating point: codes of `wl` bits, times the power of two that the largest of a block needs.

    A block is all of `x` (`dim` -1), or what has the same index in dimension `dim`.
    """
    BlockFloatingPoint(wl, dim)
    how, wide = _rounding(rounding), _float32(x).double()
    if not -1 <= dim < max(1, wide.dim()):
        raise ConfigError(f"dim of a block is -1 or a dimension of {tuple(x.shape)}, got {dim}")
    if wide.numel() == 0:
        return wide.float()
    finite = wide.abs().nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max)
    others = [i for i in range(wide.dim()) if i != dim] if dim >= 0 else list(range(wide.dim()))
    largest = finite.amax(others, keepdim=True) if others else finite
    exponent = torch.frexp(largest).exponent - 1
    step = torch.ldexp(torch.ones_like(largest), exponent - (wl - 2))
    codes = _whole(wide / step, how).clamp_(1 - 2.0 ** (wl - 1), 2.0 ** (wl - 1) - 1)
    return codes.mul_(step).float()


def quantizer(
    forward_number: Number | None = None, backward_number: Number | None = None, forward_rounding: str = "stochastic",
    backward_rounding: str = "stochastic", clamping_grad_zero: bool = False,
    backward_hooks: Sequence[Callable[[Tensor], Tensor]] = (),
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """A function that rounds on the way forward and rounds gradients on the way back; None leaves them as they are.

    With `clamping_grad_zero`, which is for fixed point, the gradient of numbers that saturated is 0.  Hooks change the
    gradient before it is rounded.
    """
    for number in (forward_number, backward_number):
        if number is not None and not isinstance(number, Number):
            raise ConfigError(f"a number is FixedPoint, FloatingPoint or BlockFloatingPoint, got {number!r}")
    forwards, backwards = _rounding(forward_rounding), _rounding(backward_rounding)
    if clamping_grad_zero and not (isinstance(forward_number, FixedPoint) and forward_number.clamp):
        raise ConfigError("clamping_grad_zero needs a forward_number of FixedPoint with clamp")

    return _Both(forward_number, backward_number, forwards, backwards, clamping_grad_zero, tuple(backward_hooks))


@dataclass(frozen=True)
class _Both:
    """What `quantizer` returns: rounds on the way forward and on the way back."""

    forward_number: Number | None
    backward_number: Number | None
    forward_rounding: Rounding
    backward_rounding: Rounding
    clamping_grad_zero: bool
    backward_hooks: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = _Rounded.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: _Both) -> Tensor:
        ctx.how, number = how, how.forward_number
        if how.clamping_grad_zero and isinstance(number, FixedPoint):
            ends = Fixed(number.wl, number.fl, number.symmetric)
            ctx.save_for_backward((x < ends.lowest) | (x > ends.highest))
        return _apply(x, number, how.forward_rounding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        for hook in ctx.how.backward_hooks:
            gradient = hook(gradient)
        if ctx.saved_tensors:
            gradient = gradient.masked_fill(ctx.saved_tensors[0], 0.0)
        return _apply(gradient, ctx.how.backward_number, ctx.how.backward_rounding), None


class Quantizer(nn.Module):
    """`quantizer` as a module."""

    def __init__(
        self, forward_number: Number | None = None, backward_number: Number | None = None,
        forward_rounding: str = "stochastic", backward_rounding: str = "stochastic", clamping_grad_zero: bool = False,
        backward_hooks: Sequence[Callable[[Tensor], Tensor]] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.quantize = quantizer(
            forward_number, backward_number, forward_rounding, backward_rounding, clamping_grad_zero, backward_hooks
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded."""
        return self.quantize(x)


def lower(
    model: nn.Module, layer_types: Sequence[str] = (), forward_number: Number | None = None,
    backward_number: Number | None = None, forward_rounding: str = "stochastic", backward_rounding: str = "stochastic",
) -> nn.Module:  # fmt: skip
    """Rounds the output of every layer of these types in `model` itself, which is returned.

    Args:
        model: is changed: its layers get a `Quantizer` named `output_quantizer`; names of parameters stay.
        layer_types: of "conv", "linear", "pool", "pad", "activation", "normalization", "dropout", "loss".
        forward_number: the format of outputs; None leaves them.
        backward_number: the format of their gradients; None leaves them.
        forward_rounding: "stochastic" or "nearest".
        backward_rounding: "stochastic" or "nearest".

    Raises:
        ConfigError: there is no such type, or no such layer in the model.
    """
    make = partial(Quantizer, forward_number, backward_number, forward_rounding, backward_rounding)
    return round_outputs(model, layer_types, make)


def sequential_lower(
    model: nn.Module, layer_types: Sequence[str] = (), forward_number: Number | None = None,
    backward_number: Number | None = None, forward_rounding: str = "stochastic", backward_rounding: str = "stochastic",
) -> nn.Module:  # fmt: skip
    """A copy of `model` with an `nn.Sequential` of layer and `Quantizer` in place of every layer of these types.

    A parameter `conv.weight` is `conv.0.weight` there.  Arguments and errors are those of `lower`.
    """
    make = partial(Quantizer, forward_number, backward_number, forward_rounding, backward_rounding)
    return append_rounding(model, layer_types, make)


def _apply(x: Tensor, number: Number | None, rounding: str) -> Tensor:
    match number:
        case FixedPoint():
            return fixed_point_quantize(x, number.wl, number.fl, number.clamp, number.symmetric, rounding)
        case FloatingPoint():
            return float_quantize(x, number.exp, number.man, rounding)
        case BlockFloatingPoint():
            return block_quantize(x, number.wl, number.dim, rounding)
        case None:
            return x.clone()


def _whole(y: Tensor, rounding: Rounding) -> Tensor:
    """Whole numbers, in float64."""
    if rounding == "nearest":
        return y.round()
    whole = y.trunc()
    chance = torch.empty_like(y).copy_(torch.rand(y.shape, dtype=y.dtype))  # by logical position, as everywhere
    return torch.where(chance < (y - whole).abs(), whole + y.sign(), whole)


def _float32(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        raise ConfigError(f"rounding needs a float32 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    return x.detach()


def _rounding(name: str) -> Rounding:
    for rounding in _ROUNDINGS:
        if rounding == name:
            return rounding
    raise ConfigError(unknown("rounding", str(name), _ROUNDINGS))


def _check(what: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{what} is {low} to {high}, got {value!r}")
