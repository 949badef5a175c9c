"""`quantize` and `dequantize`: tensors to a number format and back, in one pass.

The kernels are in `windlass.kernels.rounding`.  Random bits belong to an element's logical position, so they depend
neither on the number of threads nor on the memory format.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from windlass.errors import ConfigError
from windlass.kernels.rounding import round_array
from windlass.plan.number import FLOAT32, STORAGE_BITS, Fixed, Key, NumberFormat, Rounding, check_rounding, parse_format
from windlass.precision.counters import Counters

Randomness = torch.Generator | Key
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    **{f"int{bits}": getattr(torch, f"int{bits}") for bits in STORAGE_BITS},
}  # fmt: skip


def quantize(
    x: Tensor, fmt: NumberFormat | str, rounding: Rounding = "stochastic", generator: Randomness | None = None, *,
    dtype: torch.dtype | None = None, out: Tensor | None = None, counters: Counters | None = None,
) -> Tensor:  # fmt: skip
    """`x` rounded to a number format.

    Args:
        x: float32, on the CPU, of any shape and strides.
        fmt: the format, or how it is written: ``fixed(16, 12)``, ``"<4,12>"``, ``"float16"``, ``"bfloat16"``.  With
            ``"float32"`` nothing is rounded and infinity stays.
        rounding: "stochastic", "nearest" (ties to even) or "floor".
        generator: where the random bits of "stochastic" come from: a `torch.Generator`, of which one number is drawn,
            or a `Key` (seed, stream, step), which gives the same bits every time.  None: PyTorch's own generator.
        dtype: how the result is stored: float32 (the numbers themselves), the format's own type, or for fixed point a
            wider integer (codes, of which `dequantize` makes numbers).  None: float32, or what `out` has.
        out: is written; `x` itself to round in place.  None: a new tensor in the memory format of `x`.
        counters: grow by what is saturated, rounded to zero and NaN, and by the errors.

    What is out of range saturates, infinities too.  NaN stays NaN; an integer has no code for it, so there it becomes 0
    and is counted, or is an error where there are no `counters`.  A zero of fixed point is +0.  For gradients rounding
    is the identity (straight-through).

    Raises:
        ConfigError: `x` is not a float32 tensor on the CPU, or the types or shapes do not fit.
    """
    number, how = parse_format(fmt), check_rounding(rounding)
    _check_input(x)
    dtype = _check_output(x, number, dtype, out)
    if out is None and x.requires_grad and torch.is_grad_enabled() and dtype == torch.float32:
        straight: Tensor = _Straight.apply(x, number, how, generator, counters)  # type: ignore[no-untyped-call]
        return straight
    result = torch.empty_like(x, dtype=dtype, requires_grad=False) if out is None else out
    _round(x.detach(), result.detach(), number, how, generator, counters)
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
    if codes.dtype.is_floating_point or not isinstance(number, Fixed):
        return codes.to(torch.float32) if out is None else out.copy_(codes)
    step = torch.tensor(number.quantum, dtype=torch.float32, device=codes.device)
    return torch.mul(codes, step, out=out)


class _Straight(torch.autograd.Function):
    """Rounds on the way forward and hands gradients through."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, number: NumberFormat, rounding: Rounding, generator: Randomness | None,
        counters: Counters | None,
    ) -> Tensor:  # fmt: skip
        return quantize(x.detach(), number, rounding, generator, counters=counters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None, None


def key_of(generator: Randomness | None) -> Key:
    """The key of one call: a `Key` itself, or a number drawn from a generator."""
    if isinstance(generator, Key):
        return generator
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"generator is a torch.Generator or a windlass.precision.Key, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ConfigError(f"generator must be one of the CPU, got one of {generator.device}")
    return Key(int(torch.empty((), dtype=torch.int64).random_(generator=generator)))


def _check_input(x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ConfigError(f"quantize needs a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32 or x.layout != torch.strided or x.device.type != "cpu":
        layout = "" if x.layout == torch.strided else f", {x.layout}"
        raise ConfigError(f"quantize needs a dense float32 tensor on the CPU, got {x.dtype} on {x.device}{layout}")


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
    counters: Counters | None,
) -> None:  # fmt: skip
    """Rounds without a graph, whatever the strides."""
    words = key_of(generator).words if rounding == "stochastic" and number != FLOAT32 else (0, 0, 0, 0)
    if x.numel() == 0:
        return
    planes = memory_order(x)
    shared = x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    same = shared and x.data_ptr() == out.data_ptr() and x.dtype == out.dtype
    if planes is None or out.stride() != x.stride() or (shared and not same):
        dense = x.contiguous()
        result = torch.empty(x.shape, dtype=out.dtype)
        _pass(dense, result, number, rounding, words, None, counters)
        out.copy_(result)
        return
    _pass(x, out, number, rounding, words, planes if planes[1] else None, counters)


def memory_order(x: Tensor) -> tuple[int, int, int] | None:
    """How the elements of a dense tensor lie: as `batch` matrices, logically [channels, pixels], in memory transposed.

    (1, 0, 0) means in logical order, as does one channel or pixel; None: neither, or not dense.
    """
    if x.is_contiguous():
        return 1, 0, 0
    dims = [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]
    order = sorted(range(len(dims)), key=lambda i: -dims[i][1])
    expected = 1
    for i in reversed(order):
        if dims[i][1] != expected:
            return None
        expected *= dims[i][0]
    first = next(place for place, i in enumerate(order) if place != i)
    moved = order[first]
    if order[first:] != [*range(moved, len(dims)), *range(first, moved)]:
        return None
    sizes = [size for size, _ in dims]
    return math.prod(sizes[:first]), math.prod(sizes[first:moved]), math.prod(sizes[moved:])


def _pass(
    x: Tensor, out: Tensor, number: NumberFormat, rounding: Rounding, words: tuple[int, int, int, int],
    planes: tuple[int, int, int] | None, counters: Counters | None,
) -> None:  # fmt: skip
    """Rounds dense tensors of equal strides."""
    if number == FLOAT32:
        out.copy_(x)
        if counters is not None:
            counters.elements += x.numel()
            counters.not_a_number += int(x.isnan().sum())
        return
    whole = isinstance(number, Fixed)
    codes = out.dtype not in (torch.float32, torch.float16, torch.bfloat16)
    counts = round_array(
        _flat(x), _flat(out), form="fixed" if whole else number.storage, rounding=rounding, low=number.lowest,
        high=number.highest, step=number.quantum if whole else 1.0, words=words, planes=planes,
        counted="all" if counters is not None else "nan" if codes else "nothing", threads=torch.get_num_threads(),
    )  # fmt: skip
    if counters is not None:
        counters.add(counts, x.numel())
    elif counts.not_a_number:
        raise ConfigError(
            f"{counts.not_a_number} of {x.numel()} numbers are NaN, for which {number} has no code; "
            "give counters to have them stored as 0 and counted"
        )


def _flat(x: Tensor) -> np.ndarray[Any, Any]:
    """The memory of a dense tensor."""
    line = x.as_strided((x.numel(),), (1,))
    array: np.ndarray[Any, Any]
    if x.dtype in (torch.float16, torch.bfloat16):
        array = line.view(torch.int16).numpy().view(np.uint16)
    else:
        array = line.numpy()
    return array
