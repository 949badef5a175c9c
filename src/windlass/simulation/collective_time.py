"""How long a schedule takes, by max-plus over its steps: no event queue, whole nanoseconds, any number of ranks.

The model (x = ceil(n ps_per_byte / 1000) for a message of n bytes, o, alpha and gamma from the `Profile`):

- all ranks begin together; a step begins when the rank's step before it has ended;
- a rank's sends of a step leave one after the other, in the order listed; a message holds the sender's port for
  2o + x, both overheads and its bytes, and is complete at the receiver no sooner than alpha after that;
- a rank sends and receives at the same time (full duplex), but receives one message after the other: step after
  step, within a step as they begin to arrive (ties: by the sender's number).  A message holds the receiver's port
  for the same 2o + x, and is complete no sooner than o after the step has begun: what came early has waited;
- adding takes ceil(n gamma / 1000), before the next message;
- a step ends when all its messages have left and are complete.

So a message's end is  max(end of the one before + 2o + x, end of sending + alpha, begin of the step + o) + adding.
With one message at a time that is alpha + 2o + n beta, the formulas of `closed_forms` (Thakur et al. 2005 with
overheads).  Links are shared as `messages` says.

A liberty for speed: of a ring or an exchange of everybody with everybody with more than `MOST_OF_RING` or
`MOST_OF_EXCHANGE` messages only the ranks of one period of the topology are looked at, for all others do the same.
Chunks that differ by a byte then all count as the longer: a bound from above, and exact where the longer ones make
the longest path.
"""

from __future__ import annotations

import numpy as np

from windlass.errors import ConfigError
from windlass.plan.collective import Schedule
from windlass.plan.linkcost import PairClass, Profile
from windlass.plan.topology import Topology
from windlass.simulation.closed_forms import closed_form_ns
from windlass.simulation.compiled import receive_all, run_ring, send_all
from windlass.simulation.messages import Costs, Network
from windlass.simulation.patterns import stages_of
from windlass.simulation.rounds import Exchange, Ints, Ring, Round, Stage, exchange_round, make_round

MOST_OF_EXCHANGE = 1 << 18
MOST_OF_RING = 1 << 24
"""Messages that are looked at one by one."""


def schedule_time_ns(schedule: Schedule, num_bytes: int, profile: Profile, topology: Topology | None = None) -> int:
    """The time from the common begin to the end of the last rank, nanoseconds.

    Args:
        schedule: what is run.
        num_bytes: of the buffer; of an all-to-all, what one rank sends in all.
        profile: what messages cost.
        topology: hosts and shared links; None: every pair has its own link, and the hosts are those of the
            schedule's setting, or every rank its own.

    Raises:
        ConfigError: the topology is of another number of ranks.
    """
    check_ranks(schedule, topology)
    if topology is None or topology.num_links == 0:
        pair: PairClass = "host" if topology is not None else "network"
        closed = closed_form_ns(schedule, num_bytes, profile, pair_class=pair)
        if closed is not None:
            return closed
    return max_plus_ns(schedule, num_bytes, profile, topology)


def max_plus_ns(schedule: Schedule, num_bytes: int, profile: Profile, topology: Topology | None = None) -> int:
    """The same, always step by step."""
    check_ranks(schedule, topology)
    clock = _Clock(Network(profile, hosts_of(schedule, topology), topology), _period(schedule, topology))
    for stage in stages_of(schedule, num_bytes):
        clock.run(stage)
    return int(clock.begin.max())


def busiest_link_bytes(schedule: Schedule, num_bytes: int, profile: Profile, topology: Topology) -> int:
    """Bytes over the link that carries most."""
    check_ranks(schedule, topology)
    network = Network(profile, hosts_of(schedule, topology), topology)
    return network.busiest(_traffic(stage, topology) for stage in stages_of(schedule, num_bytes))


def _traffic(stage: Stage, topology: Topology) -> tuple[Round, int]:
    """A stage's messages, and the period that they are of, or 0."""
    if isinstance(stage, Round):
        return stage, 0
    if isinstance(stage, Ring):
        return _all_of_ring(stage), 0
    if stage.num_messages <= MOST_OF_EXCHANGE or not _in_columns(stage):
        return exchange_round(stage), 0
    return _one_period(stage, topology.period), topology.period


