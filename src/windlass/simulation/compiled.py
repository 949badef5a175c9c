"""Compiled loops of max-plus, and of shared links of a tree.  Arrays of int64 and numbers only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np

from windlass.simulation.rounds import Ints

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """The function as machine code, kept on disk."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@compiled
def send_all(begin: Ints, end: Ints, src: Ints, hold: Ints, left: Ints, listed: Ints) -> None:
    """When each message has left: those of a rank one after the other, in the order of `listed`; `end` rises."""
    previous, free = -1, 0
    for k in range(len(listed)):
        i = listed[k]
        if src[i] != previous:
            previous = src[i]
            free = begin[previous]
        free += hold[i]
        left[i] = free
        if free > end[previous]:
            end[previous] = free


@compiled
def receive_all(
    begin: Ints, end: Ints, port: Ints, dst: Ints, hold: Ints, ready: Ints, gamma: Ints, overhead: Ints, listed: Ints
) -> None:
    """When each rank has received all, in the order of `listed`; `port` and `end` rise."""
    for k in range(len(listed)):
        i = listed[k]
        rank = dst[i]
        done = max(port[rank] + hold[i], ready[i], begin[rank] + overhead[i]) + gamma[i]
        port[rank] = done
        if done > end[rank]:
            end[rank] = done


@compiled
def run_ring(
    begin: Ints, port: Ints, groups: Ints, longer: Ints, shift: int, num_steps: int,
    hold: Ints, alpha: Ints, gamma: Ints, overhead: Ints,
) -> None:  # fmt: skip
    """So many steps of a ring.

    ``longer[g, c]`` is 1 for the longer chunks; ``hold[k, g, i]``, `alpha` and `gamma` are those of the message
    from member i of group g with a chunk of kind k; `begin` and `port` by rank are changed.
    """
    num_groups, width = groups.shape
    for g in range(num_groups):
        now, after, free = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int64)
        for i in range(width):
            now[i] = begin[groups[g, i]]
            free[i] = port[groups[g, i]]
        for step in range(num_steps):
            chunk = (width - 1 - step - shift) % width  # that of the last member
            source = width - 1
            first_kind = longer[g, chunk]
            left = now[source] + hold[first_kind, g, source]
            last_left = left
            for i in range(width):
                # the message from `source` to i; then i is the source of the next
                kind = longer[g, chunk]
                length = hold[kind, g, source]
                done = max(free[i] + length, left + alpha[kind, g, source], now[i] + overhead[g, source])
                done += gamma[kind, g, source]
                free[i] = done
                source = i
                chunk = chunk + 1 if chunk + 1 < width else 0
                left = now[i] + hold[longer[g, chunk], g, i] if i < width - 1 else last_left
                after[i] = max(left, done)
            now, after = after, now
        for i in range(width):
            begin[groups[g, i]] = now[i]
            port[groups[g, i]] = free[i]


@compiled
def tree_links(src: int, dst: int, shape: Ints, size: int, period: int, links: Ints) -> int:
    """Writes the links between two ranks of a tree, `shape` being ranks below a cable by level; how many they are."""
    count, start = 0, 0
    for level in range(len(shape)):
        ranks = shape[level]
        number = size // ranks
        if src // ranks != dst // ranks:
            links[count] = start + src // ranks % (period // ranks)
            links[count + 1] = start + number + dst // ranks % (period // ranks)
            count += 2
        start += 2 * number
    return count


@compiled
def tree_loads(
    src: Ints, dst: Ints, starts: Ints, shape: Ints, size: int, period: int, weight: Ints,
    links: Ints, count: Ints, seen: Ints, loads: Ints,
) -> None:  # fmt: skip
    """How loaded the busiest link of each message is: flows at the same time times the link's weight.

    Messages of ``starts[k]`` to ``starts[k+1]`` are on their way at the same time, sorted by receiver.  Those to one
    receiver count as one flow, for it takes them one after the other; with a `period` below `size` every message is
    its own.  `count` (zeros) and `seen` (-1) are by link.
    """
    for k in range(len(starts) - 1):
        for turn in range(3):
            for i in range(starts[k], starts[k + 1]):
                for j in range(tree_links(src[i], dst[i], shape, size, period, links)):
                    link = links[j]
                    if turn == 0:
                        if period < size or seen[link] != dst[i]:
                            count[link] += 1
                            seen[link] = dst[i]
                    elif turn == 1:
                        loads[i] = max(loads[i], count[link] * weight[link])
                    else:
                        count[link] = 0
                        seen[link] = -1


@compiled
def tree_bytes(
    src: Ints, dst: Ints, num_bytes: Ints, shape: Ints, size: int, period: int, links: Ints, total: Ints
) -> None:
    """Adds the bytes of messages to the links that they take."""
    for i in range(len(src)):
        for j in range(tree_links(src[i], dst[i], shape, size, period, links)):
            total[links[j]] += num_bytes[i]
