"""Formula, max-plus and events agree to the nanosecond; links are shared as counted by hand; the laws hold."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from event_reference import Events

from windlass.errors import ConfigError
from windlass.plan.collective import SCHEDULES, Schedule, make_schedule
from windlass.plan.linkcost import LinkCost, Profile, Segment, constant_cost, default_profile
from windlass.plan.topology import Topology, parse_topology
from windlass.simulation import collective_time
from windlass.simulation.closed_forms import closed_form_ns
from windlass.simulation.collective_time import busiest_link_bytes, hosts_of, max_plus_ns, schedule_time_ns
from windlass.simulation.messages import Network
from windlass.simulation.patterns import PATTERNS, stages_of
from windlass.simulation.rounds import Ring, Round, exchange_round, make_round, program_rounds, ring_rounds

NEAR = LinkCost((Segment(0, 100, 150),), 30)
PROFILES = {
    "segments": Profile(
        host=NEAR, network=LinkCost((Segment(0, 1700, 803), Segment(5000, 2500, 700)), 310), gamma_ps_per_byte=97
    ),
    "slow to add": Profile(host=NEAR, network=LinkCost((Segment(0, 20, 803),), 31), gamma_ps_per_byte=970),
    "far away": Profile(host=NEAR, network=LinkCost((Segment(0, 200_000, 803),), 1)),
}
INNER = [name for name in SCHEDULES["allreduce"] if name != "hierarchical"]
NAMES = [(collective, name) for collective, algorithms in SCHEDULES.items() for name in algorithms]


def schedules(collective: str, name: str, ranks: int) -> Iterator[Schedule]:
    if name != "hierarchical":
        yield make_schedule(collective, name, ranks, pieces=3)
        return
    for number, inner in enumerate(INNER):
        width = next(width for width in (number % 3 + 2, 3, 2, ranks) if ranks % width == 0)
        hosts = [range(start, start + width) for start in range(0, ranks, width)]
        yield make_schedule(collective, name, ranks, hosts=hosts, inner=inner, pieces=3)


# --- formula = max-plus -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_formula_and_max_plus_agree(collective: str, name: str) -> None:
    compared = 0
    for ranks in range(2, 34):
        for schedule in schedules(collective, name, ranks):
            for num_bytes in (0, 1, 7, 1000, 65537, 27720 * 32, 128 * ranks * ranks):
                for profile in PROFILES.values():
                    formula = closed_form_ns(schedule, num_bytes, profile)
                    if formula is not None:
                        compared += 1
                        assert formula == max_plus_ns(schedule, num_bytes, profile), (ranks, num_bytes, schedule)
    without = {("allreduce", "pipelined-tree"), ("broadcast", "scatter-allgather")}
    assert (compared == 0) == ((collective, name) in without)


@pytest.mark.parametrize("ranks", range(2, 34))
def test_the_textbook(ranks: int) -> None:
    """Thakur et al., Patarasuk and Yuan, written out: latency a, overhead o, byte b, addition g, all in ns."""
    a, o, b, g, n = 1000, 50, 3, 2, 27720 * ranks
    cost = Profile(host=NEAR, network=LinkCost((Segment(0, a, 1000 * b),), o), gamma_ps_per_byte=1000 * g)
    p, chunk = ranks, n // ranks

    def time(name: str, collective: str = "allreduce") -> int:
        return schedule_time_ns(make_schedule(collective, name, ranks), n, cost)

    assert time("ring") == 2 * (p - 1) * (a + 2 * o) + 2 * (p - 1) * chunk * b + (p - 1) * chunk * g
    assert time("naive") == 2 * (p - 1) * (2 * o + n * b) + 2 * a + (p - 1) * n * g
    assert time("direct") == 2 * (p - 1) * (2 * o + chunk * b) + 2 * a + (p - 1) * chunk * g
    assert time("ring", "allgather") == (p - 1) * (a + 2 * o + chunk * b)
    assert time("pairwise", "alltoall") == (p - 1) * (a + 2 * o + chunk * b)
    steps = (p - 1).bit_length()
    bound = steps * (2 * (a + 2 * o + n * b) + n * g)
    assert time("binomial") == bound if p & (p - 1) == 0 else time("binomial") <= bound
    if p & (p - 1) == 0:
        assert time("recursive-doubling") == steps * (a + 2 * o + n * (b + g))
        assert time("rabenseifner") == 2 * steps * (a + 2 * o) + 2 * (p - 1) * chunk * b + (p - 1) * chunk * g
        assert time("bruck", "allgather") == steps * (a + 2 * o) + (p - 1) * chunk * b


def test_no_formula_where_chunks_cost_by_two_segments() -> None:
    schedule = make_schedule("allreduce", "ring", 4)
    assert closed_form_ns(schedule, 4 * 4999, PROFILES["segments"]) is not None
    assert closed_form_ns(schedule, 4 * 4999 + 1, PROFILES["segments"]) is None
    assert closed_form_ns(schedule, 4 * 4999 + 1, PROFILES["slow to add"]) is not None


# --- max-plus = events --------------------------------------------------------------------------------------


def places(ranks: int) -> list[Topology | None]:
    texts = [f"host:{ranks}", f"ring:{ranks}"]
    texts += [f"switch:{ranks // width}x{width}" for width in (2, 3) if ranks % width == 0]
    texts += [f"torus:{ranks // 2}x2"] * (ranks % 2 == 0) + [f"fat-tree:{ranks // 2}x2:r{ranks // 4}:o3"] * (
        ranks % 4 == 0
    )
    return [None, *map(parse_topology, texts)]


def rounds_of(schedule: Schedule, num_bytes: int) -> Iterator[Round]:
    for stage in stages_of(schedule, num_bytes):
        if isinstance(stage, Round):
            yield stage
        else:
            yield from ring_rounds(stage) if isinstance(stage, Ring) else [exchange_round(stage)]


@pytest.mark.parametrize("ranks", range(1, 13))
@pytest.mark.parametrize("profile", list(PROFILES)[:2])
def test_max_plus_and_events_agree(ranks: int, profile: str) -> None:
    for topology in places(ranks):
        for collective, name in NAMES:
            hosts = topology.hosts if topology else ()
            schedule = make_schedule(collective, name, ranks, hosts=hosts, pieces=3, inner=INNER[ranks % len(INNER)])
            for num_bytes in (7, 5000 * ranks + 3):
                network = Network(PROFILES[profile], hosts_of(schedule, topology), topology)
                costs = defaultdict(list)
                for messages in rounds_of(schedule, num_bytes):
                    cost = network.costs(messages)
                    for i in np.argsort(messages.order, kind="stable"):
                        row = (cost.hold[i], cost.alpha[i], cost.gamma[i], cost.overhead[i])
                        costs[int(messages.src[i]), int(messages.dst[i])].append(row)
                events = Events(schedule, lambda src, dst, number, known=costs: known[src, dst][number])  # type: ignore[misc]
                assert events.run() == max_plus_ns(schedule, num_bytes, PROFILES[profile], topology), (name, topology)


# --- rounds in arrays are those of the programs -------------------------------------------------------------


def as_rows(rounds: Iterator[Round]) -> list[tuple[int, ...]]:
    return sorted(
        row for each in rounds for row in zip(*(x.tolist() for x in (each.src, each.dst, each.num_bytes, each.adds)),
                                              strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(("collective", "name"), list(PATTERNS))
def test_patterns_are_the_programs(collective: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for ranks in range(2, 18):
        for schedule in schedules(collective, name, ranks):
            total = 1000 * (ranks if collective == "alltoall" else 1)
            assert as_rows(rounds_of(schedule, 1000)) == as_rows(program_rounds(schedule, total)), schedule
            made.append((schedule, max_plus_ns(schedule, 1000, PROFILES["segments"])))
    monkeypatch.setattr("windlass.simulation.patterns.PATTERNS", {})
    for schedule, time in made:
        assert time == max_plus_ns(schedule, 1000, PROFILES["segments"]), schedule


def test_hosts_of_different_sizes() -> None:
    hosts = ((0, 2), (1,), (3, 4, 5, 6))
    for inner in INNER:
        schedule = make_schedule("allreduce", "hierarchical", 7, hosts=hosts, inner=inner, pieces=3)
        assert as_rows(rounds_of(schedule, 100)) == as_rows(program_rounds(schedule, 100))


# --- shared links -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["switch:4x3", "fat-tree:6x2:r2:o3", "fat-tree:6x2:r3:o2", "torus:3x4", "torus:2x3x2", "torus:5x5",
             "ring:12", "ring:11", "ring:2"],
)  # fmt: skip
def test_links_are_shared_by_receivers(text: str) -> None:
    """Against counting on every link: messages at the same place of their senders' steps, to different receivers."""
    topology, random = parse_topology(text), Random(1)
    links, size = topology.links, topology.size
    profile = Profile(host=LinkCost((Segment(0, 0, 150),)), network=LinkCost((Segment(0, 0, 1000),)))
    network = Network(profile, np.arange(size) // topology.per_host, topology)
    for trial in range(30):
        number = random.randrange(1, 3 * size)
        messages = [(random.randrange(size), random.randrange(size), random.randrange(3)) for _ in range(number)]
        messages = [each for each in messages if each[0] != each[1]] or [(0, 1, 0)]
        if trial % 3 == 0:
            messages = [(rank, 0, 0) for rank in range(1, size)]
        src, dst, order = zip(*messages, strict=True)
        hold = network.costs(make_round(src, dst, 10**6, adds=False, order=order, fan_out=True, fan_in=True)).hold
        receivers = defaultdict(set)
        for source, target, place in messages:
            for link in topology.route(source, target):
                receivers[place, link].add(target)
        for i, (source, target, place) in enumerate(messages):
            shares = [
                Fraction(len(receivers[place, link]) * links[link].share, links[link].capacity)
                for link in topology.route(source, target)
            ]
            per_byte = 150 if topology.pair_class(source, target) == "host" else 1000
            most = max([Fraction(1), *shares])
            assert hold[i] == 1000 * -(-per_byte * most // 1)


def test_two_ranks_of_a_host_share_its_card() -> None:
    """The ring crosses each card once, recursive doubling with all four ranks of a host at once."""
    far = Profile(host=LinkCost((Segment(0, 0, 0),)), network=LinkCost((Segment(0, 0, 1000),)))
    alone, shared = parse_topology("switch:8x1"), parse_topology("switch:2x4")
    doubling, ring = (make_schedule("allreduce", name, 8) for name in ("recursive-doubling", "ring"))
    assert schedule_time_ns(doubling, 8000, far, alone) == 3 * 8000
    assert schedule_time_ns(doubling, 8000, far, shared) == 4 * 8000
    assert schedule_time_ns(ring, 8000, far, alone) == schedule_time_ns(ring, 8000, far, None) == 14 * 1000
    assert busiest_link_bytes(doubling, 8000, far, shared) == 4 * 8000
    assert busiest_link_bytes(ring, 8000, far, shared) == 14 * 1000
    assert busiest_link_bytes(ring, 8000, far, parse_topology("host:8")) == 0


@pytest.mark.parametrize("text", ["switch:8x3", "fat-tree:8x3:r2:o3", "torus:4x6", "torus:2x3x4", "ring:24", "host:24"])
@pytest.mark.parametrize(("name", "inner"), [("ring", "ring"), ("direct", "ring"), ("hierarchical", "ring"),
                                             ("hierarchical", "direct")])  # fmt: skip
def test_one_period_stands_for_all(text: str, name: str, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With equal chunks to the nanosecond, with uneven ones from above and by less than a byte for each message."""
    topology = parse_topology(text)
    schedule = make_schedule("allreduce", name, 24, hosts=topology.hosts, inner=inner)
    profile, sizes = PROFILES["segments"], (24 * 24 * 100, 24 * 24 * 100 + 5, 24 * 24 * 100 + 25)
    every = [max_plus_ns(schedule, size, profile, topology) for size in sizes]
    carried = [busiest_link_bytes(schedule, size, profile, topology) for size in sizes]
    monkeypatch.setattr(collective_time, "MOST_OF_EXCHANGE", 0)
    monkeypatch.setattr(collective_time, "MOST_OF_RING", 0)
    one = [max_plus_ns(schedule, size, profile, topology) for size in sizes]
    assert one[0] == every[0] and all(exact <= bound <= 1.01 * exact for exact, bound in zip(every, one, strict=True))
    assert carried[0] == busiest_link_bytes(schedule, sizes[0], profile, topology)


@pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="thousands of ranks in plain Python take minutes"
)
@pytest.mark.parametrize("text", ["switch:2500x4", "fat-tree:2500x4:r50:o4", "torus:100x100"])
@pytest.mark.parametrize("name", ["ring", "recursive-doubling", "rabenseifner", "pipelined-tree", "hierarchical"])
def test_ten_thousand_ranks(text: str, name: str) -> None:
    """Never faster than without other hosts in the way, if there are fast links within hosts at all."""
    topology = parse_topology(text)
    schedule = make_schedule("allreduce", name, 10_000, hosts=topology.hosts)
    same = default_profile().network
    profile = Profile(host=same, network=same, gamma_ps_per_byte=100)
    free = make_schedule("allreduce", name, 10_000, hosts=topology.hosts)
    assert schedule_time_ns(schedule, 10**7, profile, topology) >= max_plus_ns(free, 10**7, profile)


# --- laws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_more_bandwidth_is_never_slower_and_oversubscription_never_faster(collective: str, name: str) -> None:
    def time(gbit: int, oversubscription: int, num_bytes: int) -> int:
        network = constant_cost(latency_ns=15_000, bits_per_s=gbit * 10**9, overhead_ns=2000)
        topology = parse_topology(f"fat-tree:6x2:r3:o{oversubscription}")
        schedule = make_schedule(collective, name, 12, hosts=topology.hosts)
        return schedule_time_ns(schedule, num_bytes, Profile(host=NEAR, network=network), topology)

    for num_bytes in (100, 10**5, 10**7):
        by_bandwidth = [time(gbit, 2, num_bytes) for gbit in (1, 5, 10, 25, 100)]
        by_links = [time(10, oversubscription, num_bytes) for oversubscription in (1, 2, 4, 16)]
        assert by_bandwidth == sorted(by_bandwidth, reverse=True)
        assert by_links == sorted(by_links)


def test_ranks_must_agree() -> None:
    with pytest.raises(ConfigError, match="topology ring:4 has 4 ranks, the schedule 5"):
        schedule_time_ns(make_schedule("allreduce", "ring", 5), 1, default_profile(), parse_topology("ring:4"))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes longer than can be counted"):
        max_plus_ns(make_schedule("allreduce", "naive", 2), 1 << 60, default_profile())
