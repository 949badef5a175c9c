"""The rounding of a run of numbers as vector instructions, one function a format, rounding and storage.

Fixed point and float16 are rounded as whole numbers: x is multiplied by a power of two, which is exact, rounded and
multiplied back.  In float16 that power follows from the exponent of x.  bfloat16 is the upper half of float32, so
there rounding adds to the bits.  `reference.py` is the definition of all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES
from windlass.kernels.rounding.reference import Target, encoded, rounded

ROUNDINGS = ("stochastic", "nearest", "floor")
FORMS = ("fixed", "float16", "bfloat16")
STORAGES = {"float32": np.float32, "int8": np.int8, "int16": np.int16, "int32": np.int32, "half": np.uint16}
STORAGE_NAMES = tuple(STORAGES)

COUNTED = ("nothing", "all", "nan")
"""What is counted on the way: nothing, all of `Counts`, or NaN alone, for integers, which cannot hold it."""

_i16 = ir.IntType(16)
_ints = ir.VectorType(emit.i32, LANES)
_doubles = ir.VectorType(ir.DoubleType(), LANES)
_noise = ir.VectorType(_i16, LANES)


def _int(value: int) -> ir.Constant:
    return ir.Constant(_ints, [value] * LANES)


def _number(value: float) -> ir.Constant:
    return ir.Constant(emit.vector, [float(np.float32(value))] * LANES)


def _call(builder: ir.IRBuilder, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


def _unary(builder: ir.IRBuilder, name: str, x: Any) -> Any:
    return _call(builder, f"llvm.{name}.v{LANES}f32", emit.vector, x)


class Numbers(NamedTuple):
    """Vectors of equal numbers: the range's ends, the step and its inverse."""

    low: Any
    high: Any
    step: Any
    inverse: Any


def _inside(builder: ir.IRBuilder, x: Any, n: Numbers) -> Any:
    """The nearer end for numbers out of range; NaN stays."""
    x = builder.select(builder.fcmp_ordered(">", n.low, x), n.low, x)
    return builder.select(builder.fcmp_ordered("<", n.high, x), n.high, x)


def _whole(builder: ir.IRBuilder, x: Any, y: Any, u: Any, rounding: str) -> Any:
    """`y`, which is `x` times a power of two, to whole numbers; `u` are random numbers of 16 bits."""
    if rounding == "nearest":
        return _unary(builder, "roundeven", y)
    if rounding == "floor":
        down = _unary(builder, "floor", y)
        lost = builder.and_(builder.fcmp_ordered("<", x, _number(0)), builder.fcmp_ordered("==", down, _number(0)))
        return builder.select(lost, _number(-1), down)  # the product was too small for float32
    whole = _unary(builder, "trunc", y)
    share = _unary(builder, "fabs", builder.fsub(y, whole))
    chance = emit.fma(builder, builder.sitofp(u, emit.vector), _number(2.0**-16), _number(2.0**-17))
    sign = builder.and_(builder.bitcast(y, _ints), _int(-(2**31)))
    one = builder.bitcast(builder.or_(sign, builder.bitcast(_number(1), _ints)), emit.vector)
    return builder.select(builder.fcmp_ordered("<", chance, share), builder.fadd(whole, one), whole)


def _fixed(builder: ir.IRBuilder, x: Any, n: Numbers, u: Any, rounding: str) -> tuple[Any, Any]:
    """Codes and values."""
    code = _whole(builder, x, builder.fmul(x, n.inverse), u, rounding)
    return code, builder.fmul(builder.fadd(code, _number(0)), n.step)


def _float16(builder: ir.IRBuilder, x: Any, n: Numbers, u: Any, rounding: str) -> tuple[Any, Any]:
    exponent = builder.and_(builder.bitcast(x, _ints), _int(0x7F800000))
    smallest = _int((127 - 14) << 23)
    exponent = builder.select(builder.icmp_unsigned(">", smallest, exponent), smallest, exponent)
    step = builder.bitcast(builder.sub(exponent, _int(10 << 23)), emit.vector)
    inverse = builder.bitcast(builder.sub(_int((264 << 23) - 2**32), exponent), emit.vector)
    value = builder.fmul(_whole(builder, x, builder.fmul(x, inverse), u, rounding), step)
    return value, value


