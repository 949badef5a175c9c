"""Which schedule for which size on which topology: by what was measured, or by the cost model.

The model (`simulation.collective_time`) costs every schedule of the table `SCHEDULES`, a pipelined tree in several
numbers of pieces and a hierarchical one with every schedule between hosts, and takes the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from windlass.errors import ConfigError, unknown
from windlass.plan.collective import SCHEDULES, Schedule, make_schedule
from windlass.plan.linkcost import LinkCost, Profile, Segment
from windlass.plan.pick import SHARED, Pick
from windlass.plan.topology import Topology
from windlass.simulation.collective_time import exchange_effort, schedule_time_ns
from windlass.simulation.patterns import stages_of
from windlass.simulation.rounds import Round
from windlass.tuning.collective_table import CollectiveTable, TableRow

ADDING = ("allreduce", "reduce_scatter", "reduce")
"""Collectives in which the order of additions matters."""
MOST_PIECES = 256
LEAST_SEGMENT = 1 << 16
"""Messages are not cut into less."""
MOST_EFFORT = 1 << 22
"""Of thousands of ranks on hosts or in racks of hundreds, so many messages of an exchange are looked at, not more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What is run for a size, and why.

    Attributes:
        collective, num_bytes: what for.
        name: as `plan.pick` writes it: a schedule with its parameter, "library", or "shared".
        schedule: the schedule, or "library"; of "shared" the direct one.
        segment_bytes: into what its messages are cut, so that adding overlaps sending; 0: not at all.
        predicted_ns: by the cost model; of the library and of shared memory the measured time.
        reason: in words.
        rivals: predicted nanoseconds by name, the fastest first, the chosen one among them.
    """

    collective: str
    num_bytes: int
    name: str
    schedule: Schedule | Literal["library"]
    segment_bytes: int
    predicted_ns: int
    reason: str
    rivals: Mapping[str, int]

    @property
    def runner_up(self) -> tuple[str, int] | None:
        """The fastest of the others, and its time; None if there is no other."""
        return next(((name, time) for name, time in self.rivals.items() if name != self.name), None)


@dataclass(frozen=True, slots=True)
class SizeRange:
    """Sizes, of those that were asked for, in which one schedule wins."""

    from_bytes: int
    to_bytes: int
    name: str


def choose_schedule(
    collective: str,
    num_bytes: int,
    *,
    topology: Topology,
    profile: Profile,
    table: CollectiveTable | None = None,
    fixed_order: bool = False,
    root: int = 0,
) -> Choice:
    """The schedule for a buffer of so many bytes.

    Args:
        collective: a name in `SCHEDULES`.
        num_bytes: of the buffer; of an all-to-all, what one rank sends in all.
        topology: hosts and links.
        profile: what messages cost.
        table: what was measured on this cluster; goes before the model where it has a row.
        fixed_order: contributions are added in the order of ranks, whatever the size.
        root: of a broadcast or reduction.

    Raises:
        ConfigError: no such collective, or none of its schedules adds in a fixed order.
    """
    if collective not in SCHEDULES:
        raise ConfigError(unknown("collective", collective, SCHEDULES))
    timed = _timed(collective, num_bytes, topology, profile, fixed_order, root)
    row = table.lookup(collective, num_bytes) if table is not None else None
    if row is not None and (not fixed_order or _is_fixed(row)):
        return _measured(row, num_bytes, topology, profile, timed, root)
    (best, time), *others = timed
    reason = why(best, others[0][0], num_bytes, topology, profile) if others else "the only one"
    if fixed_order and collective in ADDING:
        reason = f"adds in the order of ranks; {reason}"
    return Choice(
        collective=collective, num_bytes=num_bytes, name=schedule_name(best), schedule=best, predicted_ns=time,
        reason=reason,
        segment_bytes=segment_bytes(best, num_bytes, profile),
        rivals={schedule_name(schedule): ns for schedule, ns in timed},
    )  # fmt: skip


def crossovers(
    collective: str, *, topology: Topology, profile: Profile, sizes: Sequence[int], fixed_order: bool = False
) -> list[SizeRange]:
    """Which schedule wins where, among these sizes; neighbours with one winner are put together."""
    return ranges_of(
        [
            choose_schedule(collective, size, topology=topology, profile=profile, fixed_order=fixed_order)
            for size in sorted(sizes)
        ]
    )


def ranges_of(choices: Sequence[Choice]) -> list[SizeRange]:
    """Choices by size, neighbours with one winner put together."""
    found: list[SizeRange] = []
    for choice in choices:
        name = "pipelined-tree" if choice.name.startswith("pipelined-tree") else choice.name
        if found and found[-1].name == name:
            found[-1] = replace(found[-1], to_bytes=choice.num_bytes)
        else:
            found.append(SizeRange(choice.num_bytes, choice.num_bytes, name))
    return found


def schedule_name(schedule: Schedule) -> str:
    """With what was chosen within it, as `plan.pick` writes it: "pipelined-tree:16", "hierarchical:ring"."""
    return str(Pick(schedule.algorithm, schedule.setting.pieces, schedule.setting.inner))


def segment_bytes(schedule: Schedule, num_bytes: int, profile: Profile) -> int:
    """Into what the largest messages are cut, so that one part is added while the next is on its way; 0: nothing.

    In parts of s bytes a message of n costs 2 o n / s for overheads and gamma s for adding the last part, least at
    s = sqrt(2 o n / gamma), instead of gamma n.
    """
    message = max((int(size) for size in _largest_messages(schedule, num_bytes)), default=0)
    gamma = profile.gamma_ps_per_byte / 1000
    if schedule.collective not in ADDING or not gamma or message < 2 * LEAST_SEGMENT:
        return 0
    best = math.sqrt(2 * profile.network.overhead_ns * message / gamma)
    part = max(LEAST_SEGMENT, 1 << round(math.log2(max(best, 1))))
    return part if part < message else 0


# --- candidates ---------------------------------------------------------------------------------------------


def candidates(
    collective: str, num_bytes: int, *, topology: Topology, profile: Profile, fixed_order: bool = False, root: int = 0
) -> Iterator[Schedule]:
    """Every schedule that may be chosen; direct ones not where looking at them would take too long."""
    for name, algorithm in SCHEDULES[collective].items():
        if fixed_order and collective in ADDING and not algorithm.ordered:
            continue
        if name == "direct" and topology.num_links and exchange_effort(topology) > MOST_EFFORT:
            continue
        if name == "hierarchical":
            yield from _hierarchical(num_bytes, topology, profile)
        else:
            for pieces in _pieces(name, num_bytes, topology.size, profile):
                yield make_schedule(collective, name, topology.size, root=root, pieces=pieces, hosts=topology.hosts)


def _hierarchical(num_bytes: int, topology: Topology, profile: Profile) -> Iterator[Schedule]:
    """With every schedule between hosts; none where hosts have one rank, or there is one host."""
    if topology.per_host == 1 or len(topology.hosts) == 1:
        return
    for inner in SCHEDULES["allreduce"]:
        if inner != "hierarchical":
            for pieces in _pieces(inner, num_bytes // topology.per_host, len(topology.hosts), profile):
                yield make_schedule(
                    "allreduce", "hierarchical", topology.size, pieces=pieces, hosts=topology.hosts, inner=inner
                )


def _pieces(name: str, num_bytes: int, size: int, profile: Profile) -> list[int]:
    """Numbers of pieces worth looking at: around the best of (2 depth + k)(alpha + 3 (2o + n beta / k)).

    A rank in the middle of the tree sends and receives three messages in a step.
    """
    if name != "pipelined-tree":
        return [8]
    segment, depth = profile.network.segment(num_bytes), size.bit_length() - 1
    fixed = segment.alpha_ns + 6 * profile.network.overhead_ns
    best = math.sqrt(2 * depth * 3 * num_bytes * segment.ps_per_byte / 1000 / max(fixed, 1))
    middle = 1 << round(math.log2(min(max(best, 2), MOST_PIECES / 2)))
    return [middle // 2, middle, 2 * middle]


def _timed(
    collective: str, num_bytes: int, topology: Topology, profile: Profile, fixed_order: bool, root: int
) -> list[tuple[Schedule, int]]:
    """Candidates with their times, the fastest first; of each algorithm only the fastest."""
    fastest: dict[str, tuple[Schedule, int]] = {}
    for schedule in candidates(
        collective, num_bytes, topology=topology, profile=profile, fixed_order=fixed_order, root=root
    ):
        time = schedule_time_ns(schedule, num_bytes, profile, topology)
        known = fastest.get(schedule.algorithm)
        if known is None or time < known[1]:
            fastest[schedule.algorithm] = (schedule, time)
    if not fastest:
        names = [name for each in SCHEDULES.values() for name, one in each.items() if one.ordered]
        raise ConfigError(
            f"no schedule of {collective} adds in the order of ranks for every size; "
            f"those that do are {', '.join(sorted(set(names)))}, of allreduce and reduce_scatter"
        )
    return sorted(fastest.values(), key=lambda each: each[1])


# --- by measuring -------------------------------------------------------------------------------------------


def _is_fixed(row: TableRow) -> bool:
    known = SCHEDULES[row.collective].get(row.schedule)
    return row.collective not in ADDING or row.schedule == SHARED or (known is not None and known.ordered)


def _measured(
    row: TableRow, num_bytes: int, topology: Topology, profile: Profile, timed: list[tuple[Schedule, int]], root: int
) -> Choice:
    built = row.build(topology.size, topology.hosts, root)
    seconds = row.measured_s.get(row.schedule)
    if built is None or row.schedule == SHARED:
        name, time = row.schedule, round(seconds * 1e9) if seconds else 0
    else:
        name, time = schedule_name(built), schedule_time_ns(built, num_bytes, profile, topology)
    rivals = {schedule_name(schedule): ns for schedule, ns in timed} | {name: time}
    others = sorted((s, name) for name, s in row.measured_s.items() if name != row.schedule)
    against = f" ({seconds:.3g} s against {others[0][0]:.3g} s of {others[0][1]})" if seconds and others else ""
    return Choice(
        collective=row.collective, num_bytes=num_bytes, name=name, schedule=built or "library",
        segment_bytes=row.segment_bytes, predicted_ns=time, reason=f"measured the fastest{against}",
        rivals=dict(sorted(rivals.items(), key=lambda each: each[1])),
    )  # fmt: skip


# --- why ----------------------------------------------------------------------------------------------------


def why(best: Schedule, other: Schedule, num_bytes: int, topology: Topology, profile: Profile) -> str:
    """In words, where the winner saves most against another schedule.

    The time of each is taken again with everything free but latency, overheads, bytes, or adding.
    """
    saved: dict[str, int] = {}
    for part in _PARTS:
        alone = _only(profile, part)
        mine, theirs = (schedule_time_ns(each, num_bytes, alone, topology) for each in (best, other))
        saved[part] = theirs - mine
    part = max(saved, key=lambda each: saved[each])
    name = schedule_name(other)
    if saved[part] <= 0:
        return f"as fast as {name}"
    if part == "latency":
        return f"latency: {count_steps(best)} steps against {count_steps(other)} of {name}"
    words = {"overhead": "fewer messages in a row", "bytes": "bytes on the busiest path", "adding": "less to add"}
    return f"{words[part]}: {saved[part] / 1000:,.0f} µs less than {name}"


def count_steps(schedule: Schedule) -> int:
    """Rounds of a schedule."""
    return sum(1 if isinstance(stage, Round) else stage.num_steps for stage in stages_of(schedule, schedule.num_chunks))


_PARTS = ("latency", "overhead", "bytes", "adding")


def _only(profile: Profile, part: str) -> Profile:
    """The same with everything else for nothing."""

    def link(cost: LinkCost) -> LinkCost:
        segments = tuple(
            Segment(
                each.from_bytes,
                each.alpha_ns if part == "latency" else 0,
                each.ps_per_byte if part == "bytes" else 0,
            )
            for each in cost.segments
        )
        return LinkCost(segments, cost.overhead_ns if part == "overhead" else 0)

    return Profile(
        host=link(profile.host),
        network=link(profile.network),
        gamma_ps_per_byte=profile.gamma_ps_per_byte if part == "adding" else 0,
    )


def _largest_messages(schedule: Schedule, num_bytes: int) -> Iterator[int]:
    for stage in stages_of(schedule, num_bytes):
        yield int((stage.num_bytes if isinstance(stage, Round) else stage.sizes).max(initial=0))
