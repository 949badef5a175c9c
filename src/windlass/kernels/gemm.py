"""The matrix micro-kernel that all algorithms share: a tile of accumulators that stays in registers.

    C[i, j] (+)= Σ_k A[i, k] · B[k, j],   i < rows ≤ TILE_ROWS,  j < TILE_COLUMNS

The sum starts at zero and C is added last, so that a long sum taken in pieces is a sum of short ones, with the
smaller error of those.

B's rows are vectors, A's numbers are broadcast.  With 14 × 32 accumulators on AVX-512 a step of k is 28 fused
multiply-adds for 16 loads, so that the multiply-adds are the limit.

A lies in one of two ways: `gemm_rows` has steps of k side by side (Winograd's tiles × channels, pixels ×
channels); `gemm_columns` has the rows i side by side (gradients of weights: channels of one tile).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, TILE_BLOCKS, TILE_COLUMNS, TILE_ROWS

UNROLL = 4
"""Steps of k between two branches."""


def _switch_rows(builder: ir.IRBuilder, rows: Any, body: Callable[[int], None]) -> None:
    """Runs body(n) for the constant n that `rows` equals."""
    after = builder.append_basic_block("tiled")
    switch = builder.switch(builder.trunc(rows, emit.i32), after)
    for n in range(1, TILE_ROWS + 1):
        block = builder.append_basic_block(f"rows{n}")
        switch.add_case(ir.Constant(emit.i32, n), block)
        builder.position_at_end(block)
        body(n)
        builder.branch(after)
    builder.position_at_end(after)


def _opaque(builder: ir.IRBuilder, pointer: Any) -> Any:
    """The same pointer, of which the compiler knows nothing.

    Otherwise it derives every row's address from one induction variable with a register each, runs out of
    registers and keeps them on the stack: 155 GFLOP/s instead of 260.
    """
    kind = ir.FunctionType(pointer.type, [pointer.type])
    return builder.asm(kind, "", "=r,0", [pointer], side_effect=False)


def _tile(builder: ir.IRBuilder, n: int, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any,
          c: Any, c_row: Any, depth: Any, accumulate: Any) -> None:  # fmt: skip
    """One tile of `n` rows; `a_row` or `a_step` is None where it is 1."""
    grid = [(i, j) for i in range(n) for j in range(TILE_BLOCKS)]
    places = [builder.add(builder.mul(emit.constant(i), c_row), emit.constant(j * LANES)) for i, j in grid]
    accumulators = [emit.splat(builder, 0.0) for _ in grid]

    def step(pointers: list[Any], b_at: Any, totals: list[Any], k: int) -> list[Any]:
        """Adds A[:, k] · B[k, :]; `pointers` are of every third row."""
        line = [emit.load(builder, b_at, emit.constant(j * LANES)) for j in range(TILE_BLOCKS)]
        result = list(totals)
        for i in range(n):
            if a_row is None:
                address = builder.gep(pointers[0], [emit.constant(i)])
            else:
                address = pointers[i // 3]
                if i % 3:
                    address = builder.gep(address, [builder.mul(a_row, emit.constant(i % 3))])
                address = builder.gep(address, [emit.constant(k)])
            value = emit.splat(builder, builder.load(address, align=4))
            for j in range(TILE_BLOCKS):
                result[i * TILE_BLOCKS + j] = emit.fma(builder, value, line[j], result[i * TILE_BLOCKS + j])
        return result

    num_pointers = 1 if a_row is None else (n + 2) // 3
    pointers = [a] + [builder.gep(a, [builder.mul(emit.constant(3 * q), a_row)]) for q in range(1, num_pointers)]

    def run(count: Any, unroll: int, state: list[Any]) -> list[Any]:
        def body(_: Any, values: Any) -> list[Any]:
            heads, b_at, totals = list(values[:num_pointers]), values[num_pointers], list(values[num_pointers + 1 :])
            if a_row is not None:
                heads = [_opaque(builder, head) for head in heads]
            for k in range(unroll):
                totals = step(heads, b_at, totals, k if a_row is not None else 0)
                b_at = builder.gep(b_at, [b_step])
                if a_row is None:
                    heads = [builder.gep(heads[0], [a_step])]
            if a_row is not None:
                heads = [builder.gep(head, [emit.constant(unroll)]) for head in heads]
            return [*heads, b_at, *totals]

        return _loop_or_skip(builder, count, state, body)

    state = [*pointers, b, *accumulators]
    state = run(builder.sdiv(depth, emit.constant(UNROLL)), UNROLL, state)
    state = run(builder.srem(depth, emit.constant(UNROLL)), 1, state)
    totals = state[num_pointers + 1 :]
    with builder.if_else(accumulate) as (add, overwrite):
        with add:
            for place, value in zip(places, totals, strict=True):
                emit.store(builder, builder.fadd(emit.load(builder, c, place), value), c, place)
        with overwrite:
            for place, value in zip(places, totals, strict=True):
                emit.store(builder, value, c, place)


def _loop_or_skip(builder: ir.IRBuilder, count: Any, state: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
    """`emit.loop` that may run no times."""
    before = builder.block
    enter, joined = builder.append_basic_block("enter"), builder.append_basic_block("joined")
    builder.cbranch(builder.icmp_signed(">", count, emit.constant(0)), enter, joined)
    builder.position_at_end(enter)
    result = emit.loop(builder, count, state, body)
    last = builder.block
    builder.branch(joined)
    builder.position_at_end(joined)
    merged = []
    for old, new in zip(state, result, strict=True):
        phi = builder.phi(old.type)
        phi.add_incoming(old, before)
        phi.add_incoming(new, last)
        merged.append(phi)
    return merged


def _gemm(by_rows: bool):
    """The intrinsic for one of A's two layouts."""

    def typed(typing_context, rows, a, a_at, a_stride, b, b_at, b_step, c, c_at, c_row, depth, accumulate):
        def generate(context, builder, signature, values):
            rows_, _, a_at_, stride, _, b_at_, b_step_, _, c_at_, c_row_, depth_, accumulate_ = values
            a_ = builder.gep(emit.pointer(context, builder, a, values[1]), [a_at_])
            b_ = builder.gep(emit.pointer(context, builder, b, values[4]), [b_at_])
            c_ = builder.gep(emit.pointer(context, builder, c, values[7]), [c_at_])
            row, step = (stride, None) if by_rows else (None, stride)
            keep = builder.icmp_signed("!=", accumulate_, emit.constant(0))
            _switch_rows(
                builder, rows_, lambda n: _tile(builder, n, a_, row, step, b_, b_step_, c_, c_row_, depth_, keep)
            )
            return context.get_dummy_value()

        whole = types.int64
        signature = types.void(whole, a, whole, whole, b, whole, whole, c, whole, whole, whole, whole)
        return signature, generate

    return intrinsic(typed)


