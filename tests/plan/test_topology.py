"""Hosts, links and ways between them; what links cost."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from windlass.errors import ConfigError
from windlass.plan.linkcost import (
    DEFAULT_PROFILES,
    LinkCost,
    Profile,
    Segment,
    changed_network,
    constant_cost,
    default_profile,
    profile_from_mapping,
)
from windlass.plan.topology import Topology, parse_topology

TEXTS = [
    "host:1", "host:8", "switch:4x2", "switch:3x1", "fat-tree:16x4:r4:o2", "fat-tree:6x2:r3:o1", "torus:4x4",
    "torus:2x3x4", "torus:5x1", "ring:8", "ring:2", "ring:1",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_kept_and_ranks_lie_on_hosts_once(text: str) -> None:
    topology = parse_topology(text)
    assert topology.text == text and parse_topology(topology.text) == topology
    assert [rank for host in topology.hosts for rank in host] == list(range(topology.size))
    assert all(topology.host_of(rank) == number for number, host in enumerate(topology.hosts) for rank in host)


@pytest.mark.parametrize("text", TEXTS)
def test_ways_join_up(text: str) -> None:
    """From the sender's host to the receiver's, each link beginning where the one before ends; none within a host."""
    topology = parse_topology(text)
    links = topology.links
    assert [link.number for link in links] == list(range(topology.num_links))
    for source in range(topology.size):
        for target in range(topology.size):
            route = topology.route(source, target)
            same = topology.host_of(source) == topology.host_of(target)
            assert topology.pair_class(source, target) == ("host" if same else "network")
            assert bool(route) != same
            ends = [f"host {topology.host_of(source)}"]
            for number in route:
                assert links[number].source == ends[-1]
                ends.append(links[number].target)
            assert ends[-1] == f"host {topology.host_of(target)}"
            assert len(set(ends)) == len(ends), "goes round in a circle"


@pytest.mark.parametrize("text", [text for text in TEXTS if parse_topology(text).num_links])
def test_moving_all_ranks_by_a_period_changes_nothing(text: str) -> None:
    """With everybody sending to the rank d further on, links of ranks a period apart carry equally much."""
    topology = parse_topology(text)
    size, period = topology.size, topology.period
    assert size % period == 0
    for distance in range(1, size):
        flows = Counter(link for rank in range(size) for link in topology.route(rank, (rank + distance) % size))
        for rank in range(size):
            moved = ((rank + period) % size, (rank + period + distance) % size)
            mine = sorted(flows[link] for link in topology.route(rank, (rank + distance) % size))
            assert mine == sorted(flows[link] for link in topology.route(*moved))


def test_a_torus_goes_the_shorter_way() -> None:
    topology = parse_topology("torus:5x6")
    for source in range(30):
        for target in range(30):
            ahead = [(target // stride - source // stride) % side for stride, side in ((6, 5), (1, 6))]
            assert len(topology.route(source, target)) == sum(
                min(way, side - way) for way, side in zip(ahead, (5, 6), strict=True)
            )


def test_an_oversubscribed_uplink() -> None:
    topology = parse_topology("fat-tree:16x4:r4:o2")
    uplinks = [link for link in topology.links if link.source.startswith("rack") and link.target == "switch"]
    assert len(uplinks) == 4 and {(link.capacity, link.share) for link in uplinks} == {(4, 2)}
    assert len(topology.route(0, 15)) == 2 and len(topology.route(0, 16)) == 4
    assert parse_topology("fat-tree:16x4:r4") == parse_topology("fat-tree:16x4:r4:o1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fat-tre:4x2", "unknown topology 'fat-tre'; did you mean 'fat-tree'"),
        ("fat-tree:16x4:2", "fat-tree is written like fat-tree:16x4:r4:o2"),
        ("fat-tree:16x4:r5:o2", "16 hosts do not fill racks of 5"),
        ("switch:4", "switch is written like switch:4x2, got 'switch:4'"),
        ("host:0", "every number must be at least 1"),
        ("torus:4", "torus is written like torus:4x4"),
        ("ring:-3", "ring is written like ring:8"),
        ("", "unknown topology ''"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(text)


# --- costs --------------------------------------------------------------------------------------------------


def test_a_message_costs_by_its_segment() -> None:
    cost = LinkCost((Segment(0, 1000, 800), Segment(4096, 5000, 300)), overhead_ns=50)
    assert cost.message_ns(0) == 1100
    assert cost.message_ns(1) == 1101, "a part of a nanosecond counts as one"
    assert cost.message_ns(4095) == 1100 + 3276
    assert cost.message_ns(4096) == 5100 + 1229


@pytest.mark.parametrize("profile", DEFAULT_PROFILES.values())
def test_profiles_as_plain_mappings(profile: Profile) -> None:
    assert profile_from_mapping(json.loads(json.dumps(profile.to_mapping()))) == profile
    assert profile.source.startswith("assumed")


@pytest.mark.parametrize(
    ("segments", "overhead"),
    [((), 0), ((Segment(1, 0, 0),), 0), ((Segment(0, 0, 0), Segment(0, 1, 1)), 0), ((Segment(0, -1, 0),), 0),
     ((Segment(0, 0, 0),), -1)],
)  # fmt: skip
def test_what_is_no_cost_is_refused(segments: tuple[Segment, ...], overhead: int) -> None:
    with pytest.raises(ConfigError):
        LinkCost(segments, overhead)


@pytest.mark.parametrize(
    "spoil",
    [{"host": None}, {"network": {"segments": 3}}, {"gamma_ps_per_byte": 0.5}, {"network": {"segments": [{}]}}],
)
def test_a_damaged_mapping_is_refused(spoil: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        profile_from_mapping(default_profile().to_mapping() | spoil)


def test_another_network() -> None:
    base = default_profile()
    assert changed_network(base) is base
    changed = changed_network(base, latency_ns=7, bits_per_s=8 * 10**9)
    assert changed.network == LinkCost((Segment(0, 7, 1000),), base.network.overhead_ns)
    assert changed.host == base.host and changed.source.startswith("assumed")
    assert changed_network(base, latency_ns=7).network.segments == (Segment(0, 7, 800),)
    with pytest.raises(ConfigError, match="bandwidth must be above 0"):
        constant_cost(latency_ns=1, bits_per_s=0)
    with pytest.raises(ConfigError, match="unknown profile 'ethernet'"):
        default_profile("ethernet")


def test_topologies_are_values() -> None:
    assert len({parse_topology("ring:4"), parse_topology("ring:4"), Topology("host:4", 4, 4)}) == 2
