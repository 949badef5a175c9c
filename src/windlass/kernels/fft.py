"""Convolution in the Fourier domain, by overlapping tiles of n × n pixels.

    y = crop IFFT( Σ_c FFT(x_c) · conj(FFT(w_kc)) )              Mathieu, Henaff and LeCun 2014; overlap-save

A tile gives m = n - extent + 1 right pixels a side, extent = dilation · (k - 1) + 1.  Over all channels the
products are n²/2 + 2 independent complex matrix products, one per frequency f of a tile:

    X[f][tile][c],   U[f][c][k],   M[f][tile][k] = Σ_c X[f][tile][c] · conj(U[f][c][k])

Spectra are large, so they are made, multiplied and forgotten in blocks (`windlass.kernels.fft_blocks`).  All threads
share a block; every spectrum is written by one task and read by others after all are done.  What does not fit the
caches is written past them, and fetched ahead.

The gradients are

    dx = crop IFFT( Σ_k FFT(dy_k) · FFT(w_kc) )
    dw = crop IFFT( Σ_tiles X_t · conj(FFT(dy_t)) ),    dy_t the tile's m × m outputs and zeros,

the latter summed in the order of the tiles.  The gradient of the input needs the spectra that the forward pass made.
`forward` can leave them in an array, `kept`, in its own layout: U[group][panel of k][f][c][re 32, im 32].  What
`backward_input` makes anew without it is U[panel of c][f][k][re, im]; from `kept` it transposes each panel in cache
when it is multiplied.  Both ways the same numbers are multiplied and summed in the same order: the bits are the same.

Bits depend neither on blocks nor on threads.  Depthwise convolutions are in `windlass.kernels.fft_depthwise`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from windlass.errors import ConfigError
from windlass.kernels import fft_depthwise, fft_stages
from windlass.kernels.cgemm import ACCUMULATE, STREAM
from windlass.kernels.codelets import codelets
from windlass.kernels.emit import flat
from windlass.kernels.fft_blocks import (
    Blocks,
    Sizes,
    blocks_of,
    chunks,
    floats,
    kept_layout,
    layouts,
    sizes_of,
    steps,
)
from windlass.kernels.fft_geometry import (
    Geometry,
    geometry,
    image_of,
    is_plain,
    padded,
    plain,
    room_of,
    streams,
    taps_of,
)
from windlass.kernels.jit import LANES, TILE_COLUMNS
from windlass.kernels.spectra import Room, block_floats
from windlass.kernels.workspace import ALIGNMENT, scratch
from windlass.plan.convolution import ConvShape, Direction
from windlass.plan.fourier import num_frequencies

Array = npt.NDArray[np.float32]

MOST_TILES = 192
"""Tiles up to which kept spectra save time (see `keeping_pays`)."""

CACHE_BYTES = 8 << 20
"""Spectra of more than so many bytes are written past the caches."""


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, tile: int, threads: int,
    relu: bool = False, kept: Array | None = None,
) -> None:  # fmt: skip
    """Writes `y` = conv(x, w) + bias, and max(y, 0) with `relu`; NaN stays NaN.

    Args:
        x: float32, N × C × H × W, with any strides; so are the others.
        w: weights, K × C/G × R × S.
        bias: K numbers, or None.
        y: results, N × K × P × Q.
        shape: the convolution.
        tile: n; larger than the filter.
        threads: how many work.
        relu: whether negative results become 0.
        kept: `kept_floats` numbers, aligned to 64 bytes, for the weights' spectra; or None.

    Raises:
        ConfigError: the stride is not 1, the filter not smaller than the tile, or `kept` not such an array.
    """
    g = geometry(shape, tile)
    _check(kept, shape, tile)
    if not y.size:
        return
    out = y if is_plain(y) else np.empty(y.shape, np.float32)
    x, w = plain(x), plain(w)
    if shape.is_depthwise:
        fft_depthwise.forward(x, w, bias, out, g, shape=shape, threads=threads, relu=relu, kept=kept)
    else:
        for (i, o), spectra in zip(_groups(shape), _shares(kept, shape), strict=True):
            part = None if bias is None else bias[o]
            _convolve(x[:, i], w[o], part, out[:, o], g, shape=shape, threads=threads, relu=relu, kept=spectra)
    if out is not y:
        y[...] = out


def backward_input(
    dy: Array, w: Array, dx: Array, *, shape: ConvShape, tile: int, threads: int, kept: Array | None = None
) -> None:
    """Writes the gradient of the input; arguments as for `forward`, which has filled `kept` with these weights."""
    g = geometry(shape, tile, turned=True)
    _check(kept, shape, tile)
    if not dx.size:
        return
    out = dx if is_plain(dx) else np.empty(dx.shape, np.float32)
    dy, w = plain(dy), plain(w)
    if shape.is_depthwise:
        fft_depthwise.backward_input(dy, w, out, g, shape=shape, threads=threads, kept=kept)
    else:
        for (i, o), spectra in zip(_groups(shape), _shares(kept, shape), strict=True):
            _convolve(dy[:, o], w[o], None, out[:, i], g, shape=shape, threads=threads, relu=False, kept=spectra)
    if out is not dx:
        dx[...] = out


def backward_weight(x: Array, dy: Array, dw: Array, *, shape: ConvShape, tile: int, threads: int) -> None:
    """Writes the gradient of the weights; arguments as for `forward`."""
    g = geometry(shape, tile)
    if not dy.size:
        dw[...] = 0
        return
    out = dw if is_plain(dw) else np.empty(dw.shape, np.float32)
    x, dy = plain(x), plain(dy)
    if shape.is_depthwise:
        fft_depthwise.backward_weight(x, dy, out, g, shape=shape, threads=threads)
    else:
        for i, o in _groups(shape):
            _adjoint(x[:, i], dy[:, o], out[o], g, shape=shape, threads=threads)
    if out is not dw:
        dw[...] = out


def kept_floats(*, shape: ConvShape, tile: int) -> int:
    """Numbers in the spectra of all weights, which depend neither on the images' number nor on their size."""
    if shape.is_depthwise:
        return fft_depthwise.filter_floats(shape, tile)
    return shape.groups * sizes_of(tile, 0, 0, shape.group_out).panels * kept_layout(tile, shape.group_in).panel


