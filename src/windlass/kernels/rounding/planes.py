"""The pass over images in channels_last: `batch` transposed matrices, logically [batch, channels, pixels].

Memory holds [batch, pixels, channels].  A task takes the random bits of a tile, channel by channel, and lays them as
the tile lies.
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
from windlass.kernels.rounding.flat import run
from windlass.kernels.rounding.memory import array_at
from windlass.kernels.rounding.noise import fill, ieee, rows
from windlass.kernels.rounding.reference import Array
from windlass.kernels.threads import parallel_for

TILE = 32 * 1024
"""Numbers of a tile: 64 KiB of random bits, twice."""
LEAST_PIXELS = 64
WASTE = 64 + 7 + LANES
"""Room that a run of random bits may need beyond its length."""


class Tiles(NamedTuple):
    """How transposed matrices are cut, and the memory that their tasks need.

    Attributes:
        cut: of a matrix the channels, pixels, pixels of a tile and tiles; of a thread the room for bits as they come,
            and as they lie.
        scratch: that room for all threads, and of each channel the byte at which its bits begin.
    """

    tasks: int
    threads: int
    cut: tuple[int, int, int, int, int, int]
    scratch: tuple[Array, Array, Array]


def tiles_of(planes: tuple[int, int, int], threads: int) -> Tiles:
    """Tiles of `planes`: batch, channels and pixels."""
    batch, channels, pixels = planes
    tile = max(LEAST_PIXELS, TILE // channels // LANES * LANES)
    if pixels <= tile * 3 // 2:
        tile = pixels
    tiles = -(-pixels // tile)
    threads = max(1, min(threads, batch * tiles))
    room, lying = channels * (tile + WASTE) + WASTE, channels * tile + WASTE
    scratch = (
        np.empty(threads * room, np.uint16), np.empty(threads * lying, np.uint16),
        np.zeros(threads * (channels + LANES), np.int64),
    )  # fmt: skip
    return Tiles(batch * tiles, threads, (channels, pixels, tile, tiles, room, lying), scratch)


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
def planes_pass(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """Takes the arguments of `flat.flat_pass`, and what is in `Tiles` before the last two."""
    key = (form, storage, rounding, counted, stream)
    neighbours = run(*key)

    def planes_task(task, thread, source, target, size, base, words, numbers, counts, errors, noise, mixed, starts,
                    channels, pixels, tile, tiles, room, room_lying):  # fmt: skip
        ieee()
        src, dst = array_at(0, source, size), array_at(storage, target, size)
        image = task // tiles
        first = task % tiles * tile
        length = min(tile, pixels - first)
        begin = image * channels * pixels
        random, lying, where = thread * room, thread * room_lying, thread * (channels + 16)
        if length == pixels:
            shift = (base + begin) % 8
            groups = (shift + channels * pixels + 63) // 64
            fill(noise, random, (base + begin) // 8, groups, words, src, 0)
            for c in range(channels):
                starts[where + c] = 2 * (random + shift + c * pixels)
        else:
            rows(noise, random, starts, where, base + begin + first, pixels, channels, length, words, src)
        interleave(noise, starts, where, mixed, lying, length, channels)
        neighbours(src, dst, begin + first * channels, length * channels, mixed, lying, numbers, counts, errors, task)

    inner = kernel(planes_task, key=key)

    def planes(source, target, size, first, w0, w1, w2, w3, low, high, step, inverse, counts, errors, noise, mixed,
               starts, channels, pixels, tile, tiles, room, lying, tasks, threads):  # fmt: skip
        numbers = (np.float32(low), np.float32(high), np.float32(step), np.float32(inverse))
        parallel_for(
            inner, tasks, threads,
            (source, target, size, first, (w0, w1, w2, w3), numbers, counts, errors, noise, mixed, starts, channels,
             pixels, tile, tiles, room, lying),
        )  # fmt: skip

    return kernel(planes, key=key)
