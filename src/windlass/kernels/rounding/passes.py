"""One pass over an array: random bits, rounding, storage and counts, on PyTorch's threads.

A task takes a run of numbers as they lie in memory and a piece of random bits that stays in the first cache.  The bits
belong to an element's logical position.  Where memory has another order, images in channels_last, the array is seen as
`batch` transposed matrices: logically [batch, channels, pixels], in memory [batch, pixels, channels].  Then a task
takes the bits of a tile, channel by channel, and lays them as the tile lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, kernel
from windlass.kernels.rounding.convert import COUNTED, FORMS, ROUNDINGS, STORAGE_NAMES, STORAGES, convert
from windlass.kernels.rounding.noise import fill, fill_groups, ieee, rows
from windlass.kernels.rounding.reference import Array, Counts, Words
from windlass.kernels.threads import parallel_for

CHUNK = 1024
"""Numbers between two fills of random bits: 2 KiB of them."""
TASK = 32 * CHUNK
TILE = 32 * CHUNK
"""Numbers of a tile of transposed matrices: 64 KiB of random bits, twice."""
LEAST_PIXELS = 64
ROOM = 2 * CHUNK
STREAM_BYTES = 8 << 20
"""Results of at least so many bytes are written past the caches."""
WASTE = 64 + 7 + LANES
"""Room that a run of random bits may need beyond its length."""


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    kind = ir.VectorType(emit.i64, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(emit.i32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(emit.i32, LANES), [0] * LANES))


@intrinsic(prefer_literal=True)
def _lay(typing_context, side, src, first, starts, starts_at, dst, dst_at, times, channels):
    width = side.literal_value

    def generate(context, builder, signature, values):
        source, begin, target = (
            emit.pointer(context, builder, kind, values[i]) for i, kind in ((1, src), (3, starts), (5, dst))
        )
        word = ir.IntType(64 if width == 4 else 32)
        words, longs = ir.VectorType(word, LANES), ir.VectorType(emit.i64, LANES)
        halves, pointers = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(word.as_pointer(), LANES)
        mask = ir.VectorType(ir.IntType(1), LANES)
        name = f"llvm.masked.gather.v{LANES}i{word.width}.v{LANES}p0"
        kind = ir.FunctionType(words, [pointers, emit.i32, mask, words])
        gather = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        how = [ir.Constant(emit.i32, 1), ir.Constant(mask, [1] * LANES), ir.Constant(words, None)]
        groups = builder.sdiv(builder.add(values[8], emit.constant(LANES - 1)), emit.constant(LANES))
        base = builder.ptrtoint(source, emit.i64)

        def at_pixel(index: Any, _: Any) -> Any:
            pixel = builder.add(values[2], builder.mul(index, emit.constant(width)))
            front = _splat(builder, builder.add(base, builder.shl(pixel, emit.constant(1))))

            def at_group(group: Any, _: Any) -> Any:
                channel = builder.mul(group, emit.constant(LANES))
                where = builder.gep(begin, [builder.add(values[4], channel)])
                offsets = builder.load(builder.bitcast(where, longs.as_pointer()), align=8)
                found = builder.call(gather, [builder.inttoptr(builder.add(front, offsets), pointers), *how])
                for i in range(width):
                    row = builder.mul(builder.add(pixel, emit.constant(i)), values[8])
                    to = builder.add(builder.add(values[6], row), channel)
                    address = builder.bitcast(builder.gep(target, [to]), halves.as_pointer())
                    part = builder.lshr(found, ir.Constant(words, [16 * i] * LANES))
                    builder.store(builder.trunc(part, halves), address, align=2)
                return []

            emit.loop(builder, groups, [], at_group)
            return []

        emit.loop(builder, values[7], [], at_pixel)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(side, src, whole, starts, whole, dst, whole, whole, whole), generate


def _lay_python(
    side: int, src: Any, first: int, starts: Any, starts_at: int, dst: Any, dst_at: int, times: int, channels: int
) -> None:  # fmt: skip
    for pixel in range(first, first + side * times):
        at = dst_at + pixel * channels
        dst[at : at + channels] = src[starts[starts_at : starts_at + channels] // 2 + pixel]


lay: Callable[..., None] = _lay_python if DISABLED else _lay
"""lay(side, src, first, starts, starts_at, dst, dst_at, times, channels): dst[pixel · channels + channel] becomes
src[starts[channel] / 2 + pixel] for the pixels `first` to `first` + `side` · `times`, of which there must be some.

