"""Flows and bytes on the links of a torus, compiled: a message takes a run of links in each dimension.

A run is added at its two ends, and sums along the line give every link's share: the cost does not grow with the
length of the way.  The busiest link of a run is the larger of two entries of a table of maxima over 1, 2, 4, ...
links.  Rows of all tables are dimension times two plus direction; columns are the ranks that links leave from.
With a `period` below `size`, columns are those of the first period: the links along dimension 0 that leave from
ranks a period apart are all alike, and share one entry.

int64 arrays and numbers throughout.
"""

from __future__ import annotations

import numpy as np

from windlass.simulation.compiled import compiled
from windlass.simulation.rounds import Ints


@compiled
def _run(at: int, dst: int, stride: int, side: int) -> tuple[int, int, int, int]:
    """The run along a dimension: its first place in rising order, length, direction, and the rank of place 0."""
    place = at // stride % side
    ahead = (dst // stride - at // stride) % side
    base = at - place * stride
    if 2 * ahead <= side:
        return place, ahead, 0, base
    return (place - (side - ahead) + 1) % side, side - ahead, 1, base


@compiled
def _add(row: Ints, base: int, first: int, length: int, stride: int, side: int, amount: int) -> None:
    """Adds an amount from the first place of a run on, and takes it away behind its last."""
    end = first + length
    row[base + first * stride] += amount
    if end < side:
        row[base + end * stride] -= amount
    elif end > side:
        row[base] += amount
        row[base + (end - side) * stride] -= amount


@compiled
def _sum_lines(row: Ints, stride: int, side: int) -> None:
    for rank in range(len(row)):
        if rank // stride % side:
            row[rank] += row[rank - stride]


@compiled
def add_message(
    src: int, dst: int, sides: Ints, size: int, period: int, amount: int, longest: Ints, turn: int, table: Ints
) -> None:
    """Adds a message to all its runs.

    ``turn`` 0: at once.  For several messages to one receiver, which run into each other: 1 keeps the longest of
    each line in `longest`, 2 adds it once.
    """
    at, stride = src, size
    for dimension in range(len(sides)):
        side = sides[dimension]
        stride //= side
        first, length, way, base = _run(at, dst, stride, side)
        row = 2 * dimension + way
        at = base + dst // stride % side * stride
        if length == 0:
            continue
        if turn == 1:
            longest[row, base] = max(longest[row, base], length)
            continue
        if turn == 2:
            if length != longest[row, base]:
                continue
            longest[row, base] = 0
        if period < size and dimension == 0:
            table[row, base % period] += amount * length
        else:
            _add(table[row], base % period, first, length, stride, side, amount)


@compiled
def finish(sides: Ints, size: int, period: int, table: Ints) -> None:
    """From what was added at the ends of runs to what every link has."""
    stride = size
    for dimension in range(len(sides)):
        stride //= sides[dimension]
        if period == size or dimension:
            _sum_lines(table[2 * dimension], stride, sides[dimension])
            _sum_lines(table[2 * dimension + 1], stride, sides[dimension])


@compiled
def _maxima(levels: Ints, stride: int, side: int) -> None:
    """``levels[j + 1]`` from ``levels[j]``: maxima over twice as many links, around."""
    for j in range(len(levels) - 1):
        for rank in range(levels.shape[1]):
            place = rank // stride % side
            levels[j + 1, rank] = max(levels[j, rank], levels[j, rank + ((place + (1 << j)) % side - place) * stride])


@compiled
def _busiest(src: int, dst: int, sides: Ints, size: int, period: int, levels: Ints) -> int:
    """The most that a link on the way has."""
    most, at, stride = 0, src, size
    for dimension in range(len(sides)):
        side = sides[dimension]
        stride //= side
        first, length, way, base = _run(at, dst, stride, side)
        row = 2 * dimension + way
        at = base + dst // stride % side * stride
        if length == 0:
            continue
        start = base % period
        if period < size and dimension == 0:
            most = max(most, levels[row, 0, start])
            continue
        j = 0
        while 2 << j <= length:
            j += 1
        last = (first + length - (1 << j)) % side
        most = max(most, levels[row, j, start + first * stride], levels[row, j, start + last * stride])
    return most


@compiled
def torus_loads(
    src: Ints, dst: Ints, starts: Ints, sides: Ints, size: int, period: int, longest: Ints, levels: Ints, loads: Ints
) -> None:
    """How many flows share the busiest link of each message.

    Messages of ``starts[k]`` to ``starts[k+1]`` are on their way at the same time, sorted by receiver; those to one
    receiver count once on a link, unless `period` is below `size`.  `longest` (zeros) is rows by columns, `levels`
    rows by sizes of runs by columns.
    """
    for k in range(len(starts) - 1):
        if starts[k + 1] == starts[k] + 1 and period == size:
            loads[starts[k]] = 1
            continue
        levels[:, 0, :] = 0
        i = starts[k]
        while i < starts[k + 1]:
            end = i + 1
            while period == size and end < starts[k + 1] and dst[end] == dst[i]:
                end += 1
            if end == i + 1:
                add_message(src[i], dst[i], sides, size, period, 1, longest, 0, levels[:, 0, :])
            else:
                for turn in range(1, 3):
                    for each in range(i, end):
                        add_message(src[each], dst[each], sides, size, period, 1, longest, turn, levels[:, 0, :])
            i = end
        finish(sides, size, period, levels[:, 0, :])
        stride = size
        for dimension in range(len(sides)):
            stride //= sides[dimension]
            if period == size or dimension:
                _maxima(levels[2 * dimension], stride, sides[dimension])
                _maxima(levels[2 * dimension + 1], stride, sides[dimension])
        for each in range(starts[k], starts[k + 1]):
            loads[each] = _busiest(src[each], dst[each], sides, size, period, levels)


@compiled
def torus_bytes(
    src: Ints, dst: Ints, num_bytes: Ints, sides: Ints, size: int, period: int, longest: Ints, table: Ints
) -> None:
    """Adds the bytes of messages at the ends of their runs; `finish` sums them."""
    for i in range(len(src)):
        add_message(src[i], dst[i], sides, size, period, num_bytes[i], longest, 0, table)


def num_levels(sides: Ints) -> int:
    """How many sizes of runs there are: a way is never longer than half around."""
    return max(1, int(np.max(sides, initial=1)) // 2).bit_length()
