"""Random bits by Philox-4x32-10 as vector instructions; `reference.py` says which element takes which.

Eight blocks are made at once, each word of them in the lower half of a 64-bit lane: the instruction that multiplies
32-bit numbers into 64 bits reads lower halves only, so a round is two products, two shifts and two exclusive ors of
three numbers, and what stands in the upper halves never matters.  Blocks lie in the lanes in the order 0 4 1 5 2 6 3 7:
then the words of each are brought together by operations within 128 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, FEATURES, LANES, kernel
from windlass.kernels.rounding.reference import HALVES, MASK, MULTIPLIERS, ROUNDS, WEYL, halves

GROUP_BLOCKS = 8
GROUP = GROUP_BLOCKS * HALVES
"""16-bit numbers that are made at once."""

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_wide = ir.VectorType(emit.i64, GROUP_BLOCKS)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_wide, [value] * GROUP_BLOCKS)


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_wide, ir.Undefined), scalar, ir.Constant(emit.i32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(emit.i32, GROUP_BLOCKS), [0] * GROUP_BLOCKS))


def _philox(builder: ir.IRBuilder, counters: list[list[Any]], key: list[Any]) -> list[list[Any]]:
    """The four words of every block, in the lower halves of lanes.

    A round waits for the round before: the counters of several groups go through it in turn, so that units stay busy.
    """
    low, half = _all(MASK), _all(32)
    for turn in range(ROUNDS):
        k = [
            _splat(builder, builder.add(word, emit.constant(turn * weyl & MASK)))
            for word, weyl in zip(key, WEYL, strict=True)
        ]
        for i, counter in enumerate(counters):
            first = builder.mul(builder.and_(counter[0], low), _all(MULTIPLIERS[0]))
            second = builder.mul(builder.and_(counter[2], low), _all(MULTIPLIERS[1]))
            mixed = builder.xor(counter[1], k[0]), builder.xor(counter[3], k[1])
            counters[i] = [
                builder.xor(builder.lshr(second, half), mixed[0]), second,
                builder.xor(builder.lshr(first, half), mixed[1]), first,
            ]  # fmt: skip
    return counters


def _join(builder: ir.IRBuilder, low: Any, high: Any) -> Any:
    return builder.or_(builder.and_(low, _all(MASK)), builder.shl(high, _all(32)))


@intrinsic(prefer_literal=True)
def _fill(typing_context, side, dst, at, first, times, words, src, ahead):
    width = side.literal_value

    def generate(context, builder, signature, values):
        base = emit.pointer(context, builder, dst, values[1])
        source = emit.pointer(context, builder, src, values[6])
        key = [builder.extract_value(values[5], i) for i in range(4)]
        last = [_splat(builder, key[2]), _splat(builder, key[3])]

        def body(index, state):
            _prefetch(builder, source, builder.add(values[7], builder.mul(index, emit.constant(width * GROUP))), width)
            block = builder.add(values[3], builder.mul(index, emit.constant(width * GROUP_BLOCKS)))
            counters = []
            for i in range(width):
                order = ir.Constant(_wide, [i * GROUP_BLOCKS + lane for lane in _ORDER])
                number = builder.add(_splat(builder, block), order)
                counters.append([number, builder.lshr(number, _all(32)), *last])
            to = builder.add(values[2], builder.mul(index, emit.constant(width * GROUP)))
            for i, word in enumerate(_philox(builder, counters, key[:2])):
                _put(builder, word, base, builder.add(to, emit.constant(i * GROUP)))
            return state

        emit.loop(builder, values[4], [], body)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(side, dst, whole, whole, whole, words, src, whole), generate


def _prefetch(builder: ir.IRBuilder, base: Any, at: Any, groups: int) -> None:
    """Asks for the lines of so many groups of float32."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, *[emit.i32] * 3])
    function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
    how = [ir.Constant(emit.i32, value) for value in (0, 3, 1)]  # to read, into all caches, data
    for line in range(0, groups * GROUP, LANES):
        address = builder.gep(base, [builder.add(at, emit.constant(line))])
        builder.call(function, [builder.bitcast(address, pointer), *how])


def _put(builder: ir.IRBuilder, word: list[Any], base: Any, at: Any) -> None:
    """Writes the words of eight blocks."""
    front, back = _join(builder, word[0], word[1]), _join(builder, word[2], word[3])
    for part in range(2):
        lanes = [lane // 2 * 2 + part + lane % 2 * GROUP_BLOCKS for lane in range(GROUP_BLOCKS)]
        mixed = builder.shuffle_vector(front, back, ir.Constant(ir.VectorType(emit.i32, GROUP_BLOCKS), lanes))
        target = builder.gep(base, [builder.add(at, emit.constant(part * GROUP // 2))])
        builder.store(mixed, builder.bitcast(target, _wide.as_pointer()), align=2)


def _fill_python(
    side: int, dst: Any, at: int, first: int, times: int, words: Any, src: Any, ahead: int
) -> None:  # fmt: skip
    dst[at : at + times * side * GROUP] = halves(words, first * HALVES, times * side * GROUP)


fill_groups: Callable[..., None] = _fill_python if DISABLED else _fill
"""fill_groups(side, dst, at, first, times, words, src, ahead): `times` · `side` groups, side by side; at least once.

Meanwhile it fetches as many float32 of `src`, from `ahead` on, as it makes numbers.
"""


@kernel
def fill(dst, at, first, groups, words, src, ahead):
    """dst[at:] = `groups` · 64 numbers of 16 bits, from block `first` on.

    `dst` is uint16, `words` four int64: the key's; `src` is float32, of which the numbers from `ahead` on are fetched.
    """
    wide = groups // 4
    if wide > 0:
        fill_groups(4, dst, at, first, wide, words, src, ahead)
    if groups > 4 * wide:
        done = 4 * wide
        fill_groups(1, dst, at + 64 * done, first + 8 * done, groups - done, words, src, ahead + 64 * done)


@intrinsic
def _ieee(typing_context):
    def generate(context, builder, signature, values):
        if "sse" in FEATURES or "avx2" in FEATURES:
            pointer = ir.IntType(8).as_pointer()
            kind = ir.FunctionType(ir.VoidType(), [pointer])
            get, put = (
                builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
                for name in ("llvm.x86.sse.stmxcsr", "llvm.x86.sse.ldmxcsr")
            )
            with builder.goto_entry_block():
                place = builder.alloca(emit.i32)
            builder.call(get, [builder.bitcast(place, pointer)])
            builder.store(builder.and_(builder.load(place), ir.Constant(emit.i32, 0xFFFFFFFF ^ 0x8040)), place)
            builder.call(put, [builder.bitcast(place, pointer)])
        return context.get_dummy_value()

    return types.void(), generate


ieee: Any = (lambda: None) if DISABLED else _ieee
"""ieee() lets subnormal numbers be, in a task of `parallel_for`, which leaves the register as it found it."""


@kernel
def rows(dst, at, starts, starts_at, first, pitch, count, length, words, src):
    """Makes `count` runs of `length` numbers, the r-th from number first + r · pitch on.

    starts[starts_at + r] becomes the byte of `dst` at which a run begins; runs lie one behind the other.
    """
    for r in range(count):
        start = first + r * pitch
        groups = (start % 8 + length + 63) // 64
        fill(dst, at, start // 8, groups, words, src, 0)
        starts[starts_at + r] = 2 * (at + start % 8)
        at += 64 * groups
