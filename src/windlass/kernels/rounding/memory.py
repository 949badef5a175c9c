"""Arrays inside kernels over memory that Python does not wrap: at an address, or on the stack.

To hand an array from Python to a kernel takes longer than to round a thousand numbers; a whole number takes nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED
from windlass.kernels.rounding.convert import STORAGES

KINDS = (*(np.dtype(kind) for kind in STORAGES.values()), np.dtype(np.int64), np.dtype(np.float64))
"""Types of numbers, those of storage first and in their order."""
FLOAT, HALF, COUNT, SUM = 0, 4, 5, 6
"""Places in `KINDS`: of what is rounded, random bits, counts and sums of errors."""

ALIGNMENT = 64


def _describe(context: Any, builder: ir.IRBuilder, kind: types.Array, data: Any, size: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    width = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    shape, strides = cgutils.pack_array(builder, [size]), cgutils.pack_array(builder, [width])
    populate_array(array, data=data, shape=shape, strides=strides, itemsize=width, meminfo=None)
    return array._getvalue()


@intrinsic(prefer_literal=True)
def _array_at(typing_context, kind, address, size):
    array = types.Array(from_dtype(KINDS[kind.literal_value]), 1, "C")

    def generate(context, builder, signature, values):
        data = builder.inttoptr(values[1], context.get_data_type(array.dtype).as_pointer())
        return _describe(context, builder, array, data, values[2])

    return array(kind, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def _on_stack(typing_context, kind, size):
    array = types.Array(from_dtype(KINDS[kind.literal_value]), 1, "C")

    def generate(context, builder, signature, values):
        room = ir.ArrayType(context.get_data_type(array.dtype), size.literal_value)
        with builder.goto_entry_block():
            block = builder.alloca(room)
            block.align = ALIGNMENT
        data = builder.bitcast(block, context.get_data_type(array.dtype).as_pointer())
        return _describe(context, builder, array, data, emit.constant(size.literal_value))

    return array(kind, size), generate


def _array_at_python(kind: int, address: int, size: int) -> Any:
    room = (ctypes.c_uint8 * (size * KINDS[kind].itemsize)).from_address(address)
    return np.ctypeslib.as_array(room).view(KINDS[kind])


def _on_stack_python(kind: int, size: int) -> Any:
    return np.empty(size, KINDS[kind])


array_at: Callable[..., Any] = _array_at_python if DISABLED else _array_at
"""array_at(kind, address, size): `size` numbers of KINDS[kind] from an address on; `kind` is a constant."""

on_stack: Callable[..., Any] = _on_stack_python if DISABLED else _on_stack
"""on_stack(kind, size): an array of KINDS[kind] that is gone when the kernel returns; both are constants."""
