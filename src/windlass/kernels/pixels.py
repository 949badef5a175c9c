"""Pixels and weights between tensors and cache, for the kernels that work tap by tap.

In cache an image has its channels side by side; a pixel takes `pitch` numbers, a row `row_pitch`.  A tensor whose
channels lie side by side (channels_last) is copied by vectors; one whose columns do (NCHW) is transposed 16 × 16
on the way.  Other strides are right, and slow.  Every destination has room for one vector past its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from windlass.kernels import emit
from windlass.kernels.jit import DISABLED, LANES, kernel
from windlass.kernels.runs import emit_fetch
from windlass.kernels.strips import Filter, Image
from windlass.kernels.transform import clear, move, prefetch, transpose


def _mask(builder: ir.IRBuilder, count: Any) -> Any:
    """The first `count` lanes."""
    whole = ir.VectorType(emit.i64, LANES)
    first = builder.insert_element(ir.Constant(whole, ir.Undefined), count, ir.Constant(emit.i32, 0))
    zeros = ir.Constant(ir.VectorType(emit.i32, LANES), [0] * LANES)
    counts = builder.shuffle_vector(first, ir.Constant(whole, ir.Undefined), zeros)
    return builder.icmp_signed("<", ir.Constant(whole, list(range(LANES))), counts)


def _masked(builder: ir.IRBuilder, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, arguments)


@intrinsic
def _take(typing_context, src, src_at, count, dst, dst_at):
    def generate(context, builder, signature, values):
        address = builder.gep(emit.pointer(context, builder, src, values[0]), [values[1]])
        address = builder.bitcast(address, emit.vector.as_pointer())
        arguments = [address, ir.Constant(emit.i32, 4), _mask(builder, values[2]), emit.splat(builder, 0.0)]
        value = _masked(builder, f"llvm.masked.load.v{LANES}f32.p0", emit.vector, arguments)
        emit.store(builder, value, emit.pointer(context, builder, dst, values[3]), values[4])
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64), generate


def _take_python(src: Any, src_at: int, count: int, dst: Any, dst_at: int) -> None:
    target = emit.flat(dst)[dst_at:][:LANES]
    target[:] = 0
    target[:count] = emit.flat(src)[src_at : src_at + count]


take: Callable[..., None] = _take_python if DISABLED else _take
"""take(src, src_at, count, dst, dst_at): writes 16 numbers, of which only the first `count` ≤ 16 are read; the
others are 0."""


@intrinsic
def _give(typing_context, src, src_at, dst, dst_at, count):
    def generate(context, builder, signature, values):
        value = emit.load(builder, emit.pointer(context, builder, src, values[0]), values[1])
        address = builder.gep(emit.pointer(context, builder, dst, values[2]), [values[3]])
        address = builder.bitcast(address, emit.vector.as_pointer())
        arguments = [value, address, ir.Constant(emit.i32, 4), _mask(builder, values[4])]
        _masked(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(src, types.int64, dst, types.int64, types.int64), generate


def _give_python(src: Any, src_at: int, dst: Any, dst_at: int, count: int) -> None:
    emit.flat(dst)[dst_at : dst_at + count] = emit.flat(src)[src_at : src_at + count]


give: Callable[..., None] = _give_python if DISABLED else _give
"""give(src, src_at, dst, dst_at, count): writes only the first `count` ≤ 16 of 16 numbers."""


@intrinsic
def _add(typing_context, src, src_at, dst, dst_at):
    def generate(context, builder, signature, values):
        target = emit.pointer(context, builder, dst, values[2])
        value = emit.load(builder, emit.pointer(context, builder, src, values[0]), values[1])
        total = builder.fadd(emit.load(builder, target, values[3]), value)
        emit.store(builder, total, target, values[3])
        return context.get_dummy_value()

    return types.void(src, types.int64, dst, types.int64), generate


def _add_python(src: Any, src_at: int, dst: Any, dst_at: int) -> None:
    emit.flat(dst)[dst_at:][:LANES] += emit.flat(src)[src_at:][:LANES]


add: Callable[..., None] = _add_python if DISABLED else _add
"""add(src, src_at, dst, dst_at): adds 16 numbers to 16."""


@intrinsic
def _zip3(typing_context, src, src_at, src_row, dst, dst_at):
    def generate(context, builder, signature, values):
        source = emit.pointer(context, builder, src, values[0])
        target = emit.pointer(context, builder, dst, values[3])
        rows = [builder.add(values[1], builder.mul(emit.constant(c), values[2])) for c in range(3)]
        first, second, third = (emit.load(builder, source, row) for row in rows)
        for block in range(3):
            places = [divmod(block * LANES + lane, 3) for lane in range(LANES)]
            pair = [pixel + LANES * min(c, 1) for pixel, c in places]
            value = builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(emit.i32, LANES), pair))
            whole = [LANES + pixel if c == 2 else lane for lane, (pixel, c) in enumerate(places)]
            value = builder.shuffle_vector(value, third, ir.Constant(ir.VectorType(emit.i32, LANES), whole))
            emit.store(builder, value, target, builder.add(values[4], emit.constant(block * LANES)))
        return context.get_dummy_value()

    return types.void(src, types.int64, types.int64, dst, types.int64), generate


def _zip3_python(src: Any, src_at: int, src_row: int, dst: Any, dst_at: int) -> None:
    rows = [emit.flat(src)[src_at + c * src_row :][:LANES] for c in range(3)]
    emit.flat(dst)[dst_at:][: 3 * LANES] = np.stack(rows, 1).reshape(-1)


zip3: Callable[..., None] = _zip3_python if DISABLED else _zip3
"""zip3(src, src_at, src_row, dst, dst_at): three rows of 16 numbers become 16 triples."""


@intrinsic
def _fetch(typing_context, src, src_at):
    def generate(context, builder, signature, values):
        emit_fetch(builder, builder.gep(emit.pointer(context, builder, src, values[0]), [values[1]]))
        return context.get_dummy_value()

    return types.void(src, types.int64), generate


def _fetch_python(src: Any, src_at: int) -> None:
    pass


fetch: Callable[..., None] = _fetch_python if DISABLED else _fetch
"""fetch(src, src_at): asks for a line of memory to come to the second cache; any address will do."""


@kernel
def fetch_pixels(src: Any, at: int, pitch: int, channels: int, first: int, last: int) -> None:
    """Asks for `channels` channels of pixels first…last, `pitch` numbers apart."""
    for p in range(first, last):
        for c in range(0, channels, LANES):
            fetch(src, at + p * pitch + c)


AHEAD = 1024
"""Numbers between the one that is copied and the one that is fetched from memory."""


@kernel
def copy(src: Any, at: int, count: int, dst: Any, to: int) -> None:
    """`count` numbers; writes up to 15 zeros after them."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        prefetch(1, 1, src, at + i + AHEAD, 0, 0)
        move(src, at + i, dst, to + i)
    if whole < count:
        take(src, at + whole, count - whole, dst, to + whole)


