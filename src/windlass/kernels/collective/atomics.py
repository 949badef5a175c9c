"""Counters in memory that several processes share, and how a process waits for one of them.

A store with release and a load with acquire: who sees the counter sees all that was written before it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

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


def _load_twin(counters: Any, index: int) -> int:
    return int(counters[index])


def _store_twin(counters: Any, index: int, value: int) -> None:
    counters[index] = value


def _relax_twin(crowded: bool) -> None:
    return


load_acquire: Any = _load_twin if DISABLED else _load_acquire
"""``load_acquire(counters, index)``: a counter, and with it all that was written before it was stored."""
store_release: Any = _store_twin if DISABLED else _store_release
"""``store_release(counters, index, value)``: makes all that was written before visible with the counter."""
relax: Any = _relax_twin if DISABLED else _relax
"""``relax(crowded)``: one turn of waiting; where processes outnumber cores it lets another one run."""
