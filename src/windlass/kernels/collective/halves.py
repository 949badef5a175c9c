"""Numbers of 16 bits, widened to float32 and rounded back to nearest even: one element, for loops to vectorise.

Arrays hold the bits as uint16, of float16 (IEEE binary16) or of bfloat16 (the upper half of a float32).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels.jit import DISABLED

_i16, _i32, _f16, _f32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


@intrinsic
def _widen_bfloat16(typing_context, bits):
    def generate(context, builder, signature, values):
        return builder.bitcast(builder.shl(builder.zext(values[0], _i32), ir.Constant(_i32, 16)), _f32)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_bfloat16(typing_context, number):
    def generate(context, builder, signature, values):
        bits = builder.bitcast(values[0], _i32)
        upper = builder.lshr(bits, ir.Constant(_i32, 16))
        odd = builder.and_(upper, ir.Constant(_i32, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, ir.Constant(_i32, 0x7FFF)), odd), ir.Constant(_i32, 16))
        quiet = builder.or_(upper, ir.Constant(_i32, 0x40))
        not_a_number = builder.fcmp_unordered("uno", values[0], values[0])
        return builder.trunc(builder.select(not_a_number, quiet, rounded), _i16)

    return types.uint16(types.float32), generate


@intrinsic
def _widen_float16(typing_context, bits):
    def generate(context, builder, signature, values):
        return builder.fpext(builder.bitcast(values[0], _f16), _f32)

    return types.float32(types.uint16), generate


@intrinsic
def _narrow_float16(typing_context, number):
    def generate(context, builder, signature, values):
        return builder.bitcast(builder.fptrunc(values[0], _f16), _i16)

    return types.uint16(types.float32), generate


def _widen_bfloat16_twin(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _narrow_bfloat16_twin(number: Any) -> Any:
    bits = int(np.float32(number).view(np.uint32))
    if np.isnan(number):
        return np.uint16((bits >> 16) | 0x40)
    return np.uint16(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF)


def _widen_float16_twin(bits: Any) -> Any:
    return np.float32(np.uint16(bits).view(np.float16))


def _narrow_float16_twin(number: Any) -> Any:
    with np.errstate(over="ignore"):
        return np.float16(number).view(np.uint16)


widen_bfloat16: Any = _widen_bfloat16_twin if DISABLED else _widen_bfloat16
narrow_bfloat16: Any = _narrow_bfloat16_twin if DISABLED else _narrow_bfloat16
widen_float16: Any = _widen_float16_twin if DISABLED else _widen_float16
narrow_float16: Any = _narrow_float16_twin if DISABLED else _narrow_float16
