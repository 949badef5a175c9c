"""How a dense convolution in the Fourier domain is cut into blocks that fit the workspace.

Spectra of T tiles, C channels summed over (depth) and K channels that come out (lanes) take 8 · F · (T·C + T·K + C·K)
bytes with F = n²/2 + 2, often more than may be used.  So blocks of each are taken in three loops; what a block does
not share with the one before is computed again.  Sizes and order of the loops are chosen by a model of the time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from typing import Literal, NamedTuple

from windlass.kernels.cgemm import CTILE_ROWS
from windlass.kernels.fft_geometry import odd_lines
from windlass.kernels.fft_stages import Layout
from windlass.kernels.jit import LANES, TILE_COLUMNS
from windlass.plan.fourier import num_frequencies

Loop = Literal["tiles", "depths", "panels"]

LIMIT = 59 << 20
"""Bytes of spectra per thread, where the smallest blocks do not need more; with the rest it is 64 MiB."""

TRANSFORMED, MOVED, WAIT = 10e9, 20e9, 1e-4
"""Bytes of spectra that a core makes, and reads, per second; seconds until all threads are done."""

PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of blocks to choose from."""


class Sizes(NamedTuple):
    """A convolution's sizes in the Fourier domain; panels are TILE_COLUMNS lanes."""

    n: int
    tiles: int
    depths: int
    lanes: int
    panels: int


class Blocks(NamedTuple):
    """How many of each go through the stages at a time, and the outermost loop."""

    tiles: int
    depths: int
    panels: int
    outer: Loop


class Chunks(NamedTuple):
    """How many products are summed before the sum is added to those before it, by depth and by tiles."""

    depths: int
    tiles: int


def chunks(n: int) -> Chunks:
    """Long sums are taken in pieces, for the error of short ones; blocks are whole numbers of pieces."""
    return Chunks(64, 48) if n >= 64 else Chunks(128, 96)


def sizes_of(n: int, tiles: int, depths: int, lanes: int) -> Sizes:
    """Sizes with their panels."""
    return Sizes(n, tiles, depths, lanes, -(-lanes // TILE_COLUMNS))


def layouts(n: int, blocks: Blocks) -> tuple[Layout, Layout, Layout]:
    """X, M and U."""
    depths = -(-blocks.depths // LANES) * LANES
    lanes = blocks.panels * TILE_COLUMNS
    x = Layout(2 * depths, depths, odd_lines(blocks.tiles * 2 * depths), 0)
    m = Layout(2 * lanes, lanes, odd_lines(blocks.tiles * 2 * lanes), 0)
    u_plane = odd_lines(2 * TILE_COLUMNS * blocks.depths)
    return x, m, Layout(2 * TILE_COLUMNS, TILE_COLUMNS, u_plane, num_frequencies(n) * u_plane)


def floats(sizes: Sizes, blocks: Blocks) -> tuple[int, int, int]:
    """Numbers in X, M and U."""
    x, m, u = layouts(sizes.n, blocks)
    num = num_frequencies(sizes.n)
    return num * x.plane, num * m.plane, u.panel * blocks.panels


def kept_layout(n: int, depths: int) -> Layout:
    """All spectra of the weights, as the forward pass keeps them: U with whole blocks of lanes in its depth."""
    return layouts(n, Blocks(1, -(-depths // LANES) * LANES, 1, "panels"))[2]


@cache
def blocks_of(sizes: Sizes, *, weight: bool, threads: int, kept: bool = False) -> Blocks:
    """The blocks that move and compute the least.

    Args:
        sizes: the convolution.
        weight: whether it is the gradient of the weights.
        threads: how many work.
        kept: whether the weights' spectra stand elsewhere, in whole; then scratch is no more than otherwise.
    """

    def scratch(blocks: Blocks) -> int:
        x, m, u = floats(sizes, blocks)
        return x + m + (0 if kept else u)

    every = list(_candidates(sizes, weight))
    limit = LIMIT * threads // 4
    if kept:
        limit = sum(floats(sizes, blocks_of(sizes, weight=weight, threads=threads)))
    fitting = [blocks for blocks in every if scratch(blocks) <= limit]
    return min(fitting or [min(every, key=scratch)], key=lambda blocks: _seconds(sizes, blocks, weight, kept))


def _candidates(sizes: Sizes, weight: bool) -> Iterator[Blocks]:
    """Blocks of sums are whole numbers of chunks, so that bits do not depend on them."""

    def parts(size: int, unit: int) -> set[int]:
        return {min(size, -(-size // (part * unit)) * unit) for part in PARTS}

    pieces = chunks(sizes.n)
    tiles = parts(sizes.tiles, pieces.tiles if weight else CTILE_ROWS)
    depths = parts(sizes.depths, LANES if weight else pieces.depths)
    outers: tuple[Loop, Loop] = ("panels", "depths") if weight else ("tiles", "panels")
    for sides in itertools.product(tiles, depths, parts(sizes.panels, 1), outers):
        yield Blocks(*sides)


def _loops(blocks: Blocks, weight: bool) -> list[Loop]:
    """The loops from the outermost to the innermost; what is summed over comes last."""
    names: list[Loop] = ["panels", "depths", "tiles"] if weight else ["tiles", "panels", "depths"]
    names.remove(blocks.outer)
    return [blocks.outer, *names]


def steps(sizes: Sizes, blocks: Blocks, *, weight: bool) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every block in its order: first and number of tiles, of depths and of panels."""
    names = _loops(blocks, weight)
    spans = []
    for name in names:
        size, step = getattr(sizes, name), getattr(blocks, name)
        spans.append([(first, min(step, size - first)) for first in range(0, size, step)])
    for block in itertools.product(*spans):
        yield tuple(block[names.index(name)] for name in ("tiles", "depths", "panels"))


def _seconds(sizes: Sizes, blocks: Blocks, weight: bool, kept: bool) -> float:
    """The model: spectra are made as often as a loop on which they depend goes on, and read in every step."""
    names = _loops(blocks, weight)
    counts = [-(-getattr(sizes, name) // getattr(blocks, name)) for name in names]

    def times(*needed: Loop) -> int:
        deepest = max((i for i, name in enumerate(names) if name in needed and counts[i] > 1), default=-1)
        return math.prod(counts[: deepest + 1])

    x, m, u = floats(sizes, blocks)
    made = times("tiles", "depths") * x + times("tiles", "panels") * m
    made += 0 if kept else times("depths", "panels") * u
    num_steps = math.prod(counts)
    seconds = 4 * made / TRANSFORMED + 4 * num_steps * (x + m + u) / MOVED + 3 * num_steps * WAIT
    return float(seconds)
