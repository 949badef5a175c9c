"""The micro-kernel of direct convolution: a tile of accumulators that stays in registers over all taps.

    C[i, j] = max(floor, start[i, j] + Σ_run Σ_k A[i, run, k] · B[run, k, j])

A run is a stretch of the reduction that lies evenly in memory; from run to run A jumps by a table of offsets, as
from one row of a filter to the next.  B lies in one piece.  (Georganas et al. 2020, "Harnessing deep learning via
a single building block": the batch-reduce product.)  A number of A stands at

    a_at + table[run] + i // 3 · a_group + i % 3 · a_row + k · a_step

The kinds differ in what is known beforehand and in what a number is:

    "rows"     a_step is 1, a_group 3 · a_row: A's rows are pixels, steps of k are channels
    "columns"  a_row is 1, a_group 3: A's rows are channels, steps of k are pixels
    "lanes"    A holds vectors, multiplied number by number with B's: 16 channels at once, each by itself
    "outer"    the same with up to 8 vectors of B
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.gemm import UNROLL, _loop_or_skip, _opaque
from windlass.kernels.jit import DISABLED, LANES, TILE_BLOCKS, TILE_ROWS, kernel

GROUP = 3
"""Rows that share a pointer: x86 can address a pointer plus 0, 1 or 2 strides."""


LONGEST = 384
"""Steps that are summed in one go: a sum's error grows with its length, so a long one is a sum of pieces."""

OUTER_BLOCKS = (1, 2, 4, 8)
"""Vectors of B in tiles of the kind "outer"."""


