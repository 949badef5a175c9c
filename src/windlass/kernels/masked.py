"""Intrinsics that carry 16 channels of pixels between images and buffers, whatever part of them exists.

A buffer holds pixels side by side, 16 channels each.  Channels and columns that do not exist are read as zeros
and not written, by masks: nothing beyond an image is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES
from windlass.kernels.transform import _transposed

_i1 = ir.IntType(1)
_mask = ir.VectorType(_i1, LANES)


def _lanes(builder: ir.IRBuilder, first: Any, last: Any) -> Any:
    """The mask of the lanes first ≤ lane < last."""
    kind = ir.VectorType(emit.i64, LANES)
    numbers = ir.Constant(kind, list(range(LANES)))

    def spread(value: Any) -> Any:
        undefined = ir.Constant(kind, ir.Undefined)
        one = builder.insert_element(undefined, value, ir.Constant(emit.i32, 0))
        return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(emit.i32, LANES), [0] * LANES))

    low = builder.icmp_signed(">=", numbers, spread(first))
    return builder.and_(low, builder.icmp_signed("<", numbers, spread(last)))


def _only(builder: ir.IRBuilder, condition: Any, mask: Any) -> Any:
    """The mask where the condition holds, else none."""
    return builder.select(condition, mask, ir.Constant(_mask, [0] * LANES))


def _load(builder: ir.IRBuilder, base: Any, offset: Any, mask: Any) -> Any:
    """A vector from base[offset:], zero and not read outside the mask."""
    kind = ir.FunctionType(emit.vector, [emit.vector.as_pointer(), emit.i32, _mask, emit.vector])
    name = f"llvm.masked.load.v{LANES}f32.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    address = builder.bitcast(builder.gep(base, [offset]), emit.vector.as_pointer())
    return builder.call(function, [address, ir.Constant(emit.i32, 4), mask, emit.splat(builder, 0.0)])


def _store(builder: ir.IRBuilder, value: Any, base: Any, offset: Any, mask: Any) -> None:
    """A vector to base[offset:], inside the mask."""
    kind = ir.FunctionType(ir.VoidType(), [emit.vector, emit.vector.as_pointer(), emit.i32, _mask])
    name = f"llvm.masked.store.v{LANES}f32.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    address = builder.bitcast(builder.gep(base, [offset]), emit.vector.as_pointer())
    builder.call(function, [value, address, ir.Constant(emit.i32, 4), mask])


def _row(builder: ir.IRBuilder, start: Any, i: int, step: Any) -> Any:
    return builder.add(start, builder.mul(emit.constant(i), step))


@intrinsic
def _pixel_in(typing_context, src, src_at, channels, dst, dst_at):
    def generate(context, builder, signature, values):
        mask = _lanes(builder, emit.constant(0), values[2])
        value = _load(builder, emit.pointer(context, builder, src, values[0]), values[1], mask)
        emit.store(builder, value, emit.pointer(context, builder, dst, values[3]), values[4])
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64), generate


def _pixel_in_python(src: Any, src_at: int, channels: int, dst: Any, dst_at: int) -> None:
    count = min(LANES, channels)
    target = emit.flat(dst)
    target[dst_at : dst_at + LANES] = 0
    target[dst_at : dst_at + count] = emit.flat(src)[src_at : src_at + count]


pixel_in: Callable[..., None] = _pixel_in_python if DISABLED else _pixel_in
"""pixel_in(src, src_at, channels, dst, dst_at): so many channels side by side, zeros up to 16."""


@intrinsic
def _columns_in(typing_context, src, src_at, src_row, channels, first, last, dst, dst_at, dst_row):
    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[0])
        target = emit.pointer(context, builder, dst, values[6])
        mask = _lanes(builder, values[4], values[5])
        rows = []
        for i in range(LANES):
            exists = builder.icmp_signed("<", emit.constant(i), values[3])
            rows.append(_load(builder, source, _row(builder, values[1], i, values[2]), _only(builder, exists, mask)))
        for i, value in enumerate(_transposed(builder, rows)):
            emit.store(builder, value, target, _row(builder, values[7], i, values[8]))
        return context.get_dummy_value()

    whole = types.int64
    return types.void(src, whole, whole, whole, whole, whole, dst, whole, whole), generate


def _columns_in_python(
    src: Any, src_at: int, src_row: int, channels: int, first: int, last: int, dst: Any, dst_at: int, dst_row: int
) -> None:
    source, target = emit.flat(src), emit.flat(dst)
    for q in range(LANES):
        target[dst_at + q * dst_row :][:LANES] = 0
        for c in range(min(LANES, channels) if first <= q < last else 0):
            target[dst_at + q * dst_row + c] = source[src_at + c * src_row + q]


columns_in: Callable[..., None] = _columns_in_python if DISABLED else _columns_in
"""columns_in(src, src_at, src_row, channels, first, last, dst, dst_at, dst_row): a 16 × 16 transposition.

