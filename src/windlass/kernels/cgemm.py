"""The matrix micro-kernel of complex numbers whose real and imaginary parts stand apart.

    C[i, j] (+)= Σ_k A[i, k] · conj(B[k, j]),   i < rows ≤ CTILE_ROWS,  j < TILE_COLUMNS

The sum starts at zero and C is added last (see `windlass.kernels.gemm`).

B's rows are vectors, A's numbers are broadcast, as in `windlass.kernels.gemm`.  With 6 × 32 complex accumulators
on AVX-512 a step of k is 48 fused multiply-adds for 16 loads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, TILE_BLOCKS, TILE_COLUMNS, TILE_ROWS

CTILE_ROWS = max(1, (TILE_ROWS - 2) // 2)
"""Rows of the tile: its accumulators, B's vectors and two of A's numbers fit the registers."""

ACCUMULATE, STREAM = 1, 2
"""Flags: C is added to; where it is not, it goes past the caches to addresses aligned to 64 bytes."""


def _opaque(builder: ir.IRBuilder, pointer: Any) -> Any:
    """The same pointer, of which the compiler knows nothing (see `windlass.kernels.gemm`)."""
    kind = ir.FunctionType(pointer.type, [pointer.type])
    return builder.asm(kind, "", "=r,0", [pointer], side_effect=False)


class _Places(NamedTuple):
    """Addresses of a matrix of complex numbers: pointer, distance of rows, of steps, and of imaginary parts."""

    pointer: Any
    row: Any
    step: Any
    im: Any


def _tile(
    builder: ir.IRBuilder, n: int, a: _Places, b: _Places, c: _Places, depth: Any, ahead: list[Any], accumulate: Any,
    stream: Any,
) -> None:  # fmt: skip
    """One tile of `n` rows; `a.row` or `a.step` is None where it is 1."""
    grid = [(i, j) for i in range(n) for j in range(TILE_BLOCKS)]
    places = [
        builder.add(offset, part)
        for offset in (builder.add(builder.mul(emit.constant(i), c.row), emit.constant(j * LANES)) for i, j in grid)
        for part in (emit.constant(0), c.im)
    ]
    with builder.if_then(accumulate):
        for place in places:
            _prefetch(builder, builder.gep(c.pointer, [place]))
    totals = [emit.splat(builder, 0.0) for _ in places]
    by_rows = a.step is None
    num_heads = (n + 2) // 3 if by_rows else 1
    heads = [a.pointer] + [
        builder.gep(a.pointer, [builder.mul(emit.constant(3 * q), a.row)]) for q in range(1, num_heads)
    ]

    def number(address: Any) -> Any:
        return emit.splat(builder, builder.load(address, align=4))

    def step(pointers: list[Any], b_at: Any, sums: list[Any]) -> list[Any]:
        """Adds A[:, k] · conj(B[k, :]); `pointers` are of every third row."""
        line = [
            (emit.load(builder, b_at, emit.constant(j * LANES)),
             emit.load(builder, b_at, builder.add(b.im, emit.constant(j * LANES))))
            for j in range(TILE_BLOCKS)
        ]  # fmt: skip
        result = list(sums)
        for i in range(n):
            if by_rows:
                address = pointers[i // 3]
                if i % 3:
                    address = builder.gep(address, [builder.mul(a.row, emit.constant(i % 3))])
            else:
                address = builder.gep(pointers[0], [emit.constant(i)])
            at = 2 * i * TILE_BLOCKS
            re = number(address)
            minus = builder.fneg(re)
            for j, (b_re, b_im) in enumerate(line):
                result[at + 2 * j] = emit.fma(builder, re, b_re, result[at + 2 * j])
                result[at + 2 * j + 1] = emit.fma(builder, minus, b_im, result[at + 2 * j + 1])
            im = number(builder.gep(address, [a.im]))
            for j, (b_re, b_im) in enumerate(line):
                result[at + 2 * j] = emit.fma(builder, im, b_im, result[at + 2 * j])
                result[at + 2 * j + 1] = emit.fma(builder, im, b_re, result[at + 2 * j + 1])
        return result

    def body(_: Any, values: Any) -> list[Any]:
        here, b_at, to_come, sums = (list(part) for part in split(values))
        if by_rows:
            here = [_opaque(builder, head) for head in here]
        for address in to_come:
            _prefetch(builder, address)
        sums = step(here, b_at[0], sums)
        following = [builder.gep(head, [emit.constant(1) if by_rows else a.step]) for head in here]
        to_come = [builder.gep(address, [emit.constant(LANES)]) for address in to_come]
        return [*following, builder.gep(b_at[0], [b.step]), *to_come, *sums]

    def split(values: Any) -> tuple[Any, Any, Any, Any]:
        ends = (0, num_heads, num_heads + 1, num_heads + 1 + len(ahead), len(values))
        first, second, third, fourth = (values[i:j] for i, j in itertools.pairwise(ends))
        return first, second, third, fourth

    state = emit.loop(builder, depth, [*heads, b.pointer, *ahead, *totals], body)
    totals = split(state)[3]
    with builder.if_else(accumulate) as (add, overwrite):
        with add:
            for place, value in zip(places, totals, strict=True):
                emit.store(builder, builder.fadd(emit.load(builder, c.pointer, place), value), c.pointer, place)
        with overwrite, builder.if_else(stream) as (past, through):
            for way, past_caches in ((past, True), (through, False)):
                with way:
                    for place, value in zip(places, totals, strict=True):
                        emit.store(builder, value, c.pointer, place, stream=past_caches)


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    """Asks for a cache line."""
    bytes_ = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [bytes_, *[emit.i32] * 3])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(address, bytes_), *[ir.Constant(emit.i32, value) for value in (0, 3, 1)]])


def _switch_rows(builder: ir.IRBuilder, rows: Any, body: Callable[[int], None]) -> None:
    """Runs body(n) for the constant n that `rows` equals."""
    after = builder.append_basic_block("tiled")
    switch = builder.switch(builder.trunc(rows, emit.i32), after)
    for n in range(1, CTILE_ROWS + 1):
        block = builder.append_basic_block(f"rows{n}")
        switch.add_case(ir.Constant(emit.i32, n), block)
        builder.position_at_end(block)
        body(n)
        builder.branch(after)
    builder.position_at_end(after)


def _cgemm(by_rows: bool):
    """The intrinsic for one of A's two layouts."""

    def typed(typing_context, rows, a, a_at, a_stride, a_im, b, b_at, b_step, b_im, c, c_at, c_row, c_im, depth,
              next_a, next_a_at, next_b, next_b_at, flags):  # fmt: skip
        def generate(context, builder, signature, values):
            def pointer(kind, i):
                return builder.gep(emit.pointer(context, builder, kind, values[i]), [values[i + 1]])

            row, step = (values[3], None) if by_rows else (None, values[3])
            a_ = _Places(pointer(a, 1), row, step, values[4])
            b_ = _Places(pointer(b, 5), None, values[7], values[8])
            c_ = _Places(pointer(c, 9), values[11], None, values[12])
            ahead = [pointer(next_a, 14), pointer(next_b, 16)]
            keep, past = (
                builder.icmp_signed("!=", builder.and_(values[18], emit.constant(bit)), emit.constant(0))
                for bit in (ACCUMULATE, STREAM)
            )
            _switch_rows(builder, values[0], lambda n: _tile(builder, n, a_, b_, c_, values[13], ahead, keep, past))
            return context.get_dummy_value()

        offsets = [types.int64] * 3
        return types.void(
            types.int64,
            a,
            *offsets,
            b,
            *offsets,
            c,
            *offsets,
            types.int64,
            next_a,
            types.int64,
            next_b,
            types.int64,
            types.int64,
        ), generate

    return intrinsic(typed)


