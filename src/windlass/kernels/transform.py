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
def _transform(typing_context, which, m, r, src, src_at, src_row, src_col, dst, dst_at, dst_row, dst_col):  # type: ignore[no-untyped-def]
    program = winograd_program(which.literal_value, m.literal_value, r.literal_value)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
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
def _finish(typing_context, m, r, src, src_at, src_row, src_col, bias, bias_at, floor, dst, dst_at, dst_row, dst_col):  # type: ignore[no-untyped-def]
    program = winograd_program("AT", m.literal_value, r.literal_value)

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
        source = emit.pointer(context, builder, src, values[2])
        target = emit.pointer(context, builder, dst, values[9])
        added = emit.load(builder, emit.pointer(context, builder, bias, values[6]), values[7])
        lowest = emit.splat(builder, values[8])
        at, row, col, to, to_row, to_col = (values[i] for i in (3, 4, 5, 10, 11, 12))

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
                emit.store(
                    builder, builder.select(below, lowest, total), target, place(to, i, to_row, j, to_col)
                )
        return context.get_dummy_value()

    offsets = [types.int64] * 3
    return types.void(m, r, src, *offsets, bias, types.int64, types.float32, dst, *offsets), generate


def _finish_python(
    m: int, r: int, src: Any, src_at: int, src_row: int, src_col: int, bias: Any, bias_at: int, floor: float,
    dst: Any, dst_at: int, dst_row: int, dst_col: int,
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
"""finish(m, r, src, …, bias, bias_at, floor, dst, …): Aᵀ · M · A + bias, and `floor` where that is less.

A floor of -inf changes nothing, one of 0 is ReLU; NaN stays NaN.
"""


@intrinsic
def _transpose(typing_context, src, src_at, src_row, dst, dst_at, dst_row):  # type: ignore[no-untyped-def]
    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
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
        rows = [
            builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in masks
        ]
    return rows


def _transpose_python(src: Any, src_at: int, src_row: int, dst: Any, dst_at: int, dst_row: int) -> None:
    source, target = emit.flat(src), emit.flat(dst)
    block = np.stack([source[src_at + i * src_row :][:LANES] for i in range(LANES)])
    for i in range(LANES):
        target[dst_at + i * dst_row :][:LANES] = block[:, i]


transpose: Callable[..., None] = _transpose_python if DISABLED else _transpose
"""transpose(src, src_at, src_row, dst, dst_at, dst_row): 16 rows of 16 numbers become columns."""