def _bfloat16(builder: ir.IRBuilder, x: Any, n: Numbers, u: Any, rounding: str) -> tuple[Any, Any]:
    bits = builder.bitcast(x, _ints)
    if rounding == "nearest":
        odd = builder.and_(builder.lshr(bits, _int(16)), _int(1))
        more = builder.add(odd, _int(0x7FFF))
    elif rounding == "floor":
        more = builder.and_(builder.ashr(bits, _int(31)), _int(0xFFFF))
    else:  # carries where u is less than the lower half
        more = builder.xor(u, _int(0xFFFF))
    quiet = builder.or_(bits, _int(0x400000))
    nan = builder.fcmp_unordered("uno", x, x)
    kept = builder.and_(builder.select(nan, quiet, builder.add(bits, more)), _int(-0x10000))
    value = builder.bitcast(kept, emit.vector)
    return value, value


_ROUND = {"fixed": _fixed, "float16": _float16, "bfloat16": _bfloat16}


def _stored(builder: ir.IRBuilder, form: str, storage: str, code: Any, value: Any) -> Any:
    """What is written."""
    if storage == "float32":
        return value
    if form == "float16":
        half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES))
        return builder.bitcast(half, _noise)
    if form == "bfloat16":
        return builder.trunc(builder.lshr(builder.bitcast(value, _ints), _int(16)), _noise)
    nan = builder.fcmp_unordered("uno", code, code)
    whole = builder.fptosi(builder.select(nan, _number(0), code), _ints)
    width = int(storage.removeprefix("int"))
    return whole if width == 32 else builder.trunc(whole, ir.VectorType(ir.IntType(width), LANES))


def _counted(builder: ir.IRBuilder, what: str, x: Any, inside: Any, value: Any, state: Any) -> list[Any]:
    """The sums of a run, with one vector more."""

    def more(total: Any, where: Any) -> Any:
        mask = builder.bitcast(where, ir.IntType(LANES))
        return builder.add(total, builder.zext(_call(builder, f"llvm.ctpop.i{LANES}", mask.type, mask), emit.i64))

    if what == "nothing":
        return []
    nan = builder.fcmp_unordered("uno", x, x)
    if what == "nan":
        return [more(state[0], nan)]
    zeroed = builder.and_(builder.fcmp_unordered("!=", x, _number(0)), builder.fcmp_ordered("==", value, _number(0)))
    error = builder.select(nan, _number(0), _unary(builder, "fabs", builder.fsub(value, inside)))
    return [
        more(state[0], builder.fcmp_ordered("!=", x, inside)), more(state[1], zeroed), more(state[2], nan),
        builder.fadd(state[3], error),
    ]  # fmt: skip


def _add_up(builder: ir.IRBuilder, state: Any, counts: Any, errors: Any, place: Any) -> None:
    """Adds a run's sums to the task's."""
    first = builder.mul(place, emit.constant(3))
    for index, total in enumerate(state[:3]) if len(state) > 1 else ((2, total) for total in state):
        address = builder.gep(counts, [builder.add(first, emit.constant(index))])
        builder.store(builder.add(builder.load(address), total), address)
    if len(state) < 4:
        return
    address = builder.gep(errors, [place])
    wide = builder.fpext(state[3], _doubles)
    name = f"llvm.vector.reduce.fadd.v{LANES}f64"
    builder.store(_call(builder, name, ir.DoubleType(), builder.load(address), wide), address)


def _write(builder: ir.IRBuilder, value: Any, base: Any, at: Any, stream: bool) -> None:
    address = builder.bitcast(builder.gep(base, [at]), value.type.as_pointer())
    size = np.dtype(STORAGES["half"] if value.type == _noise else _dtype(value.type)).itemsize
    instruction = builder.store(value, address, align=size * LANES if stream else size)
    if stream:
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(emit.i32, 1)]))


def _dtype(kind: Any) -> str:
    return "float32" if kind == emit.vector else f"int{kind.element.width}"


