"""Fourier codelets on vectors of 16 channels, compiled each on its own and called through their addresses.

So the kernels that call them are compiled once for all lengths, and a length costs the time of its codelets only.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, kernel
from windlass.plan.fourier import KINDS, Codelet, Kind, codelet, num_frequencies
from windlass.plan.linear import Op, run


class Codelets(NamedTuple):
    """Length, frequencies of a tile, and addresses of the transforms, of which the last two write spectra."""

    n: int
    frequencies: int
    complex: int
    from_real: int
    to_real: int
    complex_out: int
    from_real_out: int


def codelets(n: int, *, nonzero: int | None = None, stream: bool = False) -> Codelets:
    """The transforms of length n.

    Args:
        n: the length.
        nonzero: so many of the first numbers may be other than zero (not for the way back); None: all.
        stream: whether the last two write past the caches, to addresses aligned to 64 bytes.
    """
    given = nonzero or n
    first = [_code("complex", n, given, 0), _code("from_real", n, given, 0), _code("to_real", n, n, 0)]
    return Codelets(
        n, num_frequencies(n), *first, *(_code(kind, n, given, int(stream)) for kind in ("complex", "from_real"))
    )


@cache
def _code(kind: Kind, n: int, nonzero: int, stream: int) -> int:
    if DISABLED:
        return KINDS.index(kind) + len(KINDS) * (n + 1024 * nonzero)

    def code():
        return _address(kind, n, nonzero, stream)

    compiled = kernel(code, key=(KINDS.index(kind), n, nonzero, stream))
    _kept.append(compiled)
    return int(compiled())


_kept: list[Any] = []


class _Emitter:
    """Emits one codelet into a function (src, step, im, dst, step, im).

    Values that other sections need are put by in memory; between sections nothing is moved.  Constants are read
    from a table, of whose contents the compiler knows nothing: it would give each an address of its own.
    """

    def __init__(self, function: ir.Function, kind: Kind, work: Codelet, *, stream: bool) -> None:
        self.builder = ir.IRBuilder(function.append_basic_block("entry"))
        self.kind, self.work, self.stream = kind, work, stream
        self.src, self.src_step, self.src_im, self.dst, self.dst_step, self.dst_im = function.args
        self.multiples: dict[tuple[int, int], Any] = {}
        self.constants = sorted({abs(op.constant) for op in work.program.ops if op.kind in ("mul", "fma")})
        self.table = self._opaque(self._global(function))
        sections = [bisect.bisect_right(work.cuts, i) for i in range(len(work.program.ops))]
        users: dict[int, set[int]] = {}
        for i, op in enumerate(work.program.ops):
            for operand in (op.a, op.b) if op.kind not in ("input", "zero") else ():
                users.setdefault(operand, set()).add(sections[i])
        crossing = [i for i, later in users.items() if later != {sections[i]}]
        self.sections, self.slots = sections, {value: slot for slot, value in enumerate(sorted(crossing))}
        room = self.builder.alloca(emit.vector, size=max(1, len(crossing)))
        room.align = 4 * LANES
        self.room = self._opaque(self.builder.bitcast(room, emit.f32.as_pointer()))

    def _global(self, function: ir.Function) -> Any:
        kind = ir.ArrayType(emit.f32, len(self.constants))
        table = ir.GlobalVariable(function.module, kind, function.name + "_constants")
        table.linkage, table.global_constant = "internal", True
        table.initializer = ir.Constant(kind, [float(np.float32(constant)) for constant in self.constants])
        return self.builder.bitcast(table, emit.f32.as_pointer())

    def _opaque(self, pointer: Any) -> Any:
        kind = ir.FunctionType(pointer.type, [pointer.type])
        return self.builder.asm(kind, "", "=r,0", [pointer], side_effect=False)

    def _offset(self, number: int, step: Any, side: int) -> Any:
        """`number` · step, as a multiple that sections share and a rest."""
        stride = self.work.strides[side]
        for key in ((side, number % stride), (side, number // stride * stride)):
            if key not in self.multiples:
                self.multiples[key] = self.builder.mul(emit.constant(key[1]), step)
        rest, multiple = self.multiples[side, number % stride], self.multiples[side, number // stride * stride]
        return rest, multiple

    def _place(self, base: Any, i: int, step: Any, im: Any, *, real: bool, side: int) -> Any:
        number, part = (i, 0) if real else divmod(i, 2)
        rest, multiple = self._offset(number, step, side)
        start = self.builder.add(rest, im) if part else rest
        return self.builder.gep(self.builder.gep(base, [start]), [multiple])

    def _splat(self, constant: float) -> Any:
        place = self.builder.gep(self.table, [emit.constant(self.constants.index(abs(constant)))])
        return emit.splat(self.builder, self.builder.load(place, align=4))

    def run(self) -> None:
        """Emits the program."""
        builder, program = self.builder, self.work.program
        places: dict[int, list[int]] = {}
        for output, value in enumerate(program.outputs):
            places.setdefault(value, []).append(output)
        values: dict[int, Any] = {}
        for i, op in enumerate(program.ops):
            if i in self.work.cuts:
                values.clear()
                builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
            values[i] = value = self._value(op, values)
            if i in self.slots:
                emit.store(builder, value, self.room, emit.constant(self.slots[i] * LANES))
            for output in places.get(i, ()):
                place = self._place(self.dst, output, self.dst_step, self.dst_im, real=self.kind == "to_real", side=1)
                emit.store(builder, value, place, emit.constant(0), stream=self.stream)
        builder.ret_void()

    def _value(self, op: Op, values: dict[int, Any]) -> Any:
        builder = self.builder
        if op.kind == "input":
            place = self._place(self.src, op.a, self.src_step, self.src_im, real=self.kind == "from_real", side=0)
            return emit.load(builder, place, emit.constant(0))
        if op.kind == "zero":
            return emit.splat(builder, 0.0)
        for operand in (op.a, op.b):
            if operand >= 0 and operand not in values:
                values[operand] = emit.load(builder, self.room, emit.constant(self.slots[operand] * LANES))
        a, b = values[op.a], values.get(op.b)
        match op.kind:
            case "add":
                return builder.fadd(a, b)
            case "sub":
                return builder.fsub(a, b)
            case "neg":
                return builder.fneg(a)
        factor = a if op.constant > 0 else builder.fneg(a)
        if op.kind == "mul":
            return builder.fmul(factor, self._splat(op.constant))
        return emit.fma(builder, factor, self._splat(op.constant), b)


_numbers = emit.f32.as_pointer()
_type = ir.FunctionType(ir.VoidType(), [_numbers, emit.i64, emit.i64] * 2)


@intrinsic(prefer_literal=True)
def _address_of(typing_context, kind, n, nonzero, stream):
    """The address of a function (src, step, im, dst, step, im) that is the codelet."""
    work = codelet(kind.literal_value, n.literal_value, nonzero.literal_value)

    def generate(context, builder, signature, values):
        function = ir.Function(builder.module, _type, builder.module.get_unique_name("windlass_codelet"))
        function.linkage = "internal"
        _Emitter(function, kind.literal_value, work, stream=bool(stream.literal_value)).run()
        return builder.ptrtoint(function, emit.i64)

    return types.int64(kind, n, nonzero, stream), generate


_address: Any = _address_of


@intrinsic
def _transform(typing_context, code, src, src_at, src_step, src_im, dst, dst_at, dst_step, dst_im):
    def generate(context, builder, signature, values):
        source = builder.gep(emit.pointer(context, builder, src, values[1]), [values[2]])
        target = builder.gep(emit.pointer(context, builder, dst, values[5]), [values[6]])
        function = builder.inttoptr(values[0], _type.as_pointer())
        builder.call(function, [source, values[3], values[4], target, values[7], values[8]])
        return context.get_dummy_value()

    offsets = [types.int64] * 3
    return types.void(types.int64, src, *offsets, dst, *offsets), generate


def _transform_python(
    code: int, src: Any, src_at: int, src_step: int, src_im: int, dst: Any, dst_at: int, dst_step: int, dst_im: int
) -> None:
    kind, (nonzero, n) = KINDS[code % len(KINDS)], divmod(code // len(KINDS), 1024)
    source, target = emit.flat(src), emit.flat(dst)
    program = codelet(kind, n, nonzero).program
    used = {op.a for op in program.ops if op.kind == "input"}
    inputs: list[Any] = [None] * program.num_inputs
    for i in used:
        number, part = (i, 0) if kind == "from_real" else divmod(i, 2)
        inputs[i] = source[src_at + number * src_step + part * src_im :][:LANES].copy()
    for i, value in enumerate(run(program, inputs)):
        number, part = (i, 0) if kind == "to_real" else divmod(i, 2)
        target[dst_at + number * dst_step + part * dst_im :][:LANES] = np.float32(value)


transform: Callable[..., None] = _transform_python if DISABLED else _transform
"""transform(code, src, src_at, src_step, src_im, dst, dst_at, dst_step, dst_im): one codelet by its address.

Number i is the 16 channels at src_at + i·src_step, its imaginary part src_im further on; alike for dst.
"""