def exchange_effort(topology: Topology) -> int:
    """How many messages are looked at for an exchange of everybody with everybody."""
    every = topology.size * (topology.size - 1)
    return every if every <= MOST_OF_EXCHANGE else topology.period * topology.size


def check_ranks(schedule: Schedule, topology: Topology | None) -> None:
    """Refuses a topology of another number of ranks."""
    if topology is not None and topology.size != schedule.size:
        raise ConfigError(f"topology {topology.text} has {topology.size} ranks, the schedule {schedule.size}")


def hosts_of(schedule: Schedule, topology: Topology | None) -> Ints:
    """The host of each rank."""
    if topology is not None:
        return np.arange(schedule.size, dtype=np.int64) // topology.per_host
    host = np.arange(schedule.size, dtype=np.int64)
    for number, ranks in enumerate(schedule.setting.hosts):
        host[list(ranks)] = number
    return host


def _period(schedule: Schedule, topology: Topology | None) -> int:
    """By how much all ranks may be moved on without a change; of hosts in disorder: as if all were alike."""
    if topology is not None:
        return topology.period
    hosts = schedule.setting.hosts
    if hosts and [rank for host in hosts for rank in host] == list(range(schedule.size)):
        widths = {len(host) for host in hosts}
        return widths.pop() if len(widths) == 1 and len(hosts) > 1 else 1
    return 1


class _Clock:
    """Where every rank is: when its next step begins, and when its port for receiving is free."""

    def __init__(self, network: Network, period: int) -> None:
        self.network = network
        self.period = period
        self.begin = np.zeros(len(network.host), np.int64)
        self.port = np.zeros(len(network.host), np.int64)

    def run(self, stage: Stage) -> None:
        """Goes through a stage."""
        if isinstance(stage, Round):
            self._round(stage)
        elif isinstance(stage, Ring):
            few = stage.num_messages <= MOST_OF_RING or not _in_columns(stage)
            self._ring(stage) if few else self._alike_ring(stage)
        elif stage.num_messages > MOST_OF_EXCHANGE and _in_columns(stage):
            self._alike_exchange(stage)
        elif stage.num_messages > MOST_OF_EXCHANGE and np.all(np.diff(self.network.host[stage.groups]) == 0):
            self._host_exchange(stage)
        else:
            self._round(exchange_round(stage))

    def _round(self, messages: Round) -> None:
        costs, end = self.network.costs(messages), self.begin.copy()
        left = np.empty(len(messages.src), np.int64)
        listed = np.arange(len(left))
        sending = np.lexsort((messages.order, messages.src)) if messages.fan_out else listed
        send_all(self.begin, end, messages.src, costs.hold, left, sending)
        ready = left + costs.alpha
        if messages.fan_in:
            listed = np.lexsort((messages.order, messages.src, ready - costs.hold, messages.dst))
        receive_all(self.begin, end, self.port, messages.dst, costs.hold, ready, costs.gamma, costs.overhead, listed)
        self.begin = end

    def _ring(self, ring: Ring) -> None:
        shortest, longest = int(ring.sizes.min()), int(ring.sizes.max())
        kinds = [self.network.costs(_ring_messages(ring, size)) for size in (shortest, longest)]
        longer = (ring.sizes > shortest).astype(np.int64)
        hold, alpha, gamma, overhead = (
            np.stack([each.reshape(ring.groups.shape) for each in pair])
            for pair in zip(*map(_parts, kinds), strict=True)
        )
        steps = ring.groups.shape[1] - 1
        run_ring(
            self.begin, self.port, ring.groups, longer, ring.shift, steps, hold, alpha, gamma, overhead[0]
        )  # fmt: skip

    def _alike_ring(self, ring: Ring) -> None:
        """For the ranks of one period; the others do the same."""
        columns, steps = self.period // len(ring.groups), ring.groups.shape[1] - 1
        costs = self.network.costs(_ring_messages(ring, int(ring.sizes.max())))
        hold, alpha, gamma, overhead = (
            np.ascontiguousarray(each.reshape(1, *ring.groups.shape)[:, :, :columns]) for each in _parts(costs)
        )
        groups = np.ascontiguousarray(ring.groups[:, :columns])
        begin, port = self._one_period()
        run_ring(begin, port, groups, np.zeros_like(groups), ring.shift, steps, hold, alpha, gamma, overhead[0])
        self._all_periods(begin, port)

    def _alike_exchange(self, exchange: Exchange) -> None:
        """For the ranks of one period; the others do the same."""
        stride, width = len(exchange.groups), exchange.groups.shape[1]
        costs = self.network.costs(_one_period(exchange, self.period), period=self.period)
        hold, alpha, gamma, overhead = (each.reshape(width - 1, self.period) for each in _parts(costs))
        begin, port = self._one_period()
        left = begin + np.cumsum(hold, axis=0)
        rank, place = np.arange(self.period)[None, :], np.arange(width - 1)[:, None]
        sender = (rank - (place + 1) * stride) % len(self.begin) % self.period
        length, ready = hold[place, sender], (left + alpha)[place, sender]
        listed = np.argsort(ready - length, axis=0, kind="stable")
        columns = [length, ready, begin + overhead[place, sender], gamma[place, sender]]
        length, ready, early, adding = (np.take_along_axis(each, listed, axis=0) for each in columns)
        for k in range(width - 1):
            port = np.maximum(np.maximum(port + length[k], ready[k]), early[k]) + adding[k]
        self._all_periods(np.maximum(left[-1], port), port)

    def _host_exchange(self, exchange: Exchange) -> None:
        """Within hosts: as the closed form has it, from when the last rank of each begins."""
        first, size = exchange.groups[:, :2], int(exchange.sizes.max())
        costs = self.network.costs(make_round(first[:, 0], first[:, 1], size, adds=exchange.adds))
        each = costs.alpha + (exchange.groups.shape[1] - 1) * (costs.hold + costs.gamma)
        end = (self.begin[exchange.groups].max(axis=1) + each)[:, None]
        self.begin[exchange.groups] = self.port[exchange.groups] = end

    def _one_period(self) -> tuple[Ints, Ints]:
        begin, port = (each.reshape(-1, self.period).max(axis=0) for each in (self.begin, self.port))
        return begin, port

    def _all_periods(self, begin: Ints, port: Ints) -> None:
        copies = len(self.begin) // self.period
        self.begin, self.port = np.tile(begin, copies), np.tile(port, copies)


