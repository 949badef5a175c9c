"""Allreduce over a cluster on one machine: every schedule, predicted beside measured.

The launcher builds hosts and links (`engine.namespaces`) and starts the real MPI engine across them.  The ranks
first time messages and additions, and fit the costs of links to them; the predictions come from these alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from windlass.engine.listen import Event, run_and_listen, tell
from windlass.engine.namespaces import Namespaces
from windlass.errors import ConfigError, LostRankError
from windlass.plan.collective import SCHEDULES
from windlass.plan.linkcost import profile_from_mapping
from windlass.plan.pick import LIBRARY, SHARED, Pick
from windlass.plan.sizes import parse_bits_per_s, parse_ns
from windlass.plan.topology import switch_topology
from windlass.tuning.cluster import MESSAGE_SIZES, NETWORK_SEGMENT, measure_profile
from windlass.tuning.collective_fit import geometric_error

INNER = ("ring", "recursive-doubling", "rabenseifner")
"""Schedules between hosts that the hierarchical one is measured with."""
LEAD_S = 5e-3
"""Ranks begin so much later than they have agreed to, and 8 latencies; all hosts have this machine's clock."""
GRACE_S = 1.0
"""So long after the first error the others' are heard."""
LIMIT_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Links:
    """One setting of a cluster's links.

    Attributes:
        latency_ns: from card to card.
        bits_per_s: of each host's cable, in each direction.
    """

    latency_ns: int
    bits_per_s: int


def describe_links(links: Links) -> str:
    """Latency and bandwidth for a person."""
    return f"{links.latency_ns / 1e6:g} ms, {links.bits_per_s / 1e6:g} Mbit/s"