@intrinsic(prefer_literal=True)
def _convert(
    typing_context, form, storage, rounding, counted, stream, src, src_at, dst, dst_at, noise, noise_at, vectors,
    numbers, counts, errors, place,
):  # fmt: skip
    form_name, mode = FORMS[form.literal_value], ROUNDINGS[rounding.literal_value]
    storage_name, counting, streaming = (
        STORAGE_NAMES[storage.literal_value],
        counted.literal_value,
        stream.literal_value,
    )

    def generate(context, builder, signature, values):
        at = dict(zip(("src_at", "dst_at", "noise_at", "vectors", "numbers", "place"),
                      (values[6], values[8], values[10], values[11], values[12], values[15]), strict=True))  # fmt: skip
        source, target, random, totals, sums = (
            emit.pointer(context, builder, kind, values[i])
            for kind, i in ((src, 5), (dst, 7), (noise, 9), (counts, 13), (errors, 14))
        )
        n = Numbers(*(emit.splat(builder, builder.extract_value(at["numbers"], i)) for i in range(4)))

        def body(index: Any, state: Any) -> Any:
            step = builder.mul(index, emit.constant(LANES))
            x = emit.load(builder, source, builder.add(at["src_at"], step))
            u = None
            if mode == "stochastic":
                address = builder.gep(random, [builder.add(at["noise_at"], step)])
                short = builder.load(builder.bitcast(address, _noise.as_pointer()), align=2)
                u = builder.zext(short, _ints)
            inside = _inside(builder, x, n)
            code, value = _ROUND[form_name](builder, inside, n, u, mode)
            _write(builder, _stored(builder, form_name, storage_name, code, value), target,
                   builder.add(at["dst_at"], step), bool(streaming))  # fmt: skip
            return _counted(builder, COUNTED[counting], x, inside, value, state)

        none = emit.constant(0)
        start = {"nothing": [], "all": [*[none] * 3, _number(0)], "nan": [none]}[COUNTED[counting]]
        state = emit.loop(builder, at["vectors"], start, body)
        _add_up(builder, state, totals, sums, at["place"])
        return context.get_dummy_value()

    whole = types.int64
    return types.void(
        form, storage, rounding, counted, stream, src, whole, dst, whole, noise, whole, whole, numbers, counts, errors,
        whole,
    ), generate  # fmt: skip


def _convert_python(
    form: int, storage: int, rounding: int, counted: int, stream: int, src: Any, src_at: int, dst: Any, dst_at: int,
    noise: Any, noise_at: int, vectors: int, numbers: Any, counts: Any, errors: Any, place: int,
) -> None:  # fmt: skip
    length = vectors * LANES
    exponent = int(np.log2(numbers[2]))
    man, exponent = {"fixed": (-1, exponent), "float16": (10, -24), "bfloat16": (7, -133)}[FORMS[form]]
    target = Target(float(numbers[0]), float(numbers[1]), man, exponent)
    values, done = rounded(
        src[src_at : src_at + length], target, ROUNDINGS[rounding], noise[noise_at : noise_at + length]
    )
    name = STORAGE_NAMES[storage]
    dst[dst_at : dst_at + length] = encoded(values, target, FORMS[form] if name == "half" else name)
    if COUNTED[counted] == "all":
        counts[3 * place : 3 * place + 3] += np.array(done[:3])
        errors[place] += done.error
    elif COUNTED[counted] == "nan":
        counts[3 * place + 2] += done.not_a_number


convert: Callable[..., None] = _convert_python if DISABLED else _convert
"""convert(form, storage, rounding, counted, stream, src, src_at, dst, dst_at, noise, noise_at, vectors, numbers,
counts, errors, place) rounds `vectors` · 16 numbers of `src`, one vector at least, to `dst`.

The first four are indices into `FORMS`, `STORAGE_NAMES`, `ROUNDINGS` and `COUNTED`.  With `stream`, `dst` is written
past the caches and every vector of it aligned to its own size.  `numbers` are the range's ends, the step and its
inverse, as float32; three numbers of `counts` and one of `errors` grow at `place`.
"""
