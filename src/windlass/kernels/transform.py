"""Vector transforms of blocks of 16 channels: a matrix on both sides, transposition, and the epilogue of a tile.

Legend: "element (i, j) of a grid" is a vector of 16 numbers at offset + i·row + j·column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES
from windlass.plan.linear import Program, matrix_program, run
from windlass.plan.toomcook import Matrix, transposed, winograd


@cache
def winograd_program(which: str, m: int, r: int) -> Program:
    """The program of one of F(m, r)'s matrices: "BT", "G", "AT", or of the adjoints "A" and "GT"."""
    return matrix_program(_matrix(which, m, r))


def _matrix(which: str, m: int, r: int) -> Matrix:
    algorithm = winograd(m, r)
    matrices = {"BT": algorithm.BT, "G": algorithm.G, "AT": algorithm.AT}
    return matrices[which] if which in matrices else transposed(matrices[{"A": "AT", "GT": "G"}[which]])


def _sandwich(program: Program, load: Callable[[int, int], Any], apply: Callable[..., list[Any]]) -> list[list[Any]]:
    """Rows of program · X · programᵀ: columns first."""
    n = program.num_inputs
    columns = [apply(program, [load(i, j) for i in range(n)]) for j in range(n)]
    return [apply(program, [column[i] for column in columns]) for i in range(len(program.outputs))]


@intrinsic(prefer_literal=True)
def _transform(typing_context, which, m, r, src, src_at, src_row, src_col, dst, dst_at, dst_row, dst_col):
    program = winograd_program(which.literal_value, m.literal_value, r.literal_value)

    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[3])
        target = emit.pointer(context, builder, dst, values[7])
        at, row, col, to, to_row, to_col = (values[i] for i in (4, 5, 6, 8, 9, 10))

        def place(start: Any, i: int, row_: Any, j: int, col_: Any) -> Any:
            down = builder.add(start, builder.mul(emit.constant(i), row_))
            return builder.add(down, builder.mul(emit.constant(j), col_))

        rows = _sandwich(
            program,
            lambda i, j: emit.load(builder, source, place(at, i, row, j, col)),
            lambda part, inputs: emit.emit(builder, part, inputs),
        )
        for i, outputs in enumerate(rows):
            for j, value in enumerate(outputs):
                emit.store(builder, value, target, place(to, i, to_row, j, to_col))
        return context.get_dummy_value()

    offsets = [types.int64] * 3
    return types.void(which, m, r, src, *offsets, dst, *offsets), generate


def _transform_python(
    which: str, m: int, r: int, src: Any, src_at: int, src_row: int, src_col: int,
    dst: Any, dst_at: int, dst_row: int, dst_col: int,
) -> None:  # fmt: skip
    source, target = emit.flat(src), emit.flat(dst)
    rows = _sandwich(
        winograd_program(which, m, r),
        lambda i, j: source[src_at + i * src_row + j * src_col :][:LANES].copy(),
        run,
    )
    for i, outputs in enumerate(rows):
        for j, value in enumerate(outputs):
            target[dst_at + i * dst_row + j * dst_col :][:LANES] = value


transform: Callable[..., None] = _transform_python if DISABLED else _transform
"""transform(which, m, r, src, src_at, src_row, src_col, dst, dst_at, dst_row, dst_col): M · X · Mᵀ on a grid.

`which` names the matrix of F(m, r) as in `winograd_program`; it and m, r are constants at compile time.
"""


@intrinsic(prefer_literal=True)
def _finish(
    typing_context, m, r, stream, src, src_at, src_row, src_col, bias, bias_at, floor, dst, dst_at, dst_row, dst_col
):
    program = winograd_program("AT", m.literal_value, r.literal_value)

    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[3])
        target = emit.pointer(context, builder, dst, values[10])
        added = emit.load(builder, emit.pointer(context, builder, bias, values[7]), values[8])
        lowest = emit.splat(builder, values[9])
        at, row, col, to, to_row, to_col = (values[i] for i in (4, 5, 6, 11, 12, 13))

        def place(start: Any, i: int, row_: Any, j: int, col_: Any) -> Any:
            down = builder.add(start, builder.mul(emit.constant(i), row_))
            return builder.add(down, builder.mul(emit.constant(j), col_))

        rows = _sandwich(
            program,
            lambda i, j: emit.load(builder, source, place(at, i, row, j, col)),
            lambda part, inputs: emit.emit(builder, part, inputs),
        )
        for i, outputs in enumerate(rows):
            for j, value in enumerate(outputs):
                total = builder.fadd(value, added)
                below = builder.fcmp_ordered("<", total, lowest)
                result = builder.select(below, lowest, total)
                to_ij = place(to, i, to_row, j, to_col)
                emit.store(builder, result, target, to_ij, stream=bool(stream.literal_value))
        return context.get_dummy_value()

    offsets = [types.int64] * 3
    return types.void(m, r, stream, src, *offsets, bias, types.int64, types.float32, dst, *offsets), generate