def parse_links(latencies: str, bandwidths: str) -> list[Links]:
    """Settings from comma-separated latencies and bandwidths; of one, it is that of all.

    Raises:
        ConfigError: what cannot be read, or numbers of each that do not fit.

    >>> [links.bits_per_s for links in parse_links("2ms,100us", "1Gbit")]
    [1000000000, 1000000000]
    """
    latency, bandwidth = ([part.strip() for part in text.split(",")] for text in (latencies, bandwidths))
    number = max(len(latency), len(bandwidth))
    if {len(latency), len(bandwidth)} - {1, number}:
        raise ConfigError(f"--latency and --bandwidth: need as many of each, got {latencies!r} and {bandwidths!r}")
    pairs = zip(latency * (number // len(latency)), bandwidth * (number // len(bandwidth)), strict=True)
    return [Links(latency_ns=parse_ns(one), bits_per_s=parse_bits_per_s(other)) for one, other in pairs]


@dataclass(frozen=True, kw_only=True)
class ClusterRow:
    """One schedule at one size.

    Attributes:
        num_bytes: of the buffer.
        by: the schedule, or ``library``.
        predicted_s: what the fitted costs say; 0 for the library, whose algorithm is not known.
        measured_s, low_s, high_s: median and extremes over the turns, at the slowest rank.
    """

    num_bytes: int
    by: str
    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True, kw_only=True)
class ClusterResult:
    """What one setting of the links gave.

    Attributes:
        links, hosts, per_host: the setting.
        shaped_by: what shaped the links.
        profile: the fitted costs.
        points: the measured times of messages, by class of pairs.
        rows: schedules and sizes.
    """

    links: Links
    hosts: int
    per_host: int
    shaped_by: str
    profile: dict[str, Any]
    points: dict[str, list[tuple[int, float]]]
    rows: list[ClusterRow]

    def errors(self, *, from_bytes: int = 0) -> dict[str, float]:
        """The geometric mean error of each schedule's predictions, and of all, from a size upwards."""
        pairs: dict[str, list[tuple[float, float]]] = {"all": []}
        for row in self.rows:
            if row.predicted_s and row.num_bytes >= from_bytes:
                pairs["all"].append((row.predicted_s, row.measured_s))
                pairs.setdefault(row.by, []).append((row.predicted_s, row.measured_s))
        return {by: geometric_error(found) for by, found in pairs.items()}

    def fastest(self, num_bytes: int, *, measured: bool) -> str:
        """The schedule that is fastest at a size, by measurement or by prediction."""
        rows = [row for row in self.rows if row.num_bytes == num_bytes and row.predicted_s]
        return min(rows, key=lambda row: row.measured_s if measured else row.predicted_s).by

    def crossovers(self) -> list[tuple[int, str]]:
        """From which size on which schedule is predicted to be the fastest, among powers of two from 1 KiB."""
        spec = {"hosts": self.hosts, "per_host": self.per_host}
        names = [str(pick) for pick in cluster_picks(self.hosts, self.per_host)]
        found: list[tuple[int, str]] = []
        for num_bytes in (1 << power for power in range(10, 25)):
            best = min(names, key=lambda by: _predicted(by, num_bytes, self.profile, spec))
            if not found or found[-1][1] != best:
                found.append((num_bytes, best))
        return found


def cluster_picks(hosts: int, per_host: int) -> list[Pick]:
    """Every schedule that these ranks can run."""
    flat = [Pick(name) for name in SCHEDULES["allreduce"] if name != "hierarchical"]
    return flat + ([Pick("hierarchical", inner=inner) for inner in INNER] if per_host > 1 else [])


def bench_cluster(
    links: Links, *, hosts: int, per_host: int, sizes: Sequence[int], turns: int,
    on_event: Callable[[Event], None], library: bool = True,
    messages: Sequence[int] = MESSAGE_SIZES,
) -> ClusterResult:  # fmt: skip
    """Measures over one setting of the links.

    Args:
        links: latency and bandwidth.
        hosts: how many.
        per_host: ranks on each.
        sizes: bytes of the float32 buffers.
        turns: of every schedule.
        on_event: told of what is measured.
        library: whether the MPI library's own is measured too.
        messages: sizes of the messages that costs are fitted to.

    Raises:
        ConfigError: this machine permits no such cluster.
        LostRankError: a rank was lost.
    """
    picks = [str(pick) for pick in cluster_picks(hosts, per_host)]
    spec = {"sizes": list(sizes), "picks": picks, "turns": turns, "hosts": hosts, "per_host": per_host}
    spec |= {"library": library, "messages": list(messages), "lead_s": LEAD_S + 8e-9 * links.latency_ns}
    events: list[Event] = []

    def take(event: Event) -> None:
        events.append(event)
        on_event(event)

    with Namespaces(hosts=hosts, latency_ns=links.latency_ns, bits_per_s=links.bits_per_s) as cluster:
        run_ranks(cluster, spec, per_host=per_host, on_event=take)
        shaped_by = cluster.shaped_by
    measured = next(event for event in events if event["kind"] == "profile")
    rows = [row for event in events if event["kind"] == "size" for row in _rows(event, measured["profile"], spec)]
    return ClusterResult(
        links=links, hosts=hosts, per_host=per_host, shaped_by=shaped_by, profile=measured["profile"],
        points=measured["points"], rows=rows,
    )  # fmt: skip


def cut_cluster(
    links: Links, *, hosts: int, per_host: int, num_bytes: int, after_s: float, timeout_s: float
) -> tuple[str, float]:
    """Sums without end, cuts the last host's cable, and returns the error of a rank beside the cut, and after how long.

    Raises:
        LostRankError: no rank said anything.
    """
    spec = {"endless": num_bytes, "timeout_s": timeout_s}
    told: list[tuple[Event, float]] = []
    cut_at: list[float] = []
    with Namespaces(hosts=hosts, latency_ns=links.latency_ns, bits_per_s=links.bits_per_s) as cluster:

        def cut() -> None:
            cut_at.append(time.monotonic())
            cluster.cut(hosts - 1)

        def take(event: Event) -> None:
            if event["kind"] == "running":
                threading.Timer(after_s, cut).start()
            if event["kind"] == "lost":
                told.append((event, time.monotonic()))
            if told and time.monotonic() > told[0][1] + GRACE_S:
                raise _EnoughError

        with contextlib.suppress(_EnoughError):
            run_ranks(cluster, spec, per_host=per_host, on_event=take)
    if not told or not cut_at:
        raise LostRankError("the ranks ended without an error after their cable was cut")
    event, at = told[nearest_report([event["message"] for event, _ in told], [event["rank"] for event, _ in told])]
    return event["message"], at - cut_at[0]


def nearest_report(messages: Sequence[str], ranks: Sequence[int]) -> int:
    """Which of the waiting ranks' messages is of one that waits for a rank that has said nothing; else the first.

    Who is far from the trouble waits for ranks that wait themselves.

    >>> nearest_report(["rank 0 on a waited for rank 1 on b", "rank 1 on b waited for rank 2 on c"], [0, 1])
    1
    """
    awaited = [{int(number) for number in re.findall(r"rank (\d+)", text.rpartition(" for ")[2])} for text in messages]
    silent = [place for place, others in enumerate(awaited) if others and others.isdisjoint(ranks)]
    return silent[0] if silent else 0


class _EnoughError(Exception):
    """What was waited for has come."""


def run_ranks(cluster: Namespaces, spec: dict[str, Any], *, per_host: int, on_event: Callable[[Event], None]) -> None:
    """Runs this module's program on every rank of a cluster, and leaves none behind.

    Raises:
        RanksFailed: with the ranks' last lines.
    """
    program = [sys.executable, "-m", "mpi4py", "-m", "windlass.bench.cluster", "--spec", json.dumps(spec)]
    run_and_listen(cluster.mpiexec(per_host, program), on_event=on_event, limit_s=LIMIT_S)


def _rows(event: Event, profile: dict[str, Any], spec: dict[str, Any]) -> list[ClusterRow]:
    return [
        ClusterRow(
            num_bytes=event["num_bytes"],
            by=by,
            predicted_s=_predicted(by, event["num_bytes"], profile, spec),
            measured_s=statistics.median(samples),
            low_s=min(samples),
            high_s=max(samples),
        )
        for by, samples in event["seconds"].items()
    ]


def _predicted(by: str, num_bytes: int, profile: dict[str, Any], spec: dict[str, Any]) -> float:
    from windlass.simulation.collective_time import schedule_time_ns

    if by in (LIBRARY, SHARED):
        return 0.0
    topology = switch_topology(spec["hosts"], spec["per_host"])
    schedule = Pick.parse(by).schedule(topology.size, topology.hosts)
    return schedule_time_ns(schedule, num_bytes, profile_from_mapping(profile), topology) / 1e9


def results_to_json(results: Sequence[ClusterResult], machine: dict[str, Any]) -> str:
    """Results with the machine, as JSON."""
    return json.dumps({"machine": machine, "results": [asdict(result) for result in results]}, indent=1) + "\n"


# --- a rank -------------------------------------------------------------------------------------------------


def _rank_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    spec = json.loads(parser.parse_args(arguments).spec)
    from mpi4py import MPI

    from windlass.engine.collectives import Collectives

    collectives = Collectives(MPI.COMM_WORLD, crowded=True)
    if "endless" in spec:
        collectives.allreduce(*_buffers(spec["endless"]), pick=Pick("ring"))  # ranks begin when they can
        hurried = Collectives(MPI.COMM_WORLD, timeout_s=spec["timeout_s"], crowded=True)
        return _sum_without_end(hurried, spec["endless"])
    _measure(MPI.COMM_WORLD, collectives, spec)
    return 0


def _measure(comm: Any, collectives: Any, spec: dict[str, Any]) -> None:
    from windlass.tuning.collective_measure import POLITE_SPINS, time_turns

    say = tell if collectives.rank == 0 else lambda event: None

    def on_point(pair_class: str, num_bytes: int) -> None:
        say({"kind": "point", "pair_class": pair_class, "num_bytes": num_bytes})

    measured = measure_profile(comm, collectives.hosts, sizes=spec["messages"], cut=NETWORK_SEGMENT, on_point=on_point)
    say({"kind": "profile", "profile": measured.profile.to_mapping(), "points": measured.points})
    for num_bytes in spec["sizes"]:
        send, receive = _buffers(num_bytes)

        def action(name: str, send: Any = send, receive: Any = receive) -> Callable[[], object]:
            pick = replace(Pick.parse(name), segment_bytes=NETWORK_SEGMENT)
            return lambda: collectives.allreduce(send, receive, pick=pick)

        rivals = {name: action(name) for name in (*spec["picks"], *([LIBRARY] if spec["library"] else []))}
        seconds = time_turns(comm, rivals, turns=spec["turns"], spins=POLITE_SPINS, lead_s=spec["lead_s"])
        say({"kind": "size", "num_bytes": num_bytes, "seconds": seconds})


def _sum_without_end(collectives: Any, num_bytes: int) -> int:
    send, receive = _buffers(num_bytes)
    if collectives.rank == 0:
        tell({"kind": "running"})
    try:
        while True:
            collectives.allreduce(send, receive, pick=Pick("ring"))
    except LostRankError as error:
        tell({"kind": "lost", "rank": collectives.rank, "message": str(error)})
        for _ in range(100):  # others have more to say; the launcher ends all
            time.sleep(0.1)
            tell({"kind": "waiting"})
        os._exit(LostRankError.exit_code)


def _buffers(num_bytes: int) -> tuple[Any, Any]:
    import numpy as np

    send = np.ones(max(1, num_bytes // 4), dtype=np.float32)
    return send, np.empty_like(send)


def check_setting(*, hosts: int, per_host: int, turns: int) -> None:
    """Refuses what is no cluster.

    Raises:
        ConfigError: names the option.
    """
    for option, value, lowest in (("--hosts", hosts, 2), ("--ranks-per-host", per_host, 1), ("--turns", turns, 1)):
        if value < lowest:
            raise ConfigError(f"{option}: needs a number of at least {lowest}, got {value}")


if __name__ == "__main__":
    sys.exit(_rank_main(sys.argv[1:]))
