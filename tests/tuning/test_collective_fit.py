"""Costs of links from times of messages: what is put in is found again, and noise does not make bandwidth fall."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from windlass.errors import ConfigError
from windlass.plan.linkcost import LinkCost, Profile, Segment
from windlass.plan.pick import LIBRARY, Pick
from windlass.tuning.cluster import (
    MESSAGE_SIZES,
    NETWORK_SEGMENT,
    class_pairs,
    fastest,
    fingerprint,
    likely_picks,
    load_chooser,
    make_rows,
    topology_of,
)
from windlass.tuning.collective_fit import Point, fit_link, geometric_error, rise
from windlass.tuning.collective_table import CollectiveTable, save_table

SLOW = LinkCost((Segment(0, 1_000_000, 80_000),))
PROFILE = Profile(host=LinkCost((Segment(0, 1_000, 100),)), network=SLOW)


def points_of(link: LinkCost, sizes: tuple[int, ...] = MESSAGE_SIZES) -> list[Point]:
    return [(num_bytes, link.message_ns(num_bytes) / 1e9) for num_bytes in sizes]


@pytest.mark.parametrize("seed", range(5))
def test_one_line_with_noise_is_found_to_two_parts_in_a_hundred(seed: int) -> None:
    draw = random.Random(seed)
    noisy = [(n, t * (1 + 0.02 * draw.random())) for n, t in points_of(SLOW)]
    fitted = fit_link(noisy)
    for num_bytes, seconds in points_of(SLOW):
        assert fitted.message_ns(num_bytes) / 1e9 == pytest.approx(seconds, rel=0.03)


def test_a_change_of_protocol_is_found_where_it_is() -> None:
    link = LinkCost((Segment(0, 20_000, 900), Segment(65536, 90_000, 800)), overhead_ns=1_000)
    fitted = fit_link(points_of(link), overhead_s=1e-6)
    assert [segment.from_bytes for segment in fitted.segments] == [0, 65536]
    assert fitted.overhead_ns == 1_000
    for num_bytes, seconds in points_of(link):
        assert fitted.message_ns(num_bytes) / 1e9 == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_times_of_wild_noise_still_rise_within_segments_and_bandwidth_does_not_fall(seed: int) -> None:
    draw = random.Random(seed)
    fitted = fit_link([(n, t * draw.choice([1, 1, 1.5, 3])) for n, t in points_of(SLOW)])
    speeds = [segment.ps_per_byte for segment in fitted.segments]
    assert all(segment.alpha_ns >= 0 for segment in fitted.segments)
    assert all(later <= 1.1 * earlier + 1 for earlier, later in itertools.pairwise(speeds))


def test_the_closest_rising_sequence_keeps_what_rises_and_the_product_of_the_rest() -> None:
    points = [(1, 2.0), (2, 3.0), (3, 1.0), (4, 8.0)]
    risen = [seconds for _, seconds in rise(points)]
    assert risen == sorted(risen) and risen[0] <= 2.0 and risen[-1] == pytest.approx(8.0)
    assert math.prod(risen) == pytest.approx(math.prod(seconds for _, seconds in points))
    assert [t for _, t in rise(points_of(SLOW))] == pytest.approx([t for _, t in points_of(SLOW)])


def test_an_overhead_above_the_latency_is_bounded_by_it() -> None:
    fitted = fit_link([(1, 10e-6), (1000, 11e-6), (10_000, 20e-6)], overhead_s=1.0)
    assert all(segment.alpha_ns >= 0 for segment in fitted.segments)
    assert fitted.message_ns(1) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize("points", [[], [(1, 0.0)], [(1, -1.0), (2, 1.0)], [(-1, 1.0)]])
def test_what_cannot_be_fitted_is_refused(points: list[Point]) -> None:
    with pytest.raises(ConfigError, match="times above 0"):
        fit_link(points)


def test_the_geometric_error_counts_too_slow_and_too_fast_alike() -> None:
    assert geometric_error([(1.0, 1.0)]) == 0
    assert geometric_error([(1.1, 1.0), (1.0, 1.1)]) == pytest.approx(0.1)
    assert geometric_error([]) == 0


def test_pairs_of_a_class_share_no_rank() -> None:
    assert class_pairs([(0, 1, 2), (3,), (4, 5)]) == {"host": [(0, 1), (4, 5)], "network": [(0, 3)]}
    assert class_pairs([(0, 1)]) == {"host": [(0, 1)]}
    assert class_pairs([(0,), (1,)]) == {"network": [(0, 1)]}


def test_hosts_become_a_topology_where_there_is_one_for_them() -> None:
    texts = {hosts: found.text if (found := topology_of(hosts)) else "" for hosts in (
        ((0, 1, 2),), ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1), (2,)),
    )}  # fmt: skip
    assert list(texts.values()) == ["host:3", "switch:2x2", "", ""]


def test_the_library_stays_unless_another_is_three_parts_in_a_hundred_faster() -> None:
    library, ring = Pick(LIBRARY), Pick("ring")
    assert fastest({library: 1.03, ring: 1.0}) == library
    assert fastest({library: 1.04, ring: 1.0}) == ring
    assert fastest({ring: 1.0, Pick("direct"): 0.99}) == Pick("direct")


@pytest.mark.parametrize("hosts", [((0, 1), (2, 3)), ((0, 1), (2,))])
def test_likely_picks_are_within_twice_the_best_and_cut_for_the_network(hosts: tuple[tuple[int, ...], ...]) -> None:
    picks = likely_picks(1 << 20, hosts=hosts, profile=PROFILE)
    times = list(picks.values())
    assert times == sorted(times) and times[-1] <= 2 * times[0]
    assert {pick.segment_bytes for pick in picks} == {NETWORK_SEGMENT}
    if topology_of(hosts) is not None:  # which says that ranks of a host share its card
        assert next(iter(picks)).algorithm == "hierarchical"


def test_a_table_that_is_stored_chooses_for_its_ranks_alone(tmp_path: Path) -> None:
    ring = Pick("ring", segment_bytes=NETWORK_SEGMENT)
    found = [
        (1024, Pick("shared"), {Pick("shared"): 1e-6, Pick(LIBRARY): 2e-6}),
        (1 << 20, ring, {ring: 1e-3, Pick(LIBRARY): 2e-3}),
    ]
    table = CollectiveTable(
        fingerprint=fingerprint(), date="2026-01-01", versions={}, topology="host:3", ranks=3, profile=PROFILE,
        rows=make_rows(found),
    )  # fmt: skip
    save_table(table, folder=tmp_path)
    choose = load_chooser(3, [(0, 1, 2)], folder=tmp_path)
    assert choose is not None
    assert [str(choose(n)) for n in (1, 1024, 32767, 32768, 1 << 30)] == ["shared"] * 3 + ["ring"] * 2
    assert choose(1 << 30) == ring
    assert load_chooser(2, [(0, 1)], folder=tmp_path) is None
    assert load_chooser(3, [(0, 1), (2,)], folder=tmp_path) is None