def keeping_pays(*, shape: ConvShape, tile: int) -> bool:
    """Whether kept spectra save time.

    With many tiles the weights' transforms are a small part, and it costs as much to transpose kept spectra for every
    block of tiles.  Depthwise ones are used as they are.
    """
    return shape.is_depthwise or geometry(shape, tile, turned=True).tiles <= MOST_TILES


def workspace_bytes(direction: Direction, *, shape: ConvShape, tile: int, threads: int) -> int:
    """Bytes of scratch memory over all threads; with `kept` no more."""
    g = geometry(shape, tile, turned=direction == "input")
    if not g.tiles:
        return 0
    if shape.is_depthwise:
        numbers: tuple[int, ...] = fft_depthwise.scratch_floats(direction, g, shape=shape, threads=threads)
    else:
        depths, lanes = (shape.group_out, shape.group_in) if g.turned else (shape.group_in, shape.group_out)
        numbers = _scratch(*_blocks(g, depths, lanes, direction == "weight", threads), _room(g, shape), threads)
    return 4 * sum(numbers)


def _groups(shape: ConvShape) -> list[tuple[slice, slice]]:
    """Input and output channels of each group."""
    i, o = shape.group_in, shape.group_out
    return [(slice(g * i, (g + 1) * i), slice(g * o, (g + 1) * o)) for g in range(shape.groups)]


def _check(kept: Array | None, shape: ConvShape, tile: int) -> None:
    """Refuses an array that is not for these spectra."""
    needed = kept_floats(shape=shape, tile=tile)
    if kept is not None and (kept.shape != (needed,) or kept.strides != (4,) or kept.ctypes.data % ALIGNMENT):
        raise ConfigError(
            f"fft-{tile} keeps {needed} numbers in a row, aligned to {ALIGNMENT} bytes; got an array of {kept.shape}"
        )


def _shares(kept: Array | None, shape: ConvShape) -> list[Array] | list[None]:
    """Each group's part of the kept spectra."""
    return [None] * shape.groups if kept is None else list(kept.reshape(shape.groups, -1))


def _blocks(
    g: Geometry, depths: int, lanes: int, weight: bool, threads: int, *, kept: bool = False
) -> tuple[Sizes, Blocks]:
    sizes = sizes_of(g.n, g.tiles, depths, lanes)
    return sizes, blocks_of(sizes, weight=weight, threads=threads, kept=kept)


def _room(g: Geometry, shape: ConvShape) -> Room:
    """Beside a tile's rows 16 filters, or a panel of spectra for one product."""
    panel = chunks(g.n).depths * 2 * TILE_COLUMNS
    return room_of(g.n, max(panel, block_floats(shape.kernel[0] * shape.kernel[1])))


def _scratch(sizes: Sizes, blocks: Blocks, room: Room, threads: int) -> tuple[int, ...]:
    """Numbers in X, M, U and the threads' own."""
    return (*floats(sizes, blocks), room.all * threads)


