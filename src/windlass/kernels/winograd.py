"""Winograd convolution on arrays: sizes, scratch memory and calls of the compiled kernels.

The algorithm is described in `windlass.kernels.winograd_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from windlass.kernels.emit import flat
from windlass.kernels.jit import LANES, TILE_COLUMNS
from windlass.kernels.strips import Filter, Image
from windlass.kernels.winograd_kernels import Parts, Tiles, kernels, patch_numbers
from windlass.kernels.workspace import scratch
from windlass.plan.convolution import ConvShape, Direction

Array = npt.NDArray[np.float32]

STREAM_BYTES = 32 << 20
"""Outputs from this size on are written past the caches, which they would only sweep."""

NUM_TASKS = 16
"""Tasks to aim at where tiles are divided for the gradient of the weights; it must not depend on the threads."""


@dataclass(frozen=True, slots=True)
class _Sizes:
    """One group's product: an image of `channels` to one of `outputs`, in tiles."""

    m: int
    r: int
    batch: int
    channels: int
    outputs: int
    out_height: int
    out_width: int

    @property
    def points(self) -> int:
        return (self.m + self.r - 1) ** 2

    @property
    def rows(self) -> int:
        return -(-self.out_height // self.m)

    @property
    def cols(self) -> int:
        return -(-self.out_width // self.m)

    @property
    def count(self) -> int:
        return self.batch * self.rows * self.cols

    @property
    def num_panels(self) -> int:
        return -(-self.outputs // TILE_COLUMNS)

    @property
    def by_outputs(self) -> bool:
        """Whether V is the smaller matrix and is made once, rather than U."""
        return self.count <= self.outputs and self.num_panels >= 4

    def tiles(self, *, stream: bool = False) -> Tiles:
        """Blocks that fit a core's cache."""
        block = {16: 56, 36: 28, 64: 14 if self.channels <= 128 else 28}.get(self.points, 28)
        block = max(1, min(block, self.count))
        here = self.count if self.by_outputs else block
        panels = 1 if self.by_outputs else min(self.num_panels, 4 if self.channels >= 128 else 2)
        v_row = -(-self.channels // LANES) * LANES + LANES
        return Tiles(
            rows=self.rows,
            cols=self.cols,
            total=self.count,
            block=block,
            panels=panels,
            v_row=v_row,
            v_plane=_odd_lines(here * v_row),
            u_plane=_odd_lines(self.channels * TILE_COLUMNS),
            m_plane=_odd_lines(here * panels * TILE_COLUMNS),
            stream=int(stream),
        )

    def forward_scratch(self, tiles: Tiles, threads: int) -> tuple[int, int, int, int, int]:
        """Numbers in U, V, M, patches and bias."""
        points, panels = self.points, self.num_panels
        u, v, m = points * tiles.u_plane, points * tiles.v_plane, points * tiles.m_plane
        patches = threads * patch_numbers(self.m, self.r)
        bias = panels * TILE_COLUMNS
        if self.by_outputs:
            return threads * u, v, threads * m, patches, bias
        return panels * u, threads * v, threads * m, patches, bias

    def weight_parts(self) -> tuple[Tiles, Parts]:
        """The division of the gradient of the weights."""
        block = max(1, min(56, self.count))
        channels, outputs = min(self.channels, 128), min(self.outputs, 128)
        blocks = -(-self.channels // channels) * -(-self.outputs // outputs)
        count = max(1, min(NUM_TASKS // blocks, -(-self.count // (4 * block))))
        per_part = -(-self.count // (count * block)) * block
        v_row = -(-channels // LANES) * LANES + LANES
        z_row = -(-outputs // TILE_COLUMNS) * TILE_COLUMNS + LANES
        tiles = Tiles(
            rows=self.rows, cols=self.cols, total=self.count, block=block, panels=1,
            v_row=v_row, v_plane=_odd_lines(block * v_row), u_plane=0, m_plane=0, stream=0,
        )  # fmt: skip
        parts = Parts(
            total=max(1, -(-self.count // per_part)),
            tiles=per_part,
            channels=channels,
            outputs=outputs,
            z_row=z_row,
            z_plane=_odd_lines(block * z_row),
            u_plane=_odd_lines(channels * -(-outputs // TILE_COLUMNS) * TILE_COLUMNS),
        )
        return tiles, parts

    def weight_scratch(self, tiles: Tiles, parts: Parts, threads: int) -> tuple[int, int, int, int, int]:
        """Numbers in V, Z, dU, patches and the parts' sums."""
        sums = parts.total * -(-self.outputs // LANES) * LANES * self.channels * self.r**2
        per_thread = (tiles.v_plane, parts.z_plane, parts.u_plane)
        v, z, u = (threads * self.points * plane for plane in per_thread)
        return v, z, u, threads * patch_numbers(self.m, self.r), sums


def _odd_lines(numbers: int) -> int:
    """At least so many numbers, as an odd number of cache lines: planes at this distance do not share sets."""
    return (-(-numbers // LANES) | 1) * LANES


def forward(
    x: Array, w: Array, bias: Array | None, y: Array, *, shape: ConvShape, m: int, threads: int, relu: bool = False
) -> None:
    """`y` = conv(x, w) + bias, max(·, 0) with `relu`, by F(m×m, r×r)."""
    for i, o in _groups(shape):
        _product(
            x[:, i], w[o], None if bias is None else bias[o], y[:, o], m=m, threads=threads, relu=relu,
            padding=(shape.padding[0], shape.padding[2]), turned=False,
        )  # fmt: skip


def backward_input(dy: Array, w: Array, dx: Array, *, shape: ConvShape, m: int, threads: int) -> None:
    """dx: the convolution of dy with the filter turned by 180°."""
    r = shape.kernel[0]
    padding = (r - 1 - shape.padding[0], r - 1 - shape.padding[2])
    for i, o in _groups(shape):
        _product(dy[:, o], w[o], None, dx[:, i], m=m, threads=threads, relu=False, padding=padding, turned=True)


def backward_weight(x: Array, dy: Array, dw: Array, *, shape: ConvShape, m: int, threads: int) -> None:
    """dw: the exact adjoint of `forward` in w."""
    if 0 in dy.shape:
        dw[...] = 0
        return
    for i, o in _groups(shape):
        _weight(x[:, i], dy[:, o], dw[o], m=m, threads=threads, padding=(shape.padding[0], shape.padding[2]))


def workspace_bytes(direction: Direction, *, shape: ConvShape, m: int, threads: int) -> int:
    """Bytes of scratch memory over all threads."""
    sizes = _sizes_of(direction, shape, m)
    if direction == "weight":
        return 4 * sum(sizes.weight_scratch(*sizes.weight_parts(), threads))
    return 4 * sum(sizes.forward_scratch(sizes.tiles(), threads))


def _sizes_of(direction: Direction, shape: ConvShape, m: int) -> _Sizes:
    r = shape.kernel[0]
    if direction == "input":
        return _Sizes(m, r, shape.batch, shape.group_out, shape.group_in, shape.height, shape.width)
    return _Sizes(m, r, shape.batch, shape.group_in, shape.group_out, shape.out_height, shape.out_width)


def _groups(shape: ConvShape) -> list[tuple[slice, slice]]:
    i, o = shape.group_in, shape.group_out
    return [(slice(g * i, (g + 1) * i), slice(g * o, (g + 1) * o)) for g in range(shape.groups)]


def _product(x: Array, w: Array, bias: Array | None, y: Array, *, m: int, threads: int, relu: bool,
             padding: tuple[int, int], turned: bool) -> None:  # fmt: skip
    if 0 in y.shape:
        return
    r = w.shape[2]
    sizes = _Sizes(m, r, x.shape[0], x.shape[1], *y.shape[1:])
    tiles = sizes.tiles(stream=_streams(y))
    u, v, products, patches, biases = scratch(*sizes.forward_scratch(tiles, threads))
    biases[:] = 0
    if bias is not None:
        biases[: bias.size] = bias
    compiled = kernels(m, r)
    arguments: list[Any] = [
        flat(x), _image(x, *padding), flat(w), _filter(w, turned=turned), flat(y), _image(y), sizes.channels,
        sizes.outputs, tiles, u,
    ]  # fmt: skip
    points, patch = sizes.points, patch_numbers(m, r)
    floor = np.float32(0 if relu else -np.inf)
    after = (products, points * tiles.m_plane, patches, patch, biases, floor, threads)
    if sizes.by_outputs:
        compiled.by_outputs(*arguments, points * tiles.u_plane, v, *after)
    else:
        compiled.by_tiles(*arguments, v, points * tiles.v_plane, *after)


def _weight(x: Array, dy: Array, dw: Array, *, m: int, threads: int, padding: tuple[int, int]) -> None:
    r = dw.shape[2]
    sizes = _Sizes(m, r, x.shape[0], x.shape[1], *dy.shape[1:])
    tiles, parts = sizes.weight_parts()
    v, z, u, patches, sums = scratch(*sizes.weight_scratch(tiles, parts, threads))
    points = sizes.points
    kernels(m, r).weight(
        flat(x), _image(x, *padding), flat(dy), _image(dy), flat(dw), _filter(dw), sizes.channels, sizes.outputs,
        tiles, parts, v, points * tiles.v_plane, z, points * parts.z_plane, u, points * parts.u_plane,
        patches, patch_numbers(m, r), sums, threads,
    )  # fmt: skip


def _image(array: Array, top: int = 0, left: int = 0) -> Image:
    n, c, h, w = (stride // 4 for stride in array.strides)
    return Image(n, c, h, w, array.shape[2], array.shape[3], top, left)


def _filter(w: Array, *, turned: bool = False) -> Filter:
    k, c, r, s = (stride // 4 for stride in w.strides)
    if turned:
        return Filter((w.shape[2] - 1) * r + (w.shape[3] - 1) * s, c, k, -r, -s)
    return Filter(0, k, c, r, s)


def _streams(y: Array) -> bool:
    strides = (y.strides[0], y.strides[2], y.strides[3], y.ctypes.data)
    return y.nbytes >= STREAM_BYTES and y.strides[1] == 4 and not any(stride % 64 for stride in strides)