`side` pixels, 1 or 4, are taken at once; 4 only where the channels are a multiple of 16, since otherwise more than
a pixel's channels is written, before those of the next.
"""


@kernel
def interleave(src, starts, starts_at, dst, dst_at, pixels, channels):
    """dst[pixel · channels + channel] = src[starts[channel] / 2 + pixel].

    `starts` counts bytes, as int64; it and `dst` have room for 16 numbers more than they need.
    """
    fours = pixels // 4 if channels % 16 == 0 else 0
    if fours > 0:
        lay(4, src, 0, starts, starts_at, dst, dst_at, fours, channels)
    if pixels > 4 * fours:
        lay(1, src, 4 * fours, starts, starts_at, dst, dst_at, pixels - 4 * fours, channels)


@cache
def _run(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """Rounds neighbours in memory; what is left of a vector goes by way of a patch."""

    def run(src, dst, at, length, noise, noise_at, numbers, counts, errors, place, patch, patch_out, patch_at):
        whole = length // 16
        if whole > 0:
            convert(form, storage, rounding, counted, stream, src, at, dst, at, noise, noise_at, whole,
                    numbers, counts, errors, place)  # fmt: skip
        done = 16 * whole
        if done < length:
            for i in range(length - done):
                patch[patch_at + i] = src[at + done + i]
            for i in range(length - done, 16):
                patch[patch_at + i] = 0
            convert(form, storage, rounding, counted, 0, patch, patch_at, patch_out, patch_at, noise, noise_at + done,
                    1, numbers, counts, errors, place)  # fmt: skip
            for i in range(length - done):
                dst[at + done + i] = patch_out[patch_at + i]

    return kernel(run, key=(form, storage, rounding, counted, stream))


@cache
def _flat(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """The pass over an array whose logical order is that of memory."""
    key = (form, storage, rounding, counted, stream)
    run = _run(*key)

    def flat_task(task, thread, src, dst, words, numbers, counts, errors, noise, patch, patch_out):
        ieee()
        start = task * 32768  # TASK
        last = min(src.size, start + 32768)
        mine = thread * 2048  # ROOM
        # No functions here: to hand over so many arrays takes as long as the work on a chunk.
        while start + 1024 <= last:  # CHUNK
            if rounding == 0:
                fill_groups(4, noise, mine, start // 8, 4, words, src, start + 1024)
            convert(form, storage, rounding, counted, stream, src, start, dst, start, noise, mine, 64, numbers,
                    counts, errors, task)  # fmt: skip
            start += 1024
        if start < last:
            if rounding == 0:
                fill(noise, mine, start // 8, (last - start + 63) // 64, words, src, start)
            run(
                src, dst, start, last - start, noise, mine, numbers, counts, errors, task, patch, patch_out, 16 * thread
            )

    inner = kernel(flat_task, key=key)

    def flat(src, dst, words, numbers, counts, errors, noise, patch, patch_out, tasks, threads):
        parallel_for(inner, tasks, threads, (src, dst, words, numbers, counts, errors, noise, patch, patch_out))

    return kernel(flat, key=key)


@cache
def _planes(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """The pass over `batch` transposed matrices."""
    key = (form, storage, rounding, counted, stream)
    run = _run(*key)

    def planes_task(task, thread, src, dst, words, numbers, counts, errors, noise, mixed, starts, patch, patch_out,
                    channels, pixels, tile, tiles, room, room_mixed):  # fmt: skip
        ieee()
        image = task // tiles
        first = task % tiles * tile
        length = min(tile, pixels - first)
        begin = image * channels * pixels
        random, lying, where = thread * room, thread * room_mixed, thread * (channels + 16)
        if length == pixels:
            fill(noise, random, begin // 8, (begin % 8 + channels * pixels + 63) // 64, words, src, 0)
            for c in range(channels):
                starts[where + c] = 2 * (random + begin % 8 + c * pixels)
        else:
            rows(noise, random, starts, where, begin + first, pixels, channels, length, words, src)
        interleave(noise, starts, where, mixed, lying, length, channels)
        run(src, dst, begin + first * channels, length * channels, mixed, lying, numbers, counts, errors, task, patch,
            patch_out, 16 * thread)  # fmt: skip

    inner = kernel(planes_task, key=key)

    def planes(src, dst, words, numbers, counts, errors, noise, mixed, starts, patch, patch_out, channels, pixels, tile,
               tiles, room, room_mixed, tasks, threads):  # fmt: skip
        parallel_for(
            inner, tasks, threads,
            (src, dst, words, numbers, counts, errors, noise, mixed, starts, patch, patch_out, channels, pixels, tile,
             tiles, room, room_mixed),
        )  # fmt: skip

    return kernel(planes, key=key)


class Work(NamedTuple):
    """How a pass is cut: tasks, threads, memory for random bits, and of planes the pixels of a tile and tiles."""

    tasks: int
    threads: int
    scratch: tuple[Array, ...]
    cut: tuple[int, ...] = ()


def _flat_work(size: int, stochastic: bool, threads: int) -> Work:
    tasks = -(-size // TASK)
    threads = max(1, min(threads, tasks))
    return Work(tasks, threads, (np.empty(threads * ROOM if stochastic else 1, np.uint16),))


def _planes_work(planes: tuple[int, int, int], threads: int) -> Work:
    batch, channels, pixels = planes
    tile = max(LEAST_PIXELS, TILE // channels // LANES * LANES)
    if pixels <= tile * 3 // 2:
        tile = pixels
    tiles = -(-pixels // tile)
    threads = max(1, min(threads, batch * tiles))
    room = channels * (tile + WASTE) + WASTE
    scratch = (
        np.empty(threads * room, np.uint16), np.empty(threads * (channels * tile + WASTE), np.uint16),
        np.zeros(threads * (channels + LANES), np.int64),
    )  # fmt: skip
    return Work(batch * tiles, threads, scratch, (channels, pixels, tile, tiles, room, channels * tile + WASTE))


def round_array(
    src: Array, dst: Array, *, form: str, rounding: str, low: float, high: float, step: float = 1.0,
    words: Words = (0, 0, 0, 0), planes: tuple[int, int, int] | None = None, counted: str = "nothing", threads: int = 1,
) -> Counts:  # fmt: skip
    """Rounds every number of `src` to `dst`, which may be `src`.

    Args:
        src: float32, one-dimensional and dense.
        dst: as many float32, int8, int16 or int32 (codes of fixed point; NaN becomes 0), or uint16 (bits of float16 and
            bfloat16).
        form: one of `FORMS`.
        rounding: one of `ROUNDINGS`.
        low: the lowest number of the format.
        high: the highest.
        step: of fixed point, a power of two.
        words: the key of random bits.
        planes: batch, channels and pixels, where memory holds [batch, pixels, channels]; None: logical order.
        counted: one of `COUNTED`: what is counted.  What is not is 0 in the result.
        threads: at most so many.
    """
    name = next(name for name, dtype in STORAGES.items() if dtype == dst.dtype)
    stream = int(dst.nbytes >= STREAM_BYTES and dst.ctypes.data % 64 == 0 and dst.ctypes.data != src.ctypes.data)
    stochastic = rounding == "stochastic"
    if planes is not None and (not stochastic or min(planes[1:]) < 2):
        planes = None
    if planes is not None:
        stream &= planes[1] * planes[2] % LANES == 0
    key = (FORMS.index(form), STORAGE_NAMES.index(name), ROUNDINGS.index(rounding), COUNTED.index(counted), stream)
    with np.errstate(all="ignore"):
        numbers = tuple(np.float32(value) for value in (low, high, step, 1.0 / step))
    work = _planes_work(planes, threads) if planes else _flat_work(src.size, stochastic, threads)
    counts, errors = np.zeros(3 * work.tasks, np.int64), np.zeros(work.tasks)
    patch, patch_out = np.empty(work.threads * LANES, np.float32), np.empty(work.threads * LANES, dst.dtype)
    common = (src, dst, words, numbers, counts, errors)
    if work.tasks and planes:
        _planes(*key)(*common, *work.scratch, patch, patch_out, *work.cut, work.tasks, work.threads)
    elif work.tasks:
        _flat(*key)(*common, *work.scratch, patch, patch_out, work.tasks, work.threads)
    saturated, zeroed, nan = (int(total) for total in counts.reshape(-1, 3).sum(axis=0))
    return Counts(saturated, zeroed, nan, float(errors.sum()))
