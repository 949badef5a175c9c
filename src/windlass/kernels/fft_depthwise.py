"""Depthwise convolution in the Fourier domain: every channel with a filter of its own.

    y_c = crop IFFT( FFT(x_c) · conj(FFT(w_c)) ),    dw_c = crop IFFT( Σ_tiles FFT(x_t) · conj(FFT(dy_t)) )

There is nothing to sum over channels, so a tile of 16 channels goes through all stages in second-level cache: its
rows are transformed; each column is transformed, multiplied and transformed back in first-level cache; then come
the rows again.  Tiles are as in `windlass.kernels.fft`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.codelets import codelets, transform
from windlass.kernels.fft_geometry import Geometry, image_of, odd_lines, padded, room_of, streams, taps_of
from windlass.kernels.jit import DISABLED, LANES, kernel
from windlass.kernels.spectra import (
    Room,
    Taps,
    block_floats,
    columns_back,
    filter_in,
    filter_out,
    prepare,
    rows_in,
    rows_out,
    weights_in,
    weights_out,
)
from windlass.kernels.threads import parallel_for
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape, Direction
from windlass.plan.fourier import num_frequencies

Array = npt.NDArray[np.float32]

PAIR = 2 * LANES
"""Floats of a frequency of 16 channels: real parts, imaginary parts."""

STEP = 4
"""Tiles of a task."""

TASKS = 16
"""At least so many tasks should sum a gradient of the weights."""


@intrinsic
def _times_conjugate(typing_context, count, a, a_at, b, b_at, c, c_at, accumulate):
    def generate(context, builder, signature, values):
        pointers = [
            builder.gep(emit.pointer(context, builder, kind, values[i]), [values[i + 1]])
            for kind, i in ((a, 1), (b, 3), (c, 5))
        ]
        keep = builder.icmp_signed("!=", values[7], emit.constant(0))

        def body(index: Any, state: Any) -> Any:
            at = builder.mul(index, emit.constant(PAIR))
            places = (at, builder.add(at, emit.constant(LANES)))
            (a_re, a_im), (b_re, b_im), (c_re, c_im) = (
                [emit.load(builder, pointer, place) for place in places] for pointer in pointers
            )
            zero = emit.splat(builder, 0.0)
            re = emit.fma(builder, a_re, b_re, builder.select(keep, c_re, zero))
            im = emit.fma(builder, a_im, b_re, builder.select(keep, c_im, zero))
            re = emit.fma(builder, a_im, b_im, re)
            im = emit.fma(builder, builder.fneg(a_re), b_im, im)
            for value, place in zip((re, im), places, strict=True):
                emit.store(builder, value, pointers[2], place)
            return state

        emit.loop(builder, values[0], [], body)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(whole, a, whole, b, whole, c, whole, whole), generate


def _times_conjugate_python(
    count: int, a: Any, a_at: int, b: Any, b_at: int, c: Any, c_at: int, accumulate: int
) -> None:
    def parts(array: Any, at: int) -> Any:
        return emit.flat(array)[at : at + count * PAIR].reshape(count, 2, LANES).swapaxes(0, 1)

    (a_re, a_im), (b_re, b_im), out = parts(a, a_at), parts(b, b_at), parts(c, c_at)
    product = np.stack([a_re * b_re + a_im * b_im, a_im * b_re - a_re * b_im])
    out[...] = product + (out if accumulate else 0)


times_conjugate: Callable[..., None] = _times_conjugate_python if DISABLED else _times_conjugate
"""times_conjugate(count, a, a_at, b, b_at, c, c_at, accumulate): c (+)= a · conj(b) of numbers [re 16, im 16]."""


@kernel
def _filter_task(task: int, thread: int, w: Any, taps: Any, nonzero: int, U: Any, codes: Any, work: Any,
                 room: Any) -> None:  # fmt: skip
    """Spectra of 16 filters."""
    at = thread * room.all
    k = task * LANES
    prepare(nonzero, codes, work, at, at + room.buffer)
    weights_in(w, k * taps.lane, taps, taps.lanes - k, 1, work, at + room.block)
    filter_in(work, at + room.block, taps, codes, at, at + room.buffer, U, task * codes.frequencies * PAIR, PAIR, LANES)


@kernel
def _tile_task(task: int, thread: int, x: Any, xi: Any, x_tiling: Any, y: Any, yi: Any, y_tiling: Any, channels: int,
               tiles: int, step: int, U: Any, turned: int, codes: Any, work: Any, room: Any, scale: Any, bias: Any,
               floor: Any, stream: int) -> None:  # fmt: skip
    """A few tiles of 16 channels, all the way; `turned` ones have their parts exchanged (see `fft_stages`)."""
    parts = (tiles + step - 1) // step
    channel = task // parts * LANES
    n, half = codes.n, codes.n // 2
    row = (half + 1) * PAIR
    s = thread * room.all
    column, im = s + room.block + turned * LANES, (1 - 2 * turned) * LANES
    for t in range(task % parts * step, min(task % parts * step + step, tiles)):
        rows_in(x, xi, x_tiling, t, channel, channels - channel, codes, work, s, s + room.buffer)
        u = task // parts * codes.frequencies * PAIR
        for v in range(half + 1):
            at = s + v * PAIR
            if v == 0 or v == half:
                transform(codes.from_real, work, at, row, 0, work, column, PAIR, im)
                times_conjugate(half + 1, work, s + room.block, U, u, work, s + room.block, 0)
                transform(codes.to_real, work, column, PAIR, im, work, at, row, 0)
                u += (half + 1) * PAIR
            else:
                transform(codes.complex, work, at, row, LANES, work, column, PAIR, im)
                times_conjugate(n, work, s + room.block, U, u, work, s + room.block, 0)
                transform(codes.complex, work, column + im, PAIR, -im, work, at + LANES, row, -LANES)
                u += n * PAIR
        rows_out(
            work, s, y, yi, y_tiling, t, channel, channels - channel, scale, bias, floor, stream, codes, s + room.buffer
        )


@kernel
def _convolve_all(x: Any, xi: Any, x_tiling: Any, w: Any, y: Any, yi: Any, y_tiling: Any, tiles: int, taps: Any,
             nonzero: int, U: Any, made: int, turned: int, codes: Any, short: Any, work: Any, room: Any, scale: Any,
             bias: Any, floor: Any, stream: int, threads: int) -> None:  # fmt: skip
    """`y` = conv(x, w) + bias, at least `floor`; the spectra of the filters may be `made` already."""
    vectors = (taps.lanes + LANES - 1) // LANES
    if not made:
        parallel_for(_filter_task, vectors, threads, (w, taps, nonzero, U, short, work, room))
    parts = (tiles + STEP - 1) // STEP
    parallel_for(
        _tile_task,
        vectors * parts,
        threads,
        (
            x,
            xi,
            x_tiling,
            y,
            yi,
            y_tiling,
            taps.lanes,
            tiles,
            STEP,
            U,
            turned,
            codes,
            work,
            room,
            scale,
            bias,
            floor,
            stream,
        ),
    )


@kernel
def _sum_task(task: int, thread: int, x: Any, xi: Any, x_tiling: Any, dy: Any, yi: Any, y_tiling: Any, channels: int,
              tiles: int, step: int, D: Any, codes: Any, work: Any, room: Any) -> None:  # fmt: skip
    """Σ FFT(x_t) · conj(FFT(dy_t)) over a few tiles of 16 channels."""
    parts = (tiles + step - 1) // step
    channel = task // parts * LANES
    n, half = codes.n, codes.n // 2
    row = (half + 1) * PAIR
    s = thread * room.all
    z = s + room.block + 2 * n * PAIR
    first, second = s + room.block, s + room.block + n * PAIR
    start = task % parts * step
    for t in range(start, min(start + step, tiles)):
        rows_in(x, xi, x_tiling, t, channel, channels - channel, codes, work, s, s + room.buffer)
        rows_in(dy, yi, y_tiling, t, channel, channels - channel, codes, work, z, s + room.buffer)
        d = task * codes.frequencies * PAIR
        for v in range(half + 1):
            count = n
            if v == 0 or v == half:
                count = half + 1
                transform(codes.from_real, work, s + v * PAIR, row, 0, work, first, PAIR, LANES)
                transform(codes.from_real, work, z + v * PAIR, row, 0, work, second, PAIR, LANES)
            else:
                transform(codes.complex, work, s + v * PAIR, row, LANES, work, first, PAIR, LANES)
                transform(codes.complex, work, z + v * PAIR, row, LANES, work, second, PAIR, LANES)
            times_conjugate(count, work, first, work, second, D, d, t - start)
            d += count * PAIR


@kernel
def _weight_task(task: int, thread: int, dw: Any, taps: Any, parts: int, D: Any, codes: Any, work: Any, room: Any,
                 scale: Any, zeros: Any) -> None:  # fmt: skip
    """Weights of 16 channels: the sums of all parts in their order, and back."""
    size = codes.frequencies * PAIR
    first = task * parts * size
    for part in range(1, parts):
        for i in range(size):
            D[first + i] += D[first + part * size + i]
    at = thread * room.all
    columns_back(D, first, PAIR, LANES, codes, work, at)
    filter_out(work, at, taps, codes, at + room.buffer, at + room.block)
    k = task * LANES
    weights_out(work, at + room.block, taps, taps.lanes - k, 1, scale, zeros, dw, k * taps.lane)


@kernel
def _weight(x: Any, xi: Any, x_tiling: Any, dy: Any, yi: Any, y_tiling: Any, dw: Any, tiles: int, step: int, taps: Any,
           D: Any, codes: Any, work: Any, room: Any, scale: Any, zeros: Any, threads: int) -> None:  # fmt: skip
    """The gradient of the weights; tasks of `step` tiles, of which bits depend."""
    vectors = (taps.lanes + LANES - 1) // LANES
    parts = (tiles + step - 1) // step
    parallel_for(
        _sum_task,
        vectors * parts,
        threads,
        (x, xi, x_tiling, dy, yi, y_tiling, taps.lanes, tiles, step, D, codes, work, room),
    )
    parallel_for(_weight_task, vectors, threads, (dw, taps, parts, D, codes, work, room, scale, zeros))


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, g: Geometry, *, shape: ConvShape, threads: int, relu: bool,
    kept: Array | None = None,
) -> None:  # fmt: skip
    """`y` = conv(x, w) + bias; writes the filters' spectra to `kept`."""
    _convolve(_repeated(x, shape), w, bias, y, g, shape=shape, threads=threads, relu=relu, kept=kept)


