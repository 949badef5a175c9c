"""Which schedule is chosen, by the model and by what was measured; the table on disk."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from windlass.errors import ConfigError, WriteError
from windlass.plan.collective import SCHEDULES, Schedule
from windlass.plan.linkcost import LinkCost, Profile, Segment, changed_network, default_profile
from windlass.plan.pick import Pick
from windlass.plan.sizes import size_range
from windlass.plan.topology import parse_topology
from windlass.simulation.collective_time import schedule_time_ns
from windlass.tuning.collective_choice import (
    ADDING,
    candidates,
    choose_schedule,
    count_steps,
    crossovers,
    ranges_of,
    schedule_name,
    segment_bytes,
)
from windlass.tuning.collective_table import (
    CollectiveTable,
    TableRow,
    fingerprint_of,
    load_table,
    save_table,
    table_from_mapping,
    table_path,
)

PROFILE = default_profile()
PLACES = ["host:8", "switch:8x1", "switch:4x2", "switch:3x5", "fat-tree:8x2:r2:o4", "torus:3x3", "ring:7", "host:1"]
TABLE = CollectiveTable(
    fingerprint="abc", date="2026-01-02T03:04:05", versions={"mpi": "5.0"}, topology="switch:4x2", ranks=8,
    profile=PROFILE,
    rows=(
        TableRow(collective="allreduce", from_bytes=0, to_bytes=4096, schedule="naive", measured_s={"naive": 1e-5}),
        TableRow(
            collective="allreduce", from_bytes=4096, to_bytes=1 << 20, schedule="pipelined-tree", pieces=5,
            segment_bytes=1 << 16, measured_s={"pipelined-tree": 2e-4, "library": 3e-4},
        ),
        TableRow(collective="allreduce", from_bytes=1 << 20, to_bytes=None, schedule="library",
                 measured_s={"library": 0.01, "ring": 0.02}),
    ),
)  # fmt: skip


# --- by the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("collective", list(SCHEDULES))
def test_the_fastest_candidate_is_chosen(place: str, collective: str) -> None:
    topology = parse_topology(place)
    for num_bytes in (64, 1 << 16, 1 << 24):
        choice = choose_schedule(collective, num_bytes, topology=topology, profile=PROFILE)
        assert isinstance(choice.schedule, Schedule) and choice.schedule.collective == collective
        every = [
            schedule_time_ns(each, num_bytes, PROFILE, topology)
            for each in candidates(collective, num_bytes, topology=topology, profile=PROFILE)
        ]
        assert choice.predicted_ns == min(every) == choice.rivals[choice.name]
        assert list(choice.rivals.values()) == sorted(choice.rivals.values())
        assert choice.reason
        if choice.runner_up is not None:
            assert choice.runner_up[0] != choice.name and choice.runner_up[1] >= choice.predicted_ns


def test_small_is_latency_and_large_is_bytes() -> None:
    topology = parse_topology("switch:16x1")
    small = choose_schedule("allreduce", 8, topology=topology, profile=PROFILE)
    large = choose_schedule("allreduce", 1 << 26, topology=topology, profile=PROFILE)
    assert small.name == "recursive-doubling" and small.reason.startswith(("latency: 4 steps against", "fewer"))
    assert large.name in ("direct", "ring", "rabenseifner")
    assert "recursive-doubling" in list(large.rivals)[3:]
    slow = choose_schedule("allreduce", 1 << 26, topology=topology, profile=changed_network(PROFILE, bits_per_s=10**8))
    assert slow.predicted_ns > large.predicted_ns


def test_the_topology_and_the_links_change_the_choice() -> None:
    def winner(place: str, num_bytes: int, latency_ns: int = 20_000) -> str:
        profile = changed_network(PROFILE, latency_ns=latency_ns, bits_per_s=10**10)
        return choose_schedule("allreduce", num_bytes, topology=parse_topology(place), profile=profile).name

    assert len({winner(place, 1 << 20) for place in ("switch:64x1", "switch:16x4", "ring:64", "host:64")}) > 1
    assert len({winner("switch:64x1", 1 << 20, latency_ns) for latency_ns in (0, 20_000, 2_000_000)}) > 1


def test_size_ranges_follow_the_choices() -> None:
    topology, sizes = parse_topology("switch:4x2"), size_range("64..64MiB")
    found = crossovers("allreduce", topology=topology, profile=PROFILE, sizes=sizes)
    assert found[0].from_bytes == sizes[0] and found[-1].to_bytes == sizes[-1] and len(found) > 1
    assert all(one.name != other.name and one.to_bytes < other.from_bytes for one, other in pairwise(found))
    choices = [choose_schedule("allreduce", size, topology=topology, profile=PROFILE) for size in sizes]
    assert ranges_of(choices) == found


@pytest.mark.parametrize("collective", list(SCHEDULES))
def test_a_fixed_order_of_additions(collective: str) -> None:
    topology = parse_topology("switch:4x2")
    if collective == "reduce":
        with pytest.raises(ConfigError, match="no schedule of reduce adds in the order of ranks"):
            choose_schedule(collective, 1000, topology=topology, profile=PROFILE, fixed_order=True)
        return
    for num_bytes in (10, 10**7):
        choice = choose_schedule(collective, num_bytes, topology=topology, profile=PROFILE, fixed_order=True)
        assert isinstance(choice.schedule, Schedule)
        assert choice.schedule.ordered or collective not in ADDING
        assert ("adds in the order of ranks" in choice.reason) == (collective in ADDING)


def test_hierarchical_only_where_hosts_have_several_ranks() -> None:
    for place, there in (("switch:4x2", True), ("switch:8x1", False), ("host:8", False), ("torus:2x4", False)):
        names = {each.algorithm for each in candidates("allreduce", 1000, topology=parse_topology(place),
                                                       profile=PROFILE)}  # fmt: skip
        assert ("hierarchical" in names) == there


def test_what_takes_too_long_to_look_at_is_left_out() -> None:
    for place, there in (("switch:2x600", True), ("switch:2x5000", False), ("fat-tree:2500x4:r50:o4", True)):
        every = candidates("allreduce", 1000, topology=parse_topology(place), profile=PROFILE)
        assert ("direct" in {each.algorithm for each in every}) == there


def test_names_steps_and_segments() -> None:
    topology = parse_topology("switch:4x2")
    every = list(candidates("allreduce", 1 << 22, topology=topology, profile=PROFILE))
    assert {str(Pick.parse(schedule_name(each))) for each in every} == {schedule_name(each) for each in every}
    steps = {schedule_name(each): count_steps(each) for each in every}
    assert (steps["ring"], steps["recursive-doubling"], steps["direct"], steps["naive"]) == (14, 3, 2, 2)
    assert steps["hierarchical:ring"] == 8
    for schedule in every:
        assert segment_bytes(schedule, 1000, PROFILE) == 0
        part = segment_bytes(schedule, 1 << 26, PROFILE)
        assert part & (part - 1) == 0 and (part == 0 or part >= 1 << 16)
    assert segment_bytes(every[0], 1 << 26, replace(PROFILE, gamma_ps_per_byte=0)) == 0


def test_unknown_collective() -> None:
    with pytest.raises(ConfigError, match="unknown collective 'allreduse'; did you mean 'allreduce'"):
        choose_schedule("allreduse", 1, topology=parse_topology("host:2"), profile=PROFILE)


def test_costs_of_nothing_are_no_reason_to_fail() -> None:
    free = LinkCost((Segment(0, 0, 0),))
    profile = Profile(host=free, network=free)
    choice = choose_schedule("allreduce", 0, topology=parse_topology("switch:2x2"), profile=profile)
    assert choice.predicted_ns == 0 and choice.reason.startswith("as fast as")


# --- by measuring -------------------------------------------------------------------------------------------


def test_what_was_measured_goes_before_the_model() -> None:
    topology = parse_topology(TABLE.topology)

    def choose(num_bytes: int, fixed_order: bool = False, collective: str = "allreduce") -> tuple[str, str]:
        choice = choose_schedule(
            collective, num_bytes, topology=topology, profile=PROFILE, table=TABLE, fixed_order=fixed_order
        )
        return choice.name, choice.reason

    assert choose(4095) == ("naive", "measured the fastest")
    name, reason = choose(4096)
    assert name == "pipelined-tree:5" and reason == "measured the fastest (0.0002 s against 0.0003 s of library)"
    assert choose(1 << 20)[0] == "library"
    assert choose(4095, fixed_order=True)[0] == "naive"
    assert choose(4096, fixed_order=True)[0] in ("naive", "direct"), "neither a tree nor the library keeps the order"
    assert "measured" not in choose(1 << 20, collective="allgather")[1]
    row = replace(TABLE.rows[0], schedule="shared", measured_s={"shared": 2e-6, "naive": 1e-5})
    shared = choose_schedule(
        "allreduce", 100, topology=topology, profile=PROFILE, table=replace(TABLE, rows=(row,)), fixed_order=True
    )
    assert (shared.name, shared.predicted_ns) == ("shared", 2000) and isinstance(shared.schedule, Schedule)
    assert shared.schedule.algorithm == "direct"
    library = choose_schedule("allreduce", 1 << 21, topology=topology, profile=PROFILE, table=TABLE)
    assert library.schedule == "library" and library.predicted_ns == 10**7
    tree = choose_schedule("allreduce", 4096, topology=topology, profile=PROFILE, table=TABLE)
    assert tree.segment_bytes == 1 << 16 and tree.rivals["pipelined-tree:5"] == tree.predicted_ns


def test_a_table_on_disk(tmp_path: Path) -> None:
    warnings: list[str] = []
    where = {"ranks": 8, "topology": "switch:4x2", "fingerprint": "abc"}
    assert load_table(**where, warn=warnings.append, folder=tmp_path) is None  # type: ignore[arg-type]
    path = save_table(TABLE, folder=tmp_path)
    assert load_table(**where, warn=warnings.append, folder=tmp_path) == TABLE  # type: ignore[arg-type]
    assert load_table(ranks=9, topology="switch:4x2", fingerprint="abc", warn=warnings.append, folder=tmp_path) is None
    assert warnings == [] and sorted(each.suffix for each in tmp_path.iterdir()) == [".json", ".lock"]
    newer = replace(TABLE, date="2026-01-03")
    assert save_table(newer, folder=tmp_path) == path
    assert load_table(**where, warn=warnings.append, folder=tmp_path) == newer  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: text.replace("/1", "/9"),
     lambda text: text.replace("naive", "naïve"), lambda text: text.replace('"ranks": 8', '"ranks": 9'),
     lambda text: text.replace("1e-05", "-1"), lambda text: "\0"],
)  # fmt: skip
def test_a_damaged_table_costs_one_warning(spoil: object, tmp_path: Path) -> None:
    assert callable(spoil)
    path = save_table(TABLE, folder=tmp_path)
    path.write_text(spoil(path.read_text()))
    warnings: list[str] = []
    found = load_table(ranks=8, topology="switch:4x2", fingerprint="abc", warn=warnings.append, folder=tmp_path)
    assert found is None and len(warnings) == 1 and "damaged" in warnings[0] and "\n" not in warnings[0]


def test_tables_lie_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = table_path(ranks=8, topology="switch:4x2", fingerprint=fingerprint_of({"cpu": "a"}))
    assert path.parent == tmp_path / "windlass" / "collective"
    (tmp_path / "windlass").write_text("a file in the way")
    with pytest.raises(WriteError, match="cannot write"):
        save_table(TABLE)


def test_rows_that_cannot_be_are_refused() -> None:
    for change, message in (
        ({"collective": "gather"}, "unknown collective"), ({"schedule": "rings"}, "unknown schedule of allreduce"),
        ({"to_bytes": 0}, "are no range"), ({"measured_s": {"ring": 0.0}}, "must be above 0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            replace(TABLE.rows[0], **change)
    assert table_from_mapping(TABLE.to_mapping()) == TABLE