def _in_columns(stage: Ring | Exchange) -> bool:
    """Whether the members of each group are as many ranks apart as there are groups."""
    number, width = stage.groups.shape
    return bool(np.array_equal(stage.groups, np.arange(number)[:, None] + number * np.arange(width)))


def _parts(costs: Costs) -> tuple[Ints, Ints, Ints, Ints]:
    return costs.hold, costs.alpha, costs.gamma, costs.overhead


def _one_period(exchange: Exchange, period: int) -> Round:
    """The messages that the first `period` ranks send, by distance; members of a group are `len(groups)` apart."""
    stride, width = len(exchange.groups), exchange.groups.shape[1]
    src, distance = np.tile(np.arange(period), width - 1), np.repeat(np.arange(1, width), period)
    dst = (src + distance * stride) % (stride * width)
    return make_round(src, dst, int(exchange.sizes.max()), adds=exchange.adds, order=distance - 1)


def _ring_messages(ring: Ring, num_bytes: int) -> Round:
    to = np.roll(ring.groups, -1, axis=1)
    return make_round(ring.groups.ravel(), to.ravel(), num_bytes, adds=ring.adds)


def _all_of_ring(ring: Ring) -> Round:
    """All that a ring's members send, as one message each: all chunks but one."""
    width = ring.groups.shape[1]
    kept = (np.arange(width) - (width - 1) - ring.shift) % width
    sizes = ring.sizes.sum(axis=1, keepdims=True) - ring.sizes[:, kept]
    return make_round(ring.groups.ravel(), np.roll(ring.groups, -1, axis=1).ravel(), sizes.ravel(), adds=ring.adds)