def backward_input(
    dy: Array, w: Array, dx: Array, g: Geometry, *, shape: ConvShape, threads: int, kept: Array | None = None
) -> None:
    """The gradient of the input, by the spectra that `forward` has `kept`."""
    if shape.group_out == 1:
        _convolve(dy, w, None, dx, g, shape=shape, threads=threads, relu=False, kept=kept)
        return
    n, channels, height, width = dx.shape
    each = np.empty((n, shape.out_channels, height, width), np.float32)
    _convolve(dy, w, None, each, g, shape=shape, threads=threads, relu=False, kept=kept)
    dx[...] = each.reshape(n, channels, shape.group_out, height, width).sum(2)


def backward_weight(x: Array, dy: Array, dw: Array, g: Geometry, *, shape: ConvShape, threads: int) -> None:
    """The gradient of the weights."""
    x = _repeated(x, shape)
    taps, room = _taps(dw, g, shape), _room(g, shape)
    step = _step(g, shape)
    D, work = scratch(*scratch_floats("weight", g, shape=shape, threads=threads))
    _weight(
        emit.flat(x), image_of(x, g.top, g.left), g.x_tiling, emit.flat(dy), image_of(dy), g.y_tiling, emit.flat(dw),
        g.tiles, step, taps, D, codelets(g.n), work, room, np.float32(g.n**-2), np.zeros(LANES, np.float32), threads,
    )  # fmt: skip


