"""Which MPI types move, and which reduce, a tensor's elements.

MPI moves any element by its size.  It reduces what it has a type and an operation for; for the rest (16-bit
floats, booleans, order by bits) `exchange` folds contributions with PyTorch's own operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mpi4py import MPI

from windlass.errors import ConfigError

_MOVED: dict[int, MPI.Datatype] = {
    1: MPI.BYTE,
    2: MPI.INT16_T,
    4: MPI.INT32_T,
    8: MPI.INT64_T,
    16: MPI.C_DOUBLE_COMPLEX,
}

_FLOATS = {torch.float32: MPI.FLOAT, torch.float64: MPI.DOUBLE}
_INTEGERS = {
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.uint16: MPI.UINT16_T,
    torch.int32: MPI.INT32_T,
    torch.uint32: MPI.UINT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint64: MPI.UINT64_T,
}
_COMPLEX = {torch.complex64: MPI.C_FLOAT_COMPLEX, torch.complex128: MPI.C_DOUBLE_COMPLEX}

_ARITHMETIC = {"sum": MPI.SUM, "product": MPI.PROD}
_ORDER = {"max": MPI.MAX, "min": MPI.MIN}
_BITS = {"and": MPI.BAND, "or": MPI.BOR, "xor": MPI.BXOR}

MPI_OPERATIONS: dict[tuple[torch.dtype, str], tuple[MPI.Datatype, MPI.Op]] = {
    (dtype, name): (mpi_type, operation)
    for types, operations in (
        (_FLOATS, _ARITHMETIC | _ORDER),
        (_INTEGERS, _ARITHMETIC | _ORDER | _BITS),
        (_COMPLEX, _ARITHMETIC),
    )
    for dtype, mpi_type in types.items()
    for name, operation in operations.items()
}
"""What MPI reduces itself: by dtype and operation."""

Fold = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FOLDS: dict[str, Fold] = {
    "sum": torch.Tensor.add_,
    "product": torch.Tensor.mul_,
    "max": lambda total, part: torch.maximum(total, part, out=total),
    "min": lambda total, part: torch.minimum(total, part, out=total),
    "and": torch.Tensor.bitwise_and_,
    "or": torch.Tensor.bitwise_or_,
    "xor": torch.Tensor.bitwise_xor_,
}
"""How a contribution is folded into a total by PyTorch."""

_OF_BOOLEANS = {"sum": "or", "max": "or", "product": "and", "min": "and"}
_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""16-bit floats are added in 32 bits and rounded once."""


def message(tensor: torch.Tensor) -> list[Any]:
    """A contiguous tensor's memory as MPI moves it: any element type, by its size."""
    size = tensor.element_size()
    return [MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), tensor.numel(), _MOVED[size]]


def pieces(tensor: torch.Tensor, counts: list[int]) -> list[Any]:
    """The same, cut along its elements into consecutive pieces of `counts`, one for every rank."""
    memory, _, mpi_type = message(tensor)
    return [memory, counts, None, mpi_type]


def reduction(tensor: torch.Tensor, mpi_type: MPI.Datatype) -> list[Any]:
    """A contiguous tensor's memory with the type that MPI reduces it as."""
    return [MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), tensor.numel(), mpi_type]


def check_operation(dtype: torch.dtype, op: str) -> str:
    """The operation that serves `op` on elements of `dtype`; refuses what has no meaning."""
    if dtype == torch.bool:
        return _OF_BOOLEANS.get(op, op)
    if op in _BITS and (dtype.is_floating_point or dtype.is_complex):
        raise ConfigError(f"the bitwise {op} of {dtype} has no meaning; it needs integers or booleans")
    if op in _ORDER and dtype.is_complex:
        raise ConfigError(f"complex numbers have no {op}; the operations on {dtype} are sum, mean and product")
    return op


def fold(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The contributions of all ranks, reduced in the order of the list."""
    total = parts[0].to(_WIDE.get(parts[0].dtype, parts[0].dtype), copy=True)
    for part in parts[1:]:
        FOLDS[op](total, part.to(total.dtype))
    return total.to(parts[0].dtype)
