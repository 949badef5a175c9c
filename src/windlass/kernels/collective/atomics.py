"""Counters in memory that several processes share, and how a process waits for one of them.

A store with release and a load with acquire: who sees the counter sees all that was written before it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, FEATURES

_i32 = ir.IntType(32)


@intrinsic
def _load_acquire(typing_context, counters, index):
    def generate(context, builder, signature, values):
        base = emit.pointer(context, builder, counters, values[0])
        return builder.load_atomic(builder.gep(base, [values[1]]), "acquire", 8)

    return types.int64(counters, types.int64), generate


@intrinsic
def _store_release(typing_context, counters, index, value):
    def generate(context, builder, signature, values):
        base = emit.pointer(context, builder, counters, values[0])
        builder.store_atomic(values[2], builder.gep(base, [values[1]]), "release", 8)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), generate


@intrinsic
def _relax(typing_context, crowded):
    def generate(context, builder, signature, values):
        with builder.if_else(values[0]) as (crowded_, alone):
            with crowded_:
                kind = ir.FunctionType(_i32, [])
                name = "sched_yield"
                builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])
            with alone:
                if "sse2" in FEATURES:
                    kind = ir.FunctionType(ir.VoidType(), [])
                    name = "llvm.x86.sse2.pause"
                    builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(types.boolean), generate


@intrinsic
def _view(typing_context, address, length, like):
    """An array of `length` elements of `like`'s type at an address."""

    def generate(context, builder, signature, values):
        kind = signature.return_type
        pointer = context.get_value_type(types.CPointer(kind.dtype))
        array = context.make_array(kind)(context, builder)
        item = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        size = context.get_constant(types.intp, item)
        populate_array(
            array,
            data=builder.inttoptr(values[0], pointer),
            shape=[values[1]],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return types.Array(like.dtype, 1, "C")(types.int64, types.int64, like), generate


def _load_twin(counters: Any, index: int) -> int:
    return int(counters[index])


def _store_twin(counters: Any, index: int, value: int) -> None:
    counters[index] = value


def _relax_twin(crowded: bool) -> None:
    return


def _view_twin(address: int, length: int, like: Any) -> Any:
    size = int(length) * like.itemsize
    if not size:
        return np.empty(0, dtype=like.dtype)
    memory = (ctypes.c_char * size).from_address(int(address))
    return np.frombuffer(memory, dtype=like.dtype)


load_acquire: Any = _load_twin if DISABLED else _load_acquire
"""``load_acquire(counters, index)``: a counter, and with it all that was written before it was stored."""
store_release: Any = _store_twin if DISABLED else _store_release
"""``store_release(counters, index, value)``: makes all that was written before visible with the counter."""
relax: Any = _relax_twin if DISABLED else _relax
"""``relax(crowded)``: one turn of waiting; where processes outnumber cores it lets another one run."""
view: Any = _view_twin if DISABLED else _view
"""``view(address, length, like)``: an array of `like`'s type at an address; it owns nothing."""
