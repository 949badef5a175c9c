"""Building blocks for intrinsics: pointers into arrays, vectors of `LANES` numbers, programs as instructions.

An intrinsic here takes arrays with offsets counted in elements from the array's first element, whatever its
shape and strides.  Each has a twin in NumPy, which runs in its place when kernels are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types

from windlass.kernels.jit import LANES
from windlass.plan.linear import Op, Program, evaluate

i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
vector = ir.VectorType(f32, LANES)


def pointer(context: Any, builder: ir.IRBuilder, array_type: Any, value: Any) -> Any:
    """The address of an array's first element; of a tuple's only array."""
    return context.make_array(array_type)(context, builder, value).data


def constant(value: int) -> ir.Constant:
    """A 64-bit whole number."""
    return ir.Constant(i64, value)


def load(builder: ir.IRBuilder, base: Any, offset: Any) -> Any:
    """A vector from `base[offset:]`, unaligned."""
    address = builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())
    return builder.load(address, align=4)


def store(builder: ir.IRBuilder, value: Any, base: Any, offset: Any, *, stream: bool = False) -> None:
    """A vector to `base[offset:]`, unaligned; with `stream` aligned to 64 bytes, and past the caches."""
    address = builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())
    instruction = builder.store(value, address, align=64 if stream else 4)
    if stream:
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(i32, 1)]))


def splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    """A vector of equal numbers."""
    if isinstance(scalar, float):
        return ir.Constant(vector, [float(np.float32(scalar))] * LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(i32, 0))
    mask = ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def fma(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """`a` · b + c with one rounding where the host has it, two where it has not."""
    name = f"llvm.fmuladd.v{LANES}f32"
    kind = ir.FunctionType(vector, [vector] * 3)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


def emit(builder: ir.IRBuilder, program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The program as instructions on vectors."""

    def apply(op: Op, a: Any, b: Any) -> Any:
        match op.kind:
            case "add":
                return builder.fadd(a, b)
            case "sub":
                return builder.fsub(a, b)
            case "neg":
                return builder.fneg(a)
            case "mul":
                return builder.fmul(a, splat(builder, op.constant))
            case "fma":
                return fma(builder, a, splat(builder, op.constant), b)
            case _:
                return splat(builder, 0.0)

    return evaluate(program, inputs, apply)


def loop(
    builder: ir.IRBuilder, count: Any, state: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """Repeats `body(index, values)` `count` times, at least once; it gives the next values."""
    before = builder.block
    head = builder.append_basic_block("loop")
    after = builder.append_basic_block("after")
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(i64)
    index.add_incoming(constant(0), before)
    values = [builder.phi(value.type) for value in state]
    for phi, value in zip(values, state, strict=True):
        phi.add_incoming(value, before)
    following = body(index, values)
    step = builder.add(index, constant(1))
    index.add_incoming(step, builder.block)
    for phi, value in zip(values, following, strict=True):
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", step, count), head, after)
    builder.position_at_end(after)
    return list(following)


def is_array(kind: Any) -> bool:
    """Whether a Numba type is an array of float32."""
    return isinstance(kind, types.Array) and kind.dtype == types.float32


def flat(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """For twins: memory from an array's first element on, as far as the array reaches."""
    if array.size == 0:
        return np.empty(0, array.dtype)
    reach = 1 + sum((n - 1) * s // array.itemsize for n, s in zip(array.shape, array.strides, strict=True))
    return np.lib.stride_tricks.as_strided(array, (reach,), (array.itemsize,))
