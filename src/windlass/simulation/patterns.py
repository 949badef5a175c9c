"""The rounds of the usual schedules for all ranks at once: `plan.collective` in arrays.

Each function takes a setting and the bounds of the chunks, and yields the stages.  The programs are the definition;
tests hold these rounds against theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from windlass.plan.collective import SCHEDULES, Schedule, Setting
from windlass.simulation.rounds import Exchange, Ints, Ring, Round, Stage, make_round, program_rounds

Stages = Iterator[Stage]
Pattern = Callable[[Setting, Ints], Stages]


def stages_of(schedule: Schedule, num_bytes: int) -> Stages:
    """A schedule's stages for a buffer of so many bytes; of an all-to-all, what one rank sends in all."""
    if schedule.size == 1:
        return iter(())
    if schedule.collective == "alltoall":
        num_bytes *= schedule.size
    pattern = PATTERNS.get((schedule.collective, schedule.algorithm))
    if pattern is None:
        return program_rounds(schedule, num_bytes)
    return pattern(schedule.setting, _bounds(num_bytes, schedule.num_chunks))


def _bounds(num_bytes: int, parts: int) -> Ints:
    part, more = divmod(num_bytes, parts)
    places = np.arange(parts + 1, dtype=np.int64)
    return places * part + np.minimum(places, more)


# --- flat ---------------------------------------------------------------------------------------------------


def _everybody(setting: Setting) -> Ints:
    return np.arange(setting.size, dtype=np.int64)[None, :]


def _ring_reduce_scatter(setting: Setting, bounds: Ints) -> Stages:
    yield Ring(_everybody(setting), np.diff(bounds)[None, :], 1, True)


def _ring_allgather(setting: Setting, bounds: Ints) -> Stages:
    yield Ring(_everybody(setting), np.diff(bounds)[None, :], 0, False)


def _direct_reduce_scatter(setting: Setting, bounds: Ints) -> Stages:
    yield Exchange(_everybody(setting), np.diff(bounds)[None, :], True)


def _direct_allgather(setting: Setting, bounds: Ints) -> Stages:
    yield Exchange(_everybody(setting), np.diff(bounds)[None, :], False)


def _naive(setting: Setting, bounds: Ints) -> Stages:
    others = np.arange(1, setting.size)
    yield make_round(others, 0, bounds[-1], adds=True, fan_in=True)
    yield make_round(0, others, bounds[-1], adds=False, order=others - 1, fan_out=True)


def _bruck_allgather(setting: Setting, bounds: Ints) -> Stages:
    ranks, size = np.arange(setting.size), setting.size
    around = np.concatenate([bounds, bounds[1:] + bounds[-1]])
    for distance in _powers(size):
        count = min(distance, size - distance)
        yield make_round(ranks, (ranks - distance) % size, around[ranks + count] - around[ranks], adds=False)


def _pairwise(setting: Setting, bounds: Ints) -> Stages:
    ranks, size = np.arange(setting.size), setting.size
    for distance in range(1, size):
        to = (ranks + distance) % size
        block = ranks * size + to
        yield make_round(ranks, to, bounds[block + 1] - bounds[block], adds=False)


def _bruck_alltoall(setting: Setting, bounds: Ints) -> Stages:
    ranks, size = np.arange(setting.size), setting.size
    sizes = np.diff(bounds)
    for distance in _powers(size):
        ways = np.arange(size)[(np.arange(size) & distance) > 0]
        source = (ranks[:, None] - (ways & (distance - 1))) % size
        num_bytes = sizes[source * size + (source + ways) % size].sum(axis=1)
        yield make_round(ranks, (ranks + distance) % size, num_bytes, adds=False)


# --- recursive doubling and halving -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Core:
    """The ranks of the largest power of two; each odd one of the first serves its left, as in `plan.collective`."""

    size: int

    @property
    def power(self) -> int:
        return 1 << (self.size.bit_length() - 1)

    @property
    def rest(self) -> int:
        return self.size - self.power

    @property
    def ranks(self) -> Ints:
        """The rank of each member."""
        numbers = np.arange(self.power)
        return np.where(numbers < self.rest, 2 * numbers + 1, numbers + self.rest)

    @property
    def aside(self) -> Ints:
        """The ranks that others serve."""
        return 2 * np.arange(self.rest)

    def chunk(self, number: Ints) -> Ints:
        """The first chunk of a member, where every rank has one."""
        return number + np.minimum(number, self.rest)

    def fold_in(self, num_bytes: int | Ints, adds: bool) -> Stages:
        """What stands aside hands in what it has."""
        if self.rest:
            yield make_round(self.aside, self.aside + 1, num_bytes, adds=adds)

    def hand_out(self, num_bytes: int | Ints) -> Stages:
        """What stands aside gets the result."""
        if self.rest:
            yield make_round(self.aside + 1, self.aside, num_bytes, adds=False)

    def halving(self, bounds: Ints) -> Stages:
        """Halves are exchanged; `bounds` are those of the members' chunks."""
        numbers, ranks = np.arange(self.power), self.ranks
        for distance in reversed(_powers(self.power)):
            low = (numbers ^ distance) & -distance
            yield make_round(ranks, ranks[numbers ^ distance], bounds[low + distance] - bounds[low], adds=True)

    def doubling(self, bounds: Ints) -> Stages:
        """All that is known is exchanged."""
        numbers, ranks = np.arange(self.power), self.ranks
        for distance in _powers(self.power):
            low = numbers & -distance
            yield make_round(ranks, ranks[numbers ^ distance], bounds[low + distance] - bounds[low], adds=False)