def rows_of_outer(blocks: int) -> int:
    """The most rows of a tile with so many vectors of B."""
    return max(1, min(TILE_ROWS, TILE_ROWS * TILE_BLOCKS // blocks))


def _variants(kind: str) -> list[tuple[int, int]]:
    """(rows, blocks of columns) of the tiles for which code is made."""
    widths = {"lanes": (1,), "outer": OUTER_BLOCKS}.get(kind, tuple(range(1, TILE_BLOCKS + 1)))
    return [(rows, blocks) for blocks in widths for rows in range(1, rows_of_outer(blocks) + 1)]


def _switch(builder: ir.IRBuilder, kind: str, rows: Any, blocks: Any, body: Callable[[int, int], None]) -> None:
    after = builder.append_basic_block("tiled")
    case = builder.add(builder.mul(blocks, emit.constant(TILE_ROWS + 1)), rows)
    switch = builder.switch(builder.trunc(case, emit.i32), after)
    for n, width in _variants(kind):
        block = builder.append_basic_block(f"tile{n}x{width}")
        switch.add_case(ir.Constant(emit.i32, width * (TILE_ROWS + 1) + n), block)
        builder.position_at_end(block)
        body(n, width)
        builder.branch(after)
    builder.position_at_end(after)


def emit_fetch(builder: ir.IRBuilder, address: Any) -> None:
    """Asks for a line of memory to come to the second cache."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, *[emit.i32] * 3])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(address, pointer), *(ir.Constant(emit.i32, value) for value in (0, 2, 1))])


class _Reader:
    """Addresses and reads the numbers of A for one step of k."""

    def __init__(self, builder: ir.IRBuilder, kind: str, rows: int, row: Any, group: Any, step: Any) -> None:
        self.builder, self.kind, self.rows, self.row, self.group, self.step = builder, kind, rows, row, group, step
        self.num_heads = 1 if kind == "columns" else -(-rows // GROUP)

    def heads(self, base: Any) -> list[Any]:
        """The pointers of a run."""
        builder = self.builder
        return [builder.gep(base, [builder.mul(emit.constant(q), self.group)]) for q in range(self.num_heads)]

    def value(self, heads: list[Any], i: int, k: int) -> Any:
        """A[i, k] as a vector.  To be read just before its use, or the compiler runs out of registers."""
        builder = self.builder
        if self.kind == "columns":
            address = builder.gep(heads[0], [emit.constant(i)])
        else:
            address = heads[i // GROUP]
            if i % GROUP:
                address = builder.gep(address, [builder.mul(self.row, emit.constant(i % GROUP))])
            if self.kind == "rows":
                address = builder.gep(address, [emit.constant(k)])
        if self.kind in ("lanes", "outer"):
            return emit.load(builder, address, emit.constant(0))
        return emit.splat(builder, builder.load(address, align=4))

    def next(self, heads: list[Any], steps: int) -> list[Any]:
        """Pointers after `steps` steps of k."""
        step = emit.constant(steps) if self.kind == "rows" else self.step
        return [self.builder.gep(head, [step]) for head in heads]


def _totals(builder: ir.IRBuilder, reader: _Reader, blocks: int, a: Any, table: Any, count: Any, depth: Any,
            b: Any, ahead: Any, ahead_step: Any, totals: list[Any]) -> list[Any]:  # fmt: skip
    """The accumulators after all runs."""
    num_heads = reader.num_heads
    in_steps = reader.kind == "rows"
    fetches = reader.kind == "columns"

    def steps(number: Any, unroll: int, state: list[Any]) -> list[Any]:
        def body(_: Any, values: Any) -> list[Any]:
            heads, (b_at, soon, *sums) = list(values[:num_heads]), values[num_heads:]
            heads = [_opaque(builder, head) for head in heads]
            for k in range(unroll):
                if fetches:
                    emit_fetch(builder, soon)
                    soon = builder.gep(soon, [ahead_step])
                line = [emit.load(builder, b_at, emit.constant(j * LANES)) for j in range(blocks)]
                for i in range(reader.rows):
                    value = reader.value(heads, i, k)
                    for j in range(blocks):
                        sums[i * blocks + j] = emit.fma(builder, value, line[j], sums[i * blocks + j])
                b_at = builder.gep(b_at, [emit.constant(blocks * LANES)])
                if not in_steps:
                    heads = reader.next(heads, 1)
            if in_steps:
                heads = reader.next(heads, unroll)
            return [*heads, b_at, soon, *sums]

        return _loop_or_skip(builder, number, state, body)

    long, short = builder.sdiv(depth, emit.constant(UNROLL)), builder.srem(depth, emit.constant(UNROLL))

    def run(index: Any, values: Any) -> list[Any]:
        base = builder.gep(a, [builder.load(builder.gep(table, [index]))])
        state = [*reader.heads(base), *values]
        state = steps(long, UNROLL, state)
        return steps(short, 1, state)[num_heads:]

    return _loop_or_skip(builder, count, [b, ahead, *totals], run)[2:]


def _write(builder: ir.IRBuilder, totals: list[Any], places: list[Any], floor: Any, c: Any, stream: Any) -> None:
    lowest = emit.splat(builder, floor)
    results = [builder.select(builder.fcmp_ordered("<", total, lowest), lowest, total) for total in totals]
    with builder.if_else(builder.icmp_signed("!=", stream, emit.constant(0))) as (past, through):
        for branch, streamed in ((past, True), (through, False)):
            with branch:
                for place, result in zip(places, results, strict=True):
                    emit.store(builder, result, c, place, stream=streamed)


@intrinsic(prefer_literal=True)
def _accumulate(
    typing_context, kind, rows, blocks, a, a_at, a_row, a_group, a_step, table, first, count, depth, b, b_at,
    start, start_at, start_row, floor, c, c_at, c_row, stream, ahead, ahead_at, ahead_step,
):  # fmt: skip
    name = kind.literal_value

    def generate(context, builder, signature, values):
        (_, rows_, blocks_, _, a_at_, row, group, step, _, first_, count_, depth_, _, b_at_, _, start_at_, start_row_,
         floor_, _, c_at_, c_row_, stream_, _, ahead_at_, ahead_step_) = values  # fmt: skip

        def at(kind_: Any, index: int, offset: Any) -> Any:
            return builder.gep(emit.pointer(context, builder, kind_, values[index]), [offset])

        a_, b_, c_ = at(a, 3, a_at_), at(b, 12, b_at_), at(c, 18, c_at_)
        start_, table_ = at(start, 14, start_at_), at(table, 8, first_)
        ahead_ = at(ahead, 22, ahead_at_)

        def grid(n: int, width: int, stride: Any) -> list[Any]:
            return [
                builder.add(builder.mul(emit.constant(i), stride), emit.constant(j * LANES))
                for i in range(n)
                for j in range(width)
            ]

        def tile(n: int, width: int) -> None:
            reader = _Reader(builder, name, n, row, group, step)
            zeros = [emit.splat(builder, 0.0)] * (n * width)
            totals = _totals(builder, reader, width, a_, table_, count_, depth_, b_, ahead_, ahead_step_, zeros)
            # Read last: these loads wait for nothing, while a chain that began with them would wait for memory.
            starts = [emit.load(builder, start_, place) for place in grid(n, width, start_row_)]
            totals = [builder.fadd(total, value) for total, value in zip(totals, starts, strict=True)]
            _write(builder, totals, grid(n, width, c_row_), floor_, c_, stream_)

        _switch(builder, name, rows_, blocks_, tile)
        return context.get_dummy_value()

    whole = types.int64
    signature = types.void(kind, whole, whole, a, *[whole] * 4, table, *[whole] * 3, b, whole, start, whole, whole,
                           types.float32, c, *[whole] * 3, ahead, whole, whole)  # fmt: skip
    return signature, generate


def _accumulate_python(
    kind: str, rows: int, blocks: int, a: Any, a_at: int, a_row: int, a_group: int, a_step: int,
    table: Any, first: int, count: int, depth: int, b: Any, b_at: int, start: Any, start_at: int, start_row: int,
    floor: float, c: Any, c_at: int, c_row: int, stream: int,
    ahead: Any, ahead_at: int, ahead_step: int,
) -> None:  # fmt: skip
    left, right, below = emit.flat(a), emit.flat(b)[b_at:], emit.flat(start)
    width = blocks * LANES
    starts = np.stack([below[start_at + i * start_row :][:width] for i in range(rows)])
    totals = np.zeros((rows, width), np.float32)
    places = np.array([i // GROUP * a_group + i % GROUP * a_row for i in range(rows)], np.int64)
    lanes = np.arange(LANES if kind in ("lanes", "outer") else 1)
    for run in range(count):
        for k in range(depth):
            at = a_at + int(table[first + run]) + k * a_step
            line = right[(run * depth + k) * width :][:width]
            totals = totals + np.tile(left[at + places[:, None] + lanes], width // lanes.size) * line
    totals = totals + starts
    for i in range(rows):
        emit.flat(c)[c_at + i * c_row :][:width] = np.where(totals[i] < floor, np.float32(floor), totals[i])


accumulate: Callable[..., None] = _accumulate_python if DISABLED else _accumulate
"""accumulate(kind, rows, blocks, a, a_at, a_row, a_group, a_step, table, first, count, depth, b, b_at,
start, start_at, start_row, floor, c, c_at, c_row, stream, ahead, ahead_at, ahead_step).

A tile of `rows` ≤ TILE_ROWS by `blocks` ≤ TILE_BLOCKS vectors ("outer": `rows_of_outer`) over runs
first…first + count of `table`, each of `depth` steps.  A row of `start` stands at start_at + i·start_row (stride 0:
the same for all, as a bias); so does C.  With `stream` 1 the result goes past the caches to addresses aligned to
64 bytes.  Every step of the kind "columns" asks for a line of memory to come to the second cache, from
ahead[ahead_at] on, `ahead_step` apart: the next block's pixels arrive while this one is multiplied.  Any address
will do.
"""


@kernel
def accumulate_rows(rows, blocks, a, a_at, a_row, table, first, count, depth, b, b_at, start, start_at, start_row,
                    floor, c, c_at, c_row, stream):  # fmt: skip
    """`accumulate` of the kind "rows", in pieces of at most about LONGEST steps that C gathers."""
    at_once = max(1, LONGEST // max(1, depth))
    run, k = 0, 0
    while True:
        runs = min(at_once, count - run)
        steps = min(LONGEST, depth - k) if depth > LONGEST else depth
        next_run, next_k = run + runs, 0
        if k + steps < depth:
            next_run, next_k = run, k + steps
        fresh, done = run == 0 and k == 0, next_run >= count
        accumulate("rows", rows, blocks, a, a_at + k, a_row, GROUP * a_row, 1, table, first + run, runs, steps,
                   b, b_at + (run * depth + k) * blocks * LANES,
                   start if fresh else c, start_at if fresh else c_at, start_row if fresh else c_row,
                   floor if done else np.float32(-np.inf), c, c_at, c_row, stream if done else 0,
                   c, 0, 0)  # fmt: skip
        if done:
            break
        run, k = next_run, next_k