def _convolve(
    x: Array, w: Array, bias: Array | None, y: Array, g: Geometry, *, shape: ConvShape, threads: int, relu: bool,
    kept: Array | None,
) -> None:  # fmt: skip
    """One group's y = conv(x, w) + bias."""
    taps, source, target = taps_of(w, shape, turned=g.turned), image_of(x, g.top, g.left), image_of(y)
    sizes, blocks = _blocks(g, taps.depths, taps.lanes, False, threads, kept=kept is not None)
    room, (xl, ml, ul) = _room(g, shape), layouts(g.n, blocks)
    num_x, num_m, num_u, num_work = _scratch(sizes, blocks, room, threads)
    if kept is None:
        X, M, U, work = scratch(num_x, num_m, num_u, num_work)
    else:
        (X, M, work), U, ul = scratch(num_x, num_m, num_work), kept, kept_layout(g.n, shape.group_in)
    past = 4 * (X.size + M.size + (U.size if kept is None else 0)) > CACHE_BYTES
    codes = codelets(g.n, stream=past)
    short = codelets(g.n, nonzero=g.nonzero, stream=past or 4 * U.size > CACHE_BYTES)
    added, floor, scale = padded(bias, taps.lanes), np.float32(0 if relu else -np.inf), np.float32(g.n**-2)
    stream = streams(y)
    x, w, y = flat(x), flat(w), flat(y)
    have_x: tuple[int, int] | None = None
    have_u: set[tuple[int, int]] = set()
    for (t, tiles), (d, depths), (panel, panels) in steps(sizes, blocks, weight=False):
        if have_x != (t, d):
            fft_stages.images(x, source, g.x_tiling, t, tiles, d, depths, X, xl, codes, work, room, threads)
            have_x = (t, d)
        sums = (M, ml, ACCUMULATE if d else STREAM * past, chunks(g.n).depths)
        if kept is not None and g.turned:
            fft_stages.kept_products(tiles, d, depths, panel, panels, taps.lanes, X, xl, U, ul, *sums, work, room,
                                     num_frequencies(g.n), threads)  # fmt: skip
        else:
            part = U if kept is None else U[panel * ul.panel + d * ul.row :]
            if (panel, d) not in have_u:
                fft_stages.filters(w, taps, g.nonzero, d, depths, panel, panels, part, ul, short, work, room, threads)
                have_u = {(panel, d)} if kept is None else have_u | {(panel, d)}
            fft_stages.products(num_frequencies(g.n), tiles, depths, panels, X, xl, part, ul, *sums, int(g.turned),
                                threads)  # fmt: skip
        if d + depths == sizes.depths:
            k = panel * TILE_COLUMNS
            fft_stages.outputs(
                y, target, g.y_tiling, t, tiles, k, min(panels * TILE_COLUMNS, sizes.lanes - k), M, ml, codes, work,
                room, scale, added, floor, stream, threads,
            )  # fmt: skip


def _adjoint(x: Array, dy: Array, dw: Array, g: Geometry, *, shape: ConvShape, threads: int) -> None:
    """One group's gradient of the weights."""
    num = num_frequencies(g.n)
    taps, source, gradient = taps_of(dw, shape, turned=False), image_of(x, g.top, g.left), image_of(dy)
    sizes, blocks = _blocks(g, taps.depths, taps.lanes, True, threads)
    room, (xl, ml, ul) = _room(g, shape), layouts(g.n, blocks)
    past = 4 * sum(floats(sizes, blocks)) > CACHE_BYTES
    codes = codelets(g.n, stream=past)
    X, M, U, work = scratch(*_scratch(sizes, blocks, room, threads))
    zeros, scale = np.zeros(LANES, np.float32), np.float32(g.n**-2)
    x, dy, dw = flat(x), flat(dy), flat(dw)
    have_x = have_y = None
    for (t, tiles), (d, depths), (panel, panels) in steps(sizes, blocks, weight=True):
        if have_x != (t, d):
            fft_stages.images(x, source, g.x_tiling, t, tiles, d, depths, X, xl, codes, work, room, threads)
            have_x = (t, d)
        if have_y != (t, panel):
            k = panel * TILE_COLUMNS
            lanes = min(panels * TILE_COLUMNS, sizes.lanes - k)
            fft_stages.images(dy, gradient, g.y_tiling, t, tiles, k, lanes, M, ml, codes, work, room, threads)
            have_y = (t, panel)
        flags = ACCUMULATE if t else STREAM * past
        fft_stages.adjoints(num, tiles, depths, panels, X, xl, M, ml, U, ul, flags, chunks(g.n).tiles, threads)
        if t + tiles == sizes.tiles:
            fft_stages.gradients(dw, taps, d, depths, panel, panels, U, ul, codes, work, room, scale, zeros, threads)
