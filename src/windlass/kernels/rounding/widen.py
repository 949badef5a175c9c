"""Codes to numbers: whole numbers times a power of two, exact, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, kernel
from windlass.kernels.rounding.convert import STORAGE_NAMES
from windlass.kernels.rounding.flat import lots_of
from windlass.kernels.rounding.memory import array_at
from windlass.kernels.threads import parallel_for

TASK = 1 << 15
"""Fewer numbers take less time than it takes to wake a thread."""
STREAM_BYTES = 64 << 20
"""Results of at least so many bytes are written past the caches; smaller ones are read from there right after."""


@intrinsic(prefer_literal=True)
def _multiply(typing_context, stream, src, dst, at, vectors, step):
    def generate(context, builder, signature, values):
        source, target = emit.pointer(context, builder, src, values[1]), emit.pointer(context, builder, dst, values[2])
        step = emit.splat(builder, values[5])

        def body(index: Any, _: Any) -> Any:
            place = builder.add(values[3], builder.mul(index, emit.constant(LANES)))
            codes = ir.VectorType(source.type.pointee, LANES)
            address = builder.bitcast(builder.gep(source, [place]), codes.as_pointer())
            code = builder.load(address, align=src.dtype.bitwidth // 8)
            number = builder.fmul(builder.sitofp(code, emit.vector), step)
            emit.store(builder, number, target, place, stream=bool(stream.literal_value))
            return []

        emit.loop(builder, values[4], [], body)
        return context.get_dummy_value()

    return types.void(stream, src, dst, types.int64, types.int64, types.float32), generate


def _multiply_python(stream: int, src: Any, dst: Any, at: int, vectors: int, step: Any) -> None:
    here = slice(at, at + LANES * vectors)
    dst[here] = src[here].astype(np.float32) * step


multiply: Callable[..., None] = _multiply_python if DISABLED else _multiply
"""multiply(stream, src, dst, at, vectors, step): `vectors` · 16 codes, one vector at least, from `at` on.

With `stream`, `dst` is written past the caches, and aligned to 64 bytes.
"""


@cache
def _widen(storage: int, stream: int) -> Any:
    """widen(source, target, size, step, threads): `size` codes at `source` to float32 at `target`, addresses."""
    key = (storage, stream)

    def widen_task(lot, thread, source, target, size, lots, step):
        src, dst = array_at(storage, source, size), array_at(0, target, size)
        vectors = (size + 15) // 16
        start, last = 16 * (lot * vectors // lots), min(size, 16 * ((lot + 1) * vectors // lots))
        whole = (last - start) // 16
        if whole > 0:
            multiply(stream, src, dst, start, whole, step)
        for i in range(start + 16 * whole, last):
            dst[i] = np.float32(src[i]) * step

    inner = kernel(widen_task, key=key)

    def widen(source, target, size, step, threads):
        lots = lots_of(size, (size + 32767) // 32768, threads)  # TASK
        parallel_for(inner, lots, min(lots, threads), (source, target, size, lots, np.float32(step)))

    return kernel(widen, key=key)


def widen_codes(storage: str) -> Callable[[int, int, int, float, int], None]:
    """widen(source, target, size, step, threads): codes at an address, times `step`, to float32 at another.

    `storage` is how the codes are stored: int8, int16 or int32.
    """
    place = STORAGE_NAMES.index(storage)
    small, large = _widen(place, 0), _widen(place, 1)

    def widen(source: int, target: int, size: int, step: float, threads: int) -> None:
        if 4 * size < STREAM_BYTES or target % 64:
            small(source, target, size, step, threads)
        else:
            large(source, target, size, step, threads)

    return widen