def _gemm_python(by_rows: bool) -> Callable[..., None]:
    def tile(
        rows: int, a: Any, a_at: int, a_stride: int, b: Any, b_at: int, b_step: int,
        c: Any, c_at: int, c_row: int, depth: int, accumulate: int,
    ) -> None:  # fmt: skip
        def grid(array: Any, at: int, shape: tuple[int, int], strides: tuple[int, int]) -> Any:
            part = emit.flat(array)[at:]
            return np.lib.stride_tricks.as_strided(part, shape, tuple(4 * stride for stride in strides))

        left = grid(a, a_at, (rows, depth), (a_stride, 1) if by_rows else (1, a_stride))
        right = grid(b, b_at, (depth, TILE_COLUMNS), (b_step, 1))
        out = grid(c, c_at, (rows, TILE_COLUMNS), (c_row, 1))
        out[...] = left @ right + (out if accumulate else 0)

    return tile


gemm_rows: Callable[..., None] = _gemm_python(True) if DISABLED else _gemm(True)
"""gemm_rows(rows, a, a_at, a_row, b, b_at, b_step, c, c_at, c_row, depth, accumulate).

A[i, k] stands at a_at + i·a_row + k, B[k, :] at b_at + k·b_step, C[i, :] at c_at + i·c_row.
"""

gemm_columns: Callable[..., None] = _gemm_python(False) if DISABLED else _gemm(False)
"""gemm_columns(rows, a, a_at, a_step, b, …), A[i, k] at a_at + i + k·a_step; otherwise as `gemm_rows`."""