def _recursive_doubling(setting: Setting, bounds: Ints) -> Stages:
    core, everything = _Core(setting.size), int(bounds[-1])
    numbers, ranks = np.arange(core.power), core.ranks
    yield from core.fold_in(everything, True)
    for distance in _powers(core.power):
        yield make_round(ranks, ranks[numbers ^ distance], everything, adds=True)
    yield from core.hand_out(everything)


def _rabenseifner(setting: Setting, bounds: Ints) -> Stages:
    core, everything = _Core(setting.size), int(bounds[-1])
    yield from core.fold_in(everything, True)
    yield from core.halving(bounds)
    yield from core.doubling(bounds)
    yield from core.hand_out(everything)


def _recursive_halving(setting: Setting, bounds: Ints) -> Stages:
    core = _Core(setting.size)
    yield from core.fold_in(int(bounds[-1]), True)
    yield from core.halving(bounds[core.chunk(np.arange(core.power + 1))])
    yield from core.hand_out(np.diff(bounds)[core.aside])


def _doubling_allgather(setting: Setting, bounds: Ints) -> Stages:
    core, own = _Core(setting.size), np.diff(bounds)
    yield from core.fold_in(own[core.aside], False)
    yield from core.doubling(bounds[core.chunk(np.arange(core.power + 1))])
    yield from core.hand_out(bounds[-1] - own[core.aside])


# --- trees --------------------------------------------------------------------------------------------------


def _binomial_reduce(setting: Setting, bounds: Ints) -> Stages:
    for distance in _powers(setting.size):
        src = np.arange(distance, setting.size, 2 * distance) + setting.root
        yield make_round(src % setting.size, (src - distance) % setting.size, bounds[-1], adds=True)


def _binomial_broadcast(setting: Setting, bounds: Ints) -> Stages:
    for distance in reversed(_powers(setting.size)):
        dst = np.arange(distance, setting.size, 2 * distance) + setting.root
        yield make_round((dst - distance) % setting.size, dst % setting.size, bounds[-1], adds=False)


def _binomial_allreduce(setting: Setting, bounds: Ints) -> Stages:
    yield from _binomial_reduce(Setting(setting.size), bounds)
    yield from _binomial_broadcast(Setting(setting.size), bounds)


def _scatter_allgather(setting: Setting, bounds: Ints) -> Stages:
    size, places = setting.size, np.arange(setting.size)
    ranks = (places + setting.root) % size
    for distance in reversed(_powers(size)):
        start = np.arange(distance, size, 2 * distance)
        stop = np.minimum(start + distance, size)
        yield make_round(ranks[start - distance], ranks[start], bounds[stop] - bounds[start], adds=False)
    lowest = np.where(places > 0, places & -places, size)
    for step in range(size - 1):
        sent, to = (places - step) % size, (places + 1) % size
        missing = (sent < to) | (sent >= to + lowest[to])  # the others were dealt out to it
        if missing.any():
            src, chunk = places[missing], sent[missing]
            yield make_round(ranks[src], ranks[to[missing]], np.diff(bounds)[chunk], adds=False)


def _pipelined_tree(setting: Setting, bounds: Ints) -> Stages:
    sizes, pieces, deepest = np.diff(bounds), setting.pieces, setting.size.bit_length() - 1
    child = np.arange(1, setting.size)
    parent, depth = (child - 1) // 2, np.frexp((child + 1).astype(np.float64))[1] - 1
    for time in range(2 * deepest + pieces):
        up, down = time - (deepest - depth), time - (deepest + depth - 1)
        rises, falls = (up >= 0) & (up < pieces), (down >= 0) & (down < pieces)
        src, dst = np.concatenate([child[rises], parent[falls]]), np.concatenate([parent[rises], child[falls]])
        chunk, is_up = np.concatenate([up[rises], down[falls]]), np.arange(len(src)) < rises.sum()
        order = np.where(is_up, 2, (dst - 1) % 2)  # to the left child, to the right child, to the parent
        if len(src):
            yield make_round(src, dst, sizes[chunk], adds=is_up, order=order, fan_out=True, fan_in=True)