def _convolve(
    x: Array, w: Array, bias: Array | None, y: Array, g: Geometry, *, shape: ConvShape, threads: int, relu: bool,
    kept: Array | None,
) -> None:  # fmt: skip
    taps, room = _taps(w, g, shape), _room(g, shape)
    numbers = scratch_floats("forward", g, shape=shape, threads=threads)
    U, work = scratch(*numbers) if kept is None else (kept, *scratch(numbers[1]))
    _convolve_all(
        emit.flat(x), image_of(x, g.top, g.left), g.x_tiling, emit.flat(w), emit.flat(y), image_of(y), g.y_tiling,
        g.tiles, taps, g.nonzero, U, int(g.turned and kept is not None), int(g.turned), codelets(g.n),
        codelets(g.n, nonzero=g.nonzero), work, room, np.float32(g.n**-2), padded(bias, taps.lanes),
        np.float32(0 if relu else -np.inf), streams(y), threads,
    )  # fmt: skip


def scratch_floats(direction: Direction, g: Geometry, *, shape: ConvShape, threads: int) -> tuple[int, int]:
    """Numbers in the spectra of filters, or of their gradients' parts, and in the threads' own."""
    parts = -(-g.tiles // _step(g, shape)) if direction == "weight" else 1
    return parts * filter_floats(shape, g.n), _room(g, shape).all * threads


def filter_floats(shape: ConvShape, n: int) -> int:
    """Numbers in the spectra of all filters."""
    return -(-shape.out_channels // LANES) * num_frequencies(n) * PAIR


def _step(g: Geometry, shape: ConvShape) -> int:
    """Tiles of a task of the gradient of the weights."""
    vectors = -(-shape.out_channels // LANES)
    return -(-g.tiles // min(g.tiles, -(-TASKS // vectors)))


def _repeated(x: Array, shape: ConvShape) -> Array:
    """The input with a channel for each output channel; a copy where a channel has several."""
    return x if shape.group_out == 1 else np.repeat(x, shape.group_out, axis=1)


def _taps(w: Array, g: Geometry, shape: ConvShape) -> Taps:
    """The filters with their channels as lanes."""
    return taps_of(w, shape, turned=g.turned)._replace(lane=w.strides[0] // w.itemsize, depth=0, lanes=len(w), depths=1)


def _room(g: Geometry, shape: ConvShape) -> Room:
    """Two columns and the rows of dy, or a block of weights, after the rows and the row of pixels."""
    columns = 2 * g.n * PAIR + odd_lines(g.n * (g.n // 2 + 1) * PAIR)
    return room_of(g.n, max(columns, block_floats(shape.kernel[0] * shape.kernel[1], depths=1)))