dst[q][c] = src[c][q] for c < channels and first ≤ q < last, the others are zero.
"""


def _finished(builder: ir.IRBuilder, value: Any, scale: Any, added: Any, lowest: Any) -> Any:
    """`scale` · value + added, and `lowest` where that is less; NaN stays NaN."""
    total = emit.fma(builder, value, scale, added)
    return builder.select(builder.fcmp_ordered("<", total, lowest), lowest, total)


def _finished_python(value: Any, scale: float, added: Any, floor: float) -> Any:
    total = value * np.float32(scale) + added
    return np.where(total < floor, np.float32(floor), total)


@intrinsic(prefer_literal=True)
def _pixel_out(typing_context, stream, src, src_at, scale, bias, bias_at, floor, dst, dst_at, channels):
    def generate(context, builder, signature, values):
        added = emit.load(builder, emit.pointer(context, builder, bias, values[4]), values[5])
        value = emit.load(builder, emit.pointer(context, builder, src, values[1]), values[2])
        result = _finished(builder, value, emit.splat(builder, values[3]), added, emit.splat(builder, values[6]))
        target = emit.pointer(context, builder, dst, values[7])
        if stream.literal_value:
            emit.store(builder, result, target, values[8], stream=True)
        else:
            _store(builder, result, target, values[8], _lanes(builder, emit.constant(0), values[9]))
        return context.get_dummy_value()

    whole, real = types.int64, types.float32
    return types.void(stream, src, whole, real, bias, whole, real, dst, whole, whole), generate


def _pixel_out_python(
    stream: int, src: Any, src_at: int, scale: float, bias: Any, bias_at: int, floor: float, dst: Any, dst_at: int,
    channels: int,
) -> None:  # fmt: skip
    count = min(LANES, channels)
    result = _finished_python(emit.flat(src)[src_at:][:LANES], scale, emit.flat(bias)[bias_at:][:LANES], floor)
    emit.flat(dst)[dst_at : dst_at + count] = result[:count]


pixel_out: Callable[..., None] = _pixel_out_python if DISABLED else _pixel_out
"""pixel_out(stream, src, src_at, scale, bias, bias_at, floor, dst, dst_at, channels): max(scale · src + bias, floor).

With `stream` 1 all 16 channels go past the caches to an address aligned to 64 bytes.
"""


@intrinsic
def _columns_out(
    typing_context, src, src_at, src_row, scale, bias, bias_at, floor, dst, dst_at, dst_row, channels, columns
):
    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[0])
        target = emit.pointer(context, builder, dst, values[7])
        added = emit.load(builder, emit.pointer(context, builder, bias, values[4]), values[5])
        scale_, lowest = emit.splat(builder, values[3]), emit.splat(builder, values[6])
        loaded = [emit.load(builder, source, _row(builder, values[1], i, values[2])) for i in range(LANES)]
        rows = [_finished(builder, value, scale_, added, lowest) for value in loaded]
        mask = _lanes(builder, emit.constant(0), values[11])
        for i, value in enumerate(_transposed(builder, rows)):
            exists = builder.icmp_signed("<", emit.constant(i), values[10])
            _store(builder, value, target, _row(builder, values[8], i, values[9]), _only(builder, exists, mask))
        return context.get_dummy_value()

    whole, real = types.int64, types.float32
    return types.void(src, whole, whole, real, bias, whole, real, dst, *[whole] * 4), generate


def _columns_out_python(
    src: Any, src_at: int, src_row: int, scale: float, bias: Any, bias_at: int, floor: float,
    dst: Any, dst_at: int, dst_row: int, channels: int, columns: int,
) -> None:  # fmt: skip
    source = emit.flat(src)
    block = np.stack([source[src_at + q * src_row :][:LANES] for q in range(LANES)])
    result = _finished_python(block, scale, emit.flat(bias)[bias_at:][:LANES], floor)
    for c in range(min(LANES, channels)):
        count = min(LANES, columns)
        emit.flat(dst)[dst_at + c * dst_row :][:count] = result[:count, c]


columns_out: Callable[..., None] = _columns_out_python if DISABLED else _columns_out
"""columns_out(src, src_at, src_row, scale, bias, bias_at, floor, dst, dst_at, dst_row, channels, columns).

dst[c][q] = max(scale · src[q][c] + bias[c], floor) for c < channels and q < columns.
"""