def _cgemm_python(by_rows: bool) -> Callable[..., None]:
    def tile(
        rows: int, a: Any, a_at: int, a_stride: int, a_im: int, b: Any, b_at: int, b_step: int, b_im: int,
        c: Any, c_at: int, c_row: int, c_im: int, depth: int, next_a: Any, next_a_at: int,
        next_b: Any, next_b_at: int, flags: int,
    ) -> None:  # fmt: skip
        def grid(array: Any, at: int, shape: tuple[int, int], strides: tuple[int, int]) -> Any:
            part = emit.flat(array)[at:]
            return np.lib.stride_tricks.as_strided(part, shape, tuple(4 * stride for stride in strides))

        a_strides = (a_stride, 1) if by_rows else (1, a_stride)
        a_re, a_im_ = (grid(a, at, (rows, depth), a_strides) for at in (a_at, a_at + a_im))
        b_re, b_im_ = (grid(b, at, (depth, TILE_COLUMNS), (b_step, 1)) for at in (b_at, b_at + b_im))
        c_re, c_im_ = (grid(c, at, (rows, TILE_COLUMNS), (c_row, 1)) for at in (c_at, c_at + c_im))
        c_re[...] = a_re @ b_re + a_im_ @ b_im_ + (c_re if flags & ACCUMULATE else 0)
        c_im_[...] = a_im_ @ b_re - a_re @ b_im_ + (c_im_ if flags & ACCUMULATE else 0)

    return tile


cgemm_rows: Callable[..., None] = _cgemm_python(True) if DISABLED else _cgemm(True)
"""cgemm_rows(rows, a, a_at, a_row, a_im, b, b_at, b_step, b_im, c, c_at, c_row, c_im, depth,
next_a, next_a_at, next_b, next_b_at, flags).

A[i, k] stands at a_at + i·a_row + k, its imaginary part a_im further on; so do B's and C's.  Meanwhile the cache
lines from next_a[next_a_at] and next_b[next_b_at] on are fetched, one of each with each step.  The depth is at least 1.
"""

cgemm_columns: Callable[..., None] = _cgemm_python(False) if DISABLED else _cgemm(False)
"""cgemm_columns(rows, a, a_at, a_step, a_im, b, …), A[i, k] at a_at + i + k·a_step; otherwise as `cgemm_rows`."""