# --- within hosts, then between them ------------------------------------------------------------------------


def _hierarchical(setting: Setting, bounds: Ints) -> Stages:
    hosts = setting.all_hosts
    if len({len(host) for host in hosts}) > 1:
        yield from _by_leaders(setting, bounds)
        return
    table = np.asarray(hosts, np.int64)
    num_hosts, width = table.shape
    per_slice = SCHEDULES["allreduce"][setting.inner].num_chunks(num_hosts, setting.pieces)
    slices = np.broadcast_to(np.diff(bounds[::per_slice])[None, :], table.shape)
    if width > 1:
        yield Exchange(table, slices, True)
    if num_hosts > 1:
        parts = [bounds[i * per_slice : (i + 1) * per_slice + 1] for i in range(width)]
        yield from _between(setting, table, [part - part[0] for part in parts])
    if width > 1:
        yield Exchange(table, slices, False)


def _by_leaders(setting: Setting, bounds: Ints) -> Stages:
    hosts = setting.all_hosts
    leader = np.asarray([host[0] for host in hosts for _ in host[1:]], np.int64)
    other = np.asarray([rank for host in hosts for rank in host[1:]], np.int64)
    order = np.asarray([place for host in hosts for place in range(len(host) - 1)], np.int64)
    yield make_round(other, leader, bounds[-1], adds=True, fan_in=True)
    yield from _between(setting, np.asarray([[host[0]] for host in hosts], np.int64), [bounds])
    yield make_round(leader, other, bounds[-1], adds=False, order=order, fan_out=True)


def _between(setting: Setting, table: Ints, bounds: list[Ints]) -> Stages:
    """The inner schedule in every column of `table` at the same time."""
    inner = Setting(len(table), pieces=setting.pieces)
    pattern = PATTERNS["allreduce", setting.inner]
    columns = [pattern(inner, part) for part in bounds]
    for stages in zip(*columns, strict=True):
        yield _side_by_side(list(stages), table)


def _side_by_side(stages: list[Stage], table: Ints) -> Stage:
    """The stages of the columns of `table`, whose ranks are rows of it, as one."""
    first = stages[0]
    if isinstance(first, Round):
        rounds = [stage for stage in stages if isinstance(stage, Round)]
        columns = range(table.shape[1])
        return make_round(
            np.concatenate([table[each.src, i] for i, each in zip(columns, rounds, strict=True)]),
            np.concatenate([table[each.dst, i] for i, each in zip(columns, rounds, strict=True)]),
            np.concatenate([each.num_bytes for each in rounds]),
            adds=np.concatenate([each.adds for each in rounds]),
            order=np.concatenate([each.order for each in rounds]),
            fan_out=first.fan_out, fan_in=first.fan_in,
        )  # fmt: skip
    sizes = np.concatenate([stage.sizes for stage in stages if not isinstance(stage, Round)])
    groups = np.ascontiguousarray(table.T)
    if isinstance(first, Ring):
        return Ring(groups, sizes, first.shift, first.adds)
    return Exchange(groups, sizes, first.adds)


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`."""
    return [1 << i for i in range((limit - 1).bit_length())]


PATTERNS: dict[tuple[str, str], Pattern] = {
    ("allreduce", "naive"): _naive,
    ("allreduce", "direct"): lambda setting, bounds: _both(_direct_reduce_scatter, _direct_allgather, setting, bounds),
    ("allreduce", "ring"): lambda setting, bounds: _both(_ring_reduce_scatter, _ring_allgather, setting, bounds),
    ("allreduce", "recursive-doubling"): _recursive_doubling,
    ("allreduce", "rabenseifner"): _rabenseifner,
    ("allreduce", "binomial"): _binomial_allreduce,
    ("allreduce", "pipelined-tree"): _pipelined_tree,
    ("allreduce", "hierarchical"): _hierarchical,
    ("reduce_scatter", "direct"): _direct_reduce_scatter,
    ("reduce_scatter", "ring"): _ring_reduce_scatter,
    ("reduce_scatter", "recursive-halving"): _recursive_halving,
    ("allgather", "direct"): _direct_allgather,
    ("allgather", "ring"): _ring_allgather,
    ("allgather", "recursive-doubling"): _doubling_allgather,
    ("allgather", "bruck"): _bruck_allgather,
    ("broadcast", "binomial"): _binomial_broadcast,
    ("broadcast", "scatter-allgather"): _scatter_allgather,
    ("reduce", "binomial"): _binomial_reduce,
    ("alltoall", "pairwise"): _pairwise,
    ("alltoall", "bruck"): _bruck_alltoall,
}
"""Rounds in arrays; of schedules not in here they are found from the programs."""


def _both(first: Pattern, second: Pattern, setting: Setting, bounds: Ints) -> Stages:
    yield from first(setting, bounds)
    yield from second(setting, bounds)