def _finish_python(
    m: int, r: int, stream: int, src: Any, src_at: int, src_row: int, src_col: int,
    bias: Any, bias_at: int, floor: float, dst: Any, dst_at: int, dst_row: int, dst_col: int,
) -> None:  # fmt: skip
    source, target, added = emit.flat(src), emit.flat(dst), emit.flat(bias)[bias_at:][:LANES]
    rows = _sandwich(
        winograd_program("AT", m, r), lambda i, j: source[src_at + i * src_row + j * src_col :][:LANES].copy(), run
    )
    for i, outputs in enumerate(rows):
        for j, value in enumerate(outputs):
            total = value + added
            target[dst_at + i * dst_row + j * dst_col :][:LANES] = np.where(total < floor, np.float32(floor), total)


finish: Callable[..., None] = _finish_python if DISABLED else _finish
"""finish(m, r, stream, src, …, bias, bias_at, floor, dst, …): Aᵀ · M · A + bias, and `floor` where that is less.

A floor of -inf changes nothing, one of 0 is ReLU; NaN stays NaN.  With `stream` 1 the
result goes past the caches to addresses aligned to 64 bytes.
"""


@intrinsic
def _transpose(typing_context, src, src_at, src_row, dst, dst_at, dst_row):
    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[0])
        target = emit.pointer(context, builder, dst, values[3])
        rows = [
            emit.load(builder, source, builder.add(values[1], builder.mul(emit.constant(i), values[2])))
            for i in range(LANES)
        ]
        for i, value in enumerate(_transposed(builder, rows)):
            emit.store(builder, value, target, builder.add(values[4], builder.mul(emit.constant(i), values[5])))
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64, types.int64), generate


def _transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """16 × 16 by four rounds of interleaving rows i and i + 8."""
    low = [index for i in range(LANES // 2) for index in (i, LANES + i)]
    high = [index + LANES // 2 for index in low]
    masks = [ir.Constant(ir.VectorType(emit.i32, LANES), mask) for mask in (low, high)]
    half = LANES // 2
    for _ in range(LANES.bit_length() - 1):
        rows = [builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in masks]
    return rows


def _transpose_python(src: Any, src_at: int, src_row: int, dst: Any, dst_at: int, dst_row: int) -> None:
    source, target = emit.flat(src), emit.flat(dst)
    block = np.stack([source[src_at + i * src_row :][:LANES] for i in range(LANES)])
    for i in range(LANES):
        target[dst_at + i * dst_row :][:LANES] = block[:, i]


transpose: Callable[..., None] = _transpose_python if DISABLED else _transpose
"""transpose(src, src_at, src_row, dst, dst_at, dst_row): 16 rows of 16 numbers become columns."""


@intrinsic
def _move(typing_context, src, src_at, dst, dst_at):
    def generate(context, builder, signature, values):
        value = emit.load(builder, emit.pointer(context, builder, src, values[0]), values[1])
        emit.store(builder, value, emit.pointer(context, builder, dst, values[2]), values[3])
        return context.get_dummy_value()

    return types.void(src, types.int64, dst, types.int64), generate


def _move_python(src: Any, src_at: int, dst: Any, dst_at: int) -> None:
    emit.flat(dst)[dst_at:][:LANES] = emit.flat(src)[src_at:][:LANES]


move: Callable[..., None] = _move_python if DISABLED else _move
"""move(src, src_at, dst, dst_at): 16 numbers."""


@intrinsic
def _clear(typing_context, dst, dst_at):
    def generate(context, builder, signature, values):
        emit.store(builder, emit.splat(builder, 0.0), emit.pointer(context, builder, dst, values[0]), values[1])
        return context.get_dummy_value()

    return types.void(dst, types.int64), generate


def _clear_python(dst: Any, dst_at: int) -> None:
    emit.flat(dst)[dst_at:][:LANES] = 0


clear: Callable[..., None] = _clear_python if DISABLED else _clear
"""clear(dst, dst_at): 16 zeros."""


@intrinsic(prefer_literal=True)
def _prefetch(typing_context, rows, cols, src, src_at, src_row, src_col):
    def generate(context, builder, signature, values):
        base = emit.pointer(context, builder, src, values[2])
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[emit.i32] * 3])
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        read_into_l1 = [ir.Constant(emit.i32, value) for value in (0, 3, 1)]
        for i in range(rows.literal_value):
            for j in range(cols.literal_value):
                down = builder.add(values[3], builder.mul(emit.constant(i), values[4]))
                address = builder.gep(base, [builder.add(down, builder.mul(emit.constant(j), values[5]))])
                builder.call(function, [builder.bitcast(address, ir.IntType(8).as_pointer()), *read_into_l1])
        return context.get_dummy_value()

    return types.void(rows, cols, src, types.int64, types.int64, types.int64), generate


def _prefetch_python(rows: int, cols: int, src: Any, src_at: int, src_row: int, src_col: int) -> None:
    pass


prefetch: Callable[..., None] = _prefetch_python if DISABLED else _prefetch
"""prefetch(rows, cols, src, src_at, src_row, src_col): asks for the lines of a grid; any address will do."""
