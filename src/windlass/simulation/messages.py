"""What each message of a round costs: by size, by class of pair, and by how many share a link.

Messages are on their way at the same time when they have the same place in their senders' steps of one round: a rank
sends one after the other.  Flows over a link share its bandwidth evenly, and none is faster than a network card:
a message's bytes take max(1, flows / capacity) times as long on its busiest link.  Counts are those of the schedule
(static), not of the moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from windlass.errors import ConfigError
from windlass.plan.linkcost import LinkCost, Profile
from windlass.plan.topology import Topology
from windlass.simulation.compiled import tree_bytes, tree_loads
from windlass.simulation.rounds import Ints, Round
from windlass.simulation.torus import finish, num_levels, torus_bytes, torus_loads

_MOST = 1 << 62


class Network:
    """Hosts, links and costs of all ranks.

    Args:
        profile: what messages cost.
        host: the host of each rank.
        topology: the links between hosts; None: every pair has its own.
    """

    def __init__(self, profile: Profile, host: Ints, topology: Topology | None) -> None:
        self.profile = profile
        self.host = host
        self._cables: _Cables | None = None
        if topology is not None and topology.num_links:
            self._cables = _Tree(topology) if topology.levels else _Torus(topology)

    def costs(self, messages: Round, *, period: int = 0) -> Costs:
        """The parts of each message's time.

        Args:
            messages: of one round.
            period: all ranks' messages look like those of the first `period` ranks, which alone are given; 0: all are.
        """
        remote = self.host[messages.src] != self.host[messages.dst]
        near, far = _by_size(self.profile.host, messages.num_bytes), _by_size(self.profile.network, messages.num_bytes)
        alpha, ps = (np.where(remote, there, here) for here, there in zip(near, far, strict=True))
        overhead = np.where(remote, self.profile.network.overhead_ns, self.profile.host.overhead_ns)
        if self._cables is not None:
            ps = self._cables.shared(messages, ps, period)
        gamma = np.where(messages.adds, _to_ns(messages.num_bytes, self.profile.gamma_ps_per_byte), 0)
        return Costs(2 * overhead + _to_ns(messages.num_bytes, ps), alpha, gamma, overhead)

    def busiest(self, rounds: Iterable[tuple[Round, int]]) -> int:
        """Bytes of rounds, each with its `period` or 0, on the link that carries most."""
        return self._cables.busiest(rounds) if self._cables is not None else 0


@dataclass(frozen=True, slots=True, eq=False)
class Costs:
    """Nanoseconds of each message: on the ports, on the way, adding, and overhead of one side."""

    hold: Ints
    alpha: Ints
    gamma: Ints
    overhead: Ints


class _Cables:
    """A topology's links, shared."""

    def __init__(self, topology: Topology) -> None:
        self.size = topology.size
        self.unit = math.lcm(*(level.capacity for level in topology.levels))

    def shared(self, messages: Round, ps: Ints, period: int) -> Ints:
        """Picoseconds a byte with the links shared; a link's weight is `unit` / its capacity."""
        # those of one period come sorted by place, and no two have one receiver
        listed = np.arange(len(ps)) if period else np.lexsort((messages.dst, messages.order))
        order = messages.order[listed]
        starts = np.flatnonzero(np.concatenate([[True], order[1:] != order[:-1], [True]]))
        loads = np.zeros(len(listed), np.int64)
        self.add_loads(messages.src[listed], messages.dst[listed], starts, period or self.size, loads)
        result = np.empty_like(ps)
        result[listed] = -(-ps[listed] * np.maximum(loads, self.unit) // self.unit)
        return result

    def busiest(self, rounds: Iterable[tuple[Round, int]]) -> int:
        raise NotImplementedError

    def add_loads(self, src: Ints, dst: Ints, starts: Ints, period: int, loads: Ints) -> None:
        raise NotImplementedError


class _Tree(_Cables):
    """Links of a tree: of each level those upwards, then those downwards."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.shape = np.asarray([level.ranks for level in topology.levels], np.int64)
        self.weight = np.concatenate(
            [
                np.full(2 * (topology.size // level.ranks), self.unit // level.capacity * level.share, np.int64)
                for level in topology.levels
            ]
        )
        self.links = np.empty(2 * len(self.shape), np.int64)

    def add_loads(self, src: Ints, dst: Ints, starts: Ints, period: int, loads: Ints) -> None:
        count, seen = np.zeros(len(self.weight), np.int64), np.full(len(self.weight), -1, np.int64)
        tree_loads(
            src, dst, starts, self.shape, self.size, period, self.weight, self.links, count, seen, loads
        )  # fmt: skip

    def busiest(self, rounds: Iterable[tuple[Round, int]]) -> int:
        total = np.zeros(len(self.weight), np.int64)
        for each, period in rounds:
            tree_bytes(
                each.src, each.dst, each.num_bytes, self.shape, self.size, period or self.size, self.links, total
            )  # fmt: skip
        return int(total.max())


class _Torus(_Cables):
    """Links of a torus, by dimension, direction, and the rank that they leave from."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self.sides = np.asarray(topology.sides, np.int64)

    def add_loads(self, src: Ints, dst: Ints, starts: Ints, period: int, loads: Ints) -> None:
        rows = 2 * len(self.sides)
        levels = np.zeros((rows, num_levels(self.sides), period), np.int64)
        longest = np.zeros((rows, self.size), np.int64)
        torus_loads(src, dst, starts, self.sides, self.size, period, longest, levels, loads)

    def busiest(self, rounds: Iterable[tuple[Round, int]]) -> int:
        rows = 2 * len(self.sides)
        longest, total = np.zeros((rows, self.size), np.int64), np.zeros((rows, self.size), np.int64)
        for each, period in rounds:
            table = np.zeros((rows, period or self.size), np.int64)
            torus_bytes(
                each.src, each.dst, each.num_bytes, self.sides, self.size, period or self.size, longest, table
            )  # fmt: skip
            finish(self.sides, self.size, period or self.size, table)
            total += np.tile(table, self.size // (period or self.size))
        return int(total.max())


def _by_size(cost: LinkCost, num_bytes: Ints) -> tuple[Ints, Ints]:
    """Latency and picoseconds a byte of each message."""
    starts = [segment.from_bytes for segment in cost.segments]
    alphas = np.asarray([segment.alpha_ns for segment in cost.segments], np.int64)
    speeds = np.asarray([segment.ps_per_byte for segment in cost.segments], np.int64)
    place = np.searchsorted(np.asarray(starts, np.int64), num_bytes, side="right") - 1
    return alphas[place], speeds[place]


def _to_ns(num_bytes: Ints, ps: Ints | int) -> Ints:
    if int(num_bytes.max(initial=0)) * int(np.max(ps, initial=0)) > _MOST:
        raise ConfigError(f"a message of {int(num_bytes.max())} bytes takes longer than can be counted")
    return -(-num_bytes * ps // 1000)
