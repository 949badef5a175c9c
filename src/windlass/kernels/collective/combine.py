"""Element by element reductions of buffers: sum, product, greatest, least, for floats, integers and both halves.

Halves are widened to float32, combined there, and rounded to nearest even once per call of `combine`.  A NaN in
either buffer makes the greatest and the least NaN, as `torch.maximum` has it.  Integers wrap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from windlass.kernels.collective.halves import narrow_bfloat16, narrow_float16, widen_bfloat16, widen_float16
from windlass.kernels.jit import kernel

OPS = {"sum": 0, "max": 1, "min": 2, "prod": 3}
"""Reductions by name, as kernels know them."""
BLOCK = 1024
"""Elements that are reduced at a time: their accumulators stay in the first cache."""

STORAGE: dict[str, Any] = {
    "float32": np.float32, "float64": np.float64, "int32": np.int32, "int16": np.int16, "int64": np.int64,
    "int8": np.int8, "uint8": np.uint8, "float16": np.uint16, "bfloat16": np.uint16,
}  # fmt: skip
"""How a dtype's numbers are stored in NumPy: halves as their bits."""
WIDE: dict[str, Any] = {name: np.float32 if name in ("float16", "bfloat16") else kind for name, kind in STORAGE.items()}
"""The type in which a dtype's numbers are combined."""
_KINDS = {"bfloat16": 1, "float16": 2}


def _same(value: Any) -> Any:
    return value


@cache
def _conversions(kind: int) -> tuple[Any, Any]:
    """From storage to the wide type, and back."""
    if kind == 1:
        return widen_bfloat16, narrow_bfloat16
    if kind == 2:
        return widen_float16, narrow_float16
    same = kernel(_same)
    return same, same


@cache
def make_steps(kind: int) -> tuple[Any, Any, Any]:
    """Kernels (take, fold, give) for one storage.

    - ``take(acc, source, at, n)``: acc[:n] = source[at : at + n], widened;
    - ``fold(acc, source, at, n, op)``: acc[:n] combined with it;
    - ``give(acc, target, at, n)``: target[at : at + n] = acc[:n], rounded.
    """
    widen, narrow = _conversions(kind)

    # Slices first: an index that a loop counts from 0 needs no test for negative ones, and loops become vectors.
    def take(acc, source, at, n):
        to, part = acc[:n], source[at : at + n]
        for i in range(n):
            to[i] = widen(part[i])

    def fold(acc, source, at, n, op):
        to, part = acc[:n], source[at : at + n]
        if op == 0:
            for i in range(n):
                to[i] += widen(part[i])
        elif op == 1:
            for i in range(n):
                a, b = to[i], widen(part[i])
                to[i] = a if a > b or a != a else b
        elif op == 2:
            for i in range(n):
                a, b = to[i], widen(part[i])
                to[i] = a if a < b or a != a else b
        else:
            for i in range(n):
                to[i] *= widen(part[i])

    def give(acc, target, at, n):
        part, source = target[at : at + n], acc[:n]
        for i in range(n):
            part[i] = narrow(source[i])

    return kernel(take, key=(kind,)), kernel(fold, key=(kind,)), kernel(give, key=(kind,))


@cache
def _make_combine(kind: int) -> Callable[..., None]:
    take, fold, give = make_steps(kind)

    def combine(target, source, acc, op):
        for start in range(0, target.size, acc.size):
            n = min(acc.size, target.size - start)
            take(acc, target, start, n)
            fold(acc, source, start, n, op)
            give(acc, target, start, n)

    return kernel(combine, key=(kind,))


def kind_of(dtype: str) -> int:
    """The storage's number, as kernels know it."""
    return _KINDS.get(dtype, 0)


def scratch_of(dtype: str) -> Any:
    """Accumulators for one caller."""
    return np.empty(BLOCK, dtype=WIDE[dtype])


def combine(target: Any, source: Any, *, dtype: str, op: str, scratch: Any | None = None) -> None:
    """``target`` becomes ``target`` op ``source``, element by element, rounded once.

    Args:
        target: 1-D contiguous array, stored as `STORAGE` says.
        source: the other, of the same length and type.
        dtype: what the numbers are.
        op: ``sum``, ``max``, ``min`` or ``prod``.
        scratch: of `scratch_of`; None: new.
    """
    acc = scratch_of(dtype) if scratch is None else scratch
    _make_combine(kind_of(dtype))(target, source, acc, OPS[op])


@cache
def _make_scale(kind: int) -> Callable[..., None]:
    widen, narrow = _conversions(kind)

    def scale(target, divisor):
        for i in range(target.size):
            target[i] = narrow(widen(target[i]) / divisor)

    return kernel(scale, key=(kind,))


def divide(target: Any, divisor: int, *, dtype: str) -> None:
    """Divides by a whole number, rounded once; integers towards zero."""
    if np.issubdtype(WIDE[dtype], np.integer):
        np.copyto(target, np.trunc(target / divisor).astype(target.dtype))
        return
    _make_scale(kind_of(dtype))(target, WIDE[dtype](divisor))
