"""`quantize` and `dequantize`: tensors to a number format and back, in one pass.

The kernels are in `windlass.kernels.rounding`.  Random bits belong to an element's logical position, so they depend
neither on the number of threads nor on the memory format, nor on whether a CPU or a GPU (`rounding_triton.py`) rounds.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from windlass.errors import ConfigError
from windlass.plan.number import FLOAT32, STORAGE_BITS, Fixed, Key, NumberFormat, Rounding, check_rounding, parse_format
from windlass.precision.counters import Counters
from windlass.precision.rounder import Rounder, widen

Randomness = torch.Generator | Key
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in STORAGE_BITS},
}  # fmt: skip
DEVICES = ("cpu", "cuda")


def quantize(
    x: Tensor, fmt: NumberFormat | str, rounding: Rounding = "stochastic", generator: Randomness | None = None, *,
    dtype: torch.dtype | None = None, out: Tensor | None = None, counters: Counters | None = None,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """`x` rounded to a number format.

    Args:
        x: float32, on the CPU or, by Triton, a GPU, of any shape and strides.
        fmt: the format, or how it is written: ``fixed(16, 12)``, ``"<4,12>"``, ``"float16"``, ``"bfloat16"``.  With
            ``"float32"`` nothing is rounded and infinity stays.
        rounding: "stochastic", "nearest" (ties to even) or "floor".
        generator: where the random bits of "stochastic" come from: a `torch.Generator`, of which one number is drawn,
            or a `Key` (seed, stream, step), which gives the same bits every time.  None: PyTorch's own generator.
        dtype: how the result is stored: float32 (the numbers themselves), the format's own type, or for fixed point a
            wider integer (codes, of which `dequantize` makes numbers).  None: float32, or what `out` has.
        out: is written; `x` itself to round in place.  None: a new tensor in the memory format of `x`.
        counters: grow by what is saturated, rounded to zero and NaN, and by the errors.
        first: element i takes the random bits of position `first` + i, so that parts of a tensor, each with the number
            of elements before it, have the bits of the whole.

    What is out of range saturates, infinities too.  NaN stays NaN; an integer has no code for it, so there it becomes 0
    and is counted, or is an error where there are no `counters`.  A zero of fixed point is +0.  For gradients rounding
    is the identity (straight-through).

    Raises:
        ConfigError: `x` is no float32 tensor on the CPU or a GPU, Triton is missing, or the types or shapes do not fit.
    """
    number, how = parse_format(fmt), check_rounding(rounding)
    _check_input(x, first)
    dtype = _check_output(x, number, dtype, out)
    if out is None and x.requires_grad and torch.is_grad_enabled() and dtype == torch.float32:
        straight: Tensor = _Straight.apply(x, number, how, generator, counters, first)  # type: ignore[no-untyped-call]
        return straight
    result = torch.empty_like(x, dtype=dtype, requires_grad=False) if out is None else out
    _round(x.detach(), result.detach(), number, how, generator, counters, first)
    if out is not None:
        increment_version(out)
    return result


def dequantize(codes: Tensor, fmt: NumberFormat | str, *, out: Tensor | None = None) -> Tensor:
    """The numbers, in float32, that are stored in `codes` (int8, int16, int32, float16, bfloat16 or float32).

    Exact: ``dequantize(quantize(x, fmt, dtype=torch.int16), fmt)`` has the bits of ``quantize(x, fmt)`` for equal keys.
    """
    number = parse_format(fmt)
    if codes.dtype not in _dtypes(number):
        raise ConfigError(f"{number} is stored as {_names(number)}; got a tensor of {codes.dtype}")
    if codes.dtype.is_floating_point:
        return codes.to(torch.float32) if out is None else out.copy_(codes)
    if out is None:
        return widen(codes, number, torch.empty_like(codes, dtype=torch.float32))
    widen(codes, number, out)
    increment_version(out)
    return out


class _Straight(torch.autograd.Function):
    """Rounds on the way forward and hands gradients through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, number: NumberFormat, rounding: Rounding, generator: Randomness | None,
        counters: Counters | None, first: int,
    ) -> Tensor:  # fmt: skip
        return quantize(x.detach(), number, rounding, generator, counters=counters, first=first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None, None, None


def key_of(generator: Randomness | None) -> Key:
    """The key of one call: a `Key` itself, or a number drawn from a generator."""
    if isinstance(generator, Key):
        return generator
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator is a torch.Generator or a windlass.precision.Key, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ConfigError(f"generator must be one of the CPU, got one of {generator.device}")
    return Key(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))


def _check_input(x: Any, first: Any) -> None:
    if not isinstance(x, Tensor):
        raise ConfigError(f"quantize needs a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or x.layout != torch.strided or x.device.type not in DEVICES:
        layout = "" if x.layout == torch.strided else f", {x.layout}"
        raise ConfigError(
            f"quantize needs a dense float32 tensor on the CPU or a GPU, got {x.dtype} on {x.device}{layout}"
        )
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < 2**62:
        raise ConfigError(f"first is the position of an element, a whole number from 0 to 2^62 - 1, got {first!r}")


def _dtypes(number: NumberFormat) -> list[torch.dtype]:
    """Types that a format can be stored as."""
    if not isinstance(number, Fixed):
        return list(dict.fromkeys([torch.float32, DTYPES[number.storage]]))
    return [torch.float32, *(DTYPES[f"int{bits}"] for bits in STORAGE_BITS if bits >= number.wl)]


def _names(number: NumberFormat) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in _dtypes(number))


def _check_output(x: Tensor, number: NumberFormat, dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    """How the result is stored."""
    if out is not None:
        if out.shape != x.shape or out.device != x.device:
            raise ConfigError(
                f"out must have the shape {tuple(x.shape)} and be on {x.device}, got {tuple(out.shape)} on {out.device}"
            )
        if dtype is not None and dtype != out.dtype:
            raise ConfigError(f"dtype is {dtype}, but out has {out.dtype}")
        if out.requires_grad and torch.is_grad_enabled():
            raise ConfigError("out takes part in a gradient; round it under torch.no_grad()")
        dtype = out.dtype
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _dtypes(number):
        raise ConfigError(f"{number} is stored as {_names(number)}; got {dtype}")
    return dtype


def _round(
    x: Tensor, out: Tensor, number: NumberFormat, rounding: Rounding, generator: Randomness | None,
    counters: Counters | None, first: int,
) -> None:  # fmt: skip
    """Rounds without a graph, whatever the strides."""
    words = key_of(generator).words if rounding == "stochastic" and number != FLOAT32 else (0, 0, 0, 0)
    if x.numel() == 0:
        return
    counted: bool | Literal["nan"] = True if counters is not None else False if out.is_floating_point() else "nan"
    done = _rounder(number, rounding, out.dtype, counted).counts(x, out, words, first)
    if done is None:
        return
    if counters is not None:
        counters.add(done, x.numel())
    elif done[2]:
        raise ConfigError(
            f"{done[2]} of {x.numel()} numbers are NaN, for which {number} has no code; "
            "give counters to have them stored as 0 and counted"
        )


_rounder = cache(Rounder)