@kernel
def zero(dst: Any, to: int, count: int) -> None:
    """At least `count` zeros, up to 15 more."""
    for i in range(0, count, LANES):
        clear(dst, to + i)


@kernel
def _columns_in(x: Any, at: int, image: Image, channels: int, cols: int, buf: Any, to: int, pitch: int) -> None:
    """Part of a row of an image in NCHW order."""
    blocks = channels // LANES * LANES if cols >= LANES and image.w == 1 else 0
    for c in range(0, blocks, LANES):
        for j in range(0, cols, LANES):
            first = min(j, cols - LANES)
            transpose(x, at + c * image.c + first, image.c, buf, to + first * pitch + c, pitch)
    if channels == pitch == 3 and image.w == 1 and cols >= LANES:
        for j in range(0, cols, LANES):
            first = min(j, cols - LANES)
            zip3(x, at + first, image.c, buf, to + first * pitch)
        return
    for c in range(blocks, channels):
        for j in range(cols):
            buf[to + j * pitch + c] = x[at + c * image.c + j * image.w]


@kernel
def _planes_in(x: Any, at: int, image: Image, channels: int, first: int, last: int, buf: Any, to: int,
               row_pitch: int, pitch: int, patch: Any, patch_at: int) -> None:  # fmt: skip
    """Rows first…last of an image in NCHW order without gaps, 16 pixels at a time, over the rows' ends."""
    low, high = first * image.width, last * image.width
    for c in range(0, channels, LANES):
        for f in range(low, high, LANES):
            p = min(f, high - LANES)
            transpose(x, at + c * image.c + p, image.c, patch, patch_at, LANES)
            line = to + (p // image.width - first) * row_pitch
            j = p % image.width
            for q in range(LANES):
                move(patch, patch_at + q * LANES, buf, line + j * pitch + c)
                j += 1
                if j == image.width:
                    j = 0
                    line += row_pitch


@kernel
def rows_in(x: Any, at: int, image: Image, channels: int, fill: int, row: int, rows: int, col: int, cols: int,
            hollow: int, buf: Any, to: int, row_pitch: int, pitch: int, patch: Any, patch_at: int) -> None:  # fmt: skip
    """buf[i, j, c] = x at (row + i, col + j) for `channels` channels, zero outside the image.

    Channels from `channels` to `fill` ≤ pitch are set to 0.  With `hollow` 1, rows outside the image are left as they
    were.  `patch` has room for 16 × 16 numbers.
    """
    low, high = min(max(0, -col), cols), max(0, min(cols, image.width - col))
    high = max(low, high)
    first, last = min(max(0, -row), rows), max(0, min(rows, image.height - row))
    width = high - low
    flat = (
        image.w == 1 and image.c != 1 and image.h == image.width and width == image.width and width < 3 * LANES
        and width % LANES != 0 and channels % LANES == 0 and (last - first) * width >= LANES
    )  # fmt: skip
    if flat:
        _planes_in(x, at, image, channels, row + first, row + last, buf, to + first * row_pitch + low * pitch,
                   row_pitch, pitch, patch, patch_at)  # fmt: skip
    for i in range(rows):
        line = to + i * row_pitch
        if i < first or i >= last:
            if not hollow:
                zero(buf, line, cols * pitch)
            continue
        start = at + (row + i) * image.h + (col + low) * image.w
        if flat:
            for j in range(low):
                zero(buf, line + j * pitch, fill)
            for j in range(high, cols):
                zero(buf, line + j * pitch, fill)
            continue
        zero(buf, line, low * pitch)
        if image.c == 1 and image.w == channels and pitch == channels:
            copy(x, start, width * channels, buf, line + low * pitch)
        elif image.c == 1:
            for j in range(low, high):
                copy(x, start + (j - low) * image.w, channels, buf, line + j * pitch)
        else:
            if channels < fill:
                zero(buf, line + low * pitch, width * pitch)
            _columns_in(x, start, image, channels, width, buf, line + low * pitch, pitch)
        zero(buf, line + high * pitch, (cols - high) * pitch)


@kernel
def _planes_out(tile: Any, at: int, pitch: int, y: Any, to: int, image: Image, pixels: int, channels: int) -> None:
    """Neighbouring pixels of an image in NCHW order without gaps."""
    whole = channels // LANES * LANES if pixels >= LANES else 0
    for c in range(0, whole, LANES):
        for f in range(0, pixels, LANES):
            p = min(f, pixels - LANES)
            transpose(tile, at + p * pitch + c, pitch, y, to + c * image.c + p, image.c)
    for c in range(whole, channels):
        for p in range(pixels):
            y[to + c * image.c + p] = tile[at + p * pitch + c]


@kernel
def rows_out(tile: Any, at: int, row_pitch: int, pitch: int, y: Any, to: int, image: Image, rows: int, cols: int,
             channels: int) -> None:  # fmt: skip
    """Writes y, rows × cols pixels and the first `channels` channels of a tile."""
    if image.c != 1 and image.w == 1 and image.h == cols and row_pitch == cols * pitch:
        _planes_out(tile, at, pitch, y, to, image, rows * cols, channels)
        return
    for i in range(rows):
        base, start = at + i * row_pitch, to + i * image.h
        if image.c == 1:
            for j in range(cols):
                for c in range(0, channels, LANES):
                    give(tile, base + j * pitch + c, y, start + j * image.w + c, min(LANES, channels - c))
        elif image.w == 1:
            _planes_out(tile, base, pitch, y, start, image, cols, channels)
        else:
            for j in range(cols):
                for c in range(channels):
                    y[start + j * image.w + c * image.c] = tile[base + j * pitch + c]


@kernel
def weights_in(w: Any, at: int, filter: Filter, cols: int, taps: int, outputs: int, channels: int, places: Any,
               panel: Any, to: int, width: int, stride: int, patch: Any, patch_at: int, last: int) -> None:  # fmt: skip
    """panel[places[tap] · stride + c, k] = w[k, c, tap] for up to 16 outputs, zero for more.

    Rows of the panel have `width` numbers, of which 16 are written.  Taps with a negative place are left out.
    `last` is the offset of the last weight in memory: nothing is read beyond.
    """
    dense = filter.s == 1 and filter.r == cols
    if outputs >= LANES and filter.k == 1:
        for t in range(taps):
            if places[t] < 0:
                continue
            start = at + t // cols * filter.r + t % cols * filter.s
            for c in range(channels):
                move(w, start + c * filter.c, panel, to + (places[t] * stride + c) * width)
    elif outputs >= LANES and filter.c == 1 and channels % LANES == 0:
        for t in range(taps):
            if places[t] < 0:
                continue
            start = at + t // cols * filter.r + t % cols * filter.s
            for c in range(0, channels, LANES):
                transpose(w, start + c, filter.k, panel, to + (places[t] * stride + c) * width, width)
    elif outputs >= LANES and dense and filter.c == taps and channels * taps >= LANES:
        total = channels * taps
        for f in range(0, total, LANES):
            p = min(f, total - LANES)
            transpose(w, at + p, filter.k, patch, patch_at, LANES)
            for q in range(LANES):
                place = places[(p + q) % taps]
                if place >= 0:
                    move(patch, patch_at + q * LANES, panel, to + (place * stride + (p + q) // taps) * width)
    elif outputs >= LANES and dense and filter.k == taps:
        for c in range(channels):
            for t in range(0, taps, LANES):
                start = at + c * filter.c + t
                count = min(LANES, taps - t)
                if start + (LANES - 1) * (taps + 1) <= last:
                    transpose(w, start, taps, patch, patch_at, LANES)
                else:
                    for q in range(count):
                        for k in range(LANES):
                            patch[patch_at + q * LANES + k] = w[start + q + k * taps]
                for q in range(count):
                    if places[t + q] >= 0:
                        move(patch, patch_at + q * LANES, panel, to + (places[t + q] * stride + c) * width)
    else:
        for t in range(taps):
            if places[t] < 0:
                continue
            start = at + t // cols * filter.r + t % cols * filter.s
            for c in range(channels):
                base = to + (places[t] * stride + c) * width
                clear(panel, base)
                for k in range(min(outputs, LANES)):
                    panel[base + k] = w[start + c * filter.c + k * filter.k]


@kernel
def weights_out(panel: Any, at: int, width: int, stride: int, w: Any, to: int, filter: Filter, cols: int, taps: int,
                outputs: int, channels: int, patch: Any, patch_at: int) -> None:  # fmt: skip
    """w[k, c, tap] = panel[tap · stride + c, k] for up to 16 outputs."""
    dense = filter.s == 1 and filter.r == cols
    if outputs >= LANES and filter.c == 1 and channels % LANES == 0:
        for t in range(taps):
            start = to + t // cols * filter.r + t % cols * filter.s
            for c in range(0, channels, LANES):
                transpose(panel, at + (t * stride + c) * width, width, w, start + c, filter.k)
    elif outputs >= LANES and dense and filter.c == taps and channels * taps >= LANES:
        total = channels * taps
        for f in range(0, total, LANES):
            p = min(f, total - LANES)
            for q in range(LANES):
                source = at + ((p + q) % taps * stride + (p + q) // taps) * width
                move(panel, source, patch, patch_at + q * LANES)
            transpose(patch, patch_at, LANES, w, to + p, filter.k)
    else:
        for t in range(taps):
            start = to + t // cols * filter.r + t % cols * filter.s
            for c in range(channels):
                base = at + (t * stride + c) * width
                for k in range(min(outputs, LANES)):
                    w[start + c * filter.c + k * filter.k] = panel[base + k]
