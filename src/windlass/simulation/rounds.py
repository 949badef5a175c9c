"""A schedule as rounds: the messages of all ranks that belong together, as arrays.

In a round a rank runs one step of its program, or none; a message lies in one round for its sender and its receiver.
A `Round` lists messages; a `Ring` is many rounds of one pattern; an `Exchange` is one round in which everybody
sends to everybody.  `program_rounds` finds the rounds of any schedule from its programs; `patterns` has the rounds
of the usual ones at once for thousands of ranks.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from windlass.errors import ConfigError
from windlass.plan.collective import Receive, Schedule, Send

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Messages, one element of each array for each.

    Attributes:
        src, dst: ranks.
        num_bytes: sizes.
        adds: whether the receiver adds it.
        order: its place among its sender's messages of the round, from 0.
        fan_out, fan_in: whether a rank may send, or receive, more than one.
    """

    src: Ints
    dst: Ints
    num_bytes: Ints
    adds: NDArray[np.bool_]
    order: Ints
    fan_out: bool
    fan_in: bool


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """Each rank sends to the next of its group, for one step less than a group has members.

    Attributes:
        groups: ranks, a group in each row.
        sizes: bytes of the chunks, a group's in each row.
        shift: in step s the member at place i sends the group's chunk i - s - shift.
        adds: whether receivers add.
    """

    groups: Ints
    sizes: Ints
    shift: int
    adds: bool

    @property
    def num_messages(self) -> int:
        """How many messages."""
        return int(self.groups.size * (self.groups.shape[1] - 1))

    @property
    def num_steps(self) -> int:
        """Steps of each rank."""
        return int(self.groups.shape[1] - 1)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Each rank sends to all of its group in one step, to the next one first.

    Attributes:
        groups: ranks, a group in each row.
        sizes: bytes of each member's chunk.
        adds: the receiver's chunk is sent, and added; otherwise the sender's, and stored.
    """

    groups: Ints
    sizes: Ints
    adds: bool

    @property
    def num_messages(self) -> int:
        """How many messages."""
        return int(self.groups.size * (self.groups.shape[1] - 1))

    @property
    def num_steps(self) -> int:
        """Steps of each rank."""
        return 1


Stage = Round | Ring | Exchange


def make_round(
    src: Any, dst: Any, num_bytes: Any, *, adds: Any, order: Any = 0, fan_out: bool = False, fan_in: bool = False
) -> Round:
    """A round from arrays or numbers."""
    length = np.broadcast_shapes(*(np.shape(each) for each in (src, dst, num_bytes, order)))
    source, target, sizes, places = (
        np.array(np.broadcast_to(each, length), np.int64) for each in (src, dst, num_bytes, order)
    )
    added = np.array(np.broadcast_to(adds, length), np.bool_)
    return Round(source, target, sizes, added, places, fan_out, fan_in)


def exchange_round(exchange: Exchange) -> Round:
    """The messages of an exchange, one by one."""
    num_groups, width = exchange.groups.shape
    place, distance = np.arange(width)[:, None], np.arange(1, width)[None, :]
    to = (place + distance) % width
    src = np.broadcast_to(exchange.groups[:, :, None], (num_groups, width, width - 1))
    chunk = to if exchange.adds else np.broadcast_to(place, to.shape)
    order = np.broadcast_to(distance - 1, src.shape)
    return make_round(
        src.ravel(), exchange.groups[:, to].ravel(), exchange.sizes[:, chunk].ravel(), adds=exchange.adds,
        order=order.ravel(), fan_out=width > 2, fan_in=width > 2,
    )  # fmt: skip


def ring_rounds(ring: Ring) -> Iterator[Round]:
    """The rounds of a ring, one by one."""
    width = ring.groups.shape[1]
    place = np.arange(width)
    for step in range(width - 1):
        sizes = ring.sizes[:, (place - step - ring.shift) % width]
        yield make_round(ring.groups.ravel(), np.roll(ring.groups, -1, axis=1).ravel(), sizes.ravel(), adds=ring.adds)


def program_rounds(schedule: Schedule, num_bytes: int) -> Iterator[Round]:
    """The rounds of any schedule: steps that exchange messages share one, and it comes after those of earlier steps.

    Raises:
        ConfigError: there are no such rounds.
    """
    sizes = np.diff(np.asarray(schedule.bounds(num_bytes), np.int64))
    programs = [schedule.steps(rank) for rank in range(schedule.size)]
    first = np.cumsum([0, *(len(program) for program in programs)])
    partners = _partners(programs, first)
    rounds = _levels(partners, first, schedule)
    messages: dict[int, list[tuple[int, int, int, bool, int]]] = defaultdict(list)
    receives = _receives(programs)
    for rank, program in enumerate(programs):
        for index, step in enumerate(program):
            sends = [message for message in step if isinstance(message, Send)]
            for order, send in enumerate(sends):
                received = receives[rank, send.to].popleft()
                size = int(sizes[np.asarray(send.chunks, np.int64)].sum())
                row = (rank, send.to, size, received.op != "copy", order)
                messages[rounds[first[rank] + index]].append(row)
    for number in sorted(messages):
        src, dst, length, adds, places = zip(*messages[number], strict=True)
        yield make_round(src, dst, length, adds=adds, order=places, fan_out=True, fan_in=True)


def _receives(programs: list[Any]) -> dict[tuple[int, int], deque[Receive]]:
    """The receives of each pair of ranks, in order."""
    found: dict[tuple[int, int], deque[Receive]] = defaultdict(deque)
    for rank, program in enumerate(programs):
        for step in program:
            for message in step:
                if isinstance(message, Receive):
                    found[message.source, rank].append(message)
    return found


def _partners(programs: list[Any], first: Ints) -> Ints:
    """For each step of each rank a number that it shares with the steps it exchanges messages with."""
    head = np.arange(first[-1])

    def find(node: int) -> int:
        while head[node] != node:
            head[node] = head[head[node]]
            node = int(head[node])
        return node

    waiting: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    steps = [(rank, index, step) for rank, program in enumerate(programs) for index, step in enumerate(program)]
    for rank, index, step in steps:
        for message in step:
            if isinstance(message, Send):
                waiting[rank, message.to].append(int(first[rank]) + index)
    for rank, index, step in steps:
        for message in step:
            if isinstance(message, Receive):
                head[find(waiting[message.source, rank].popleft())] = find(int(first[rank]) + index)
    return np.asarray([find(node) for node in range(len(head))], np.int64)


def _levels(partners: Ints, first: Ints, schedule: Schedule) -> list[int]:
    """The round of each step: after the rounds of all earlier steps of all ranks in it."""
    after: dict[int, set[int]] = defaultdict(set)
    for start, stop in pairwise(first.tolist()):
        for step in range(start + 1, stop):
            after[int(partners[step - 1])].add(int(partners[step]))
    waits: dict[int, int] = defaultdict(int)
    for followers in after.values():
        for each in followers:
            waits[each] += 1
    level = dict.fromkeys(map(int, partners), 0)
    ready = [node for node in level if not waits[node]]
    done = 0
    while ready:
        node, done = ready.pop(), done + 1
        for each in after[node]:
            level[each] = max(level[each], level[node] + 1)
            waits[each] -= 1
            if not waits[each]:
                ready.append(each)
    if done < len(level):
        raise ConfigError(f"{schedule.collective} {schedule.algorithm}: its steps do not fall into rounds")
    return [level[int(node)] for node in partners]
