"""Training under each placement beside PyTorch's DDP over Gloo, in turns, in the same ranks.

On this host, or with links of chosen bandwidth on hosts that are network namespaces (`engine.namespaces`), one rank
on each.  `windlass.bench.parallel_ways` has the rivals, `windlass.bench.parallel_rank` a rank.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from windlass.bench.allreduce import quartiles
from windlass.bench.cluster import Links
from windlass.engine.launch import Launcher, threads_per_rank
from windlass.engine.listen import run_and_listen
from windlass.engine.namespaces import Namespaces
from windlass.engine.wire import CARD
from windlass.errors import ConfigError, unknown
from windlass.plan.placements import BUILDERS
from windlass.plan.sizes import parse_bits_per_s, parse_ns

DDP = "ddp"
"""The rival."""
PROGRAM = "windlass.bench.parallel_rank"
LIMIT_S = 4 * 3600.0
LATENCY_NS = 100_000
"""Of a link whose latency nobody names: that of a switched Ethernet with TCP on it."""
SAMPLES_KEPT = 5

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained.

    Attributes:
        network: a built-in network.
        batch: samples a worker and step.
        image_size, channels, classes: of the made-up samples.
        network_args: of the network's constructor.
        ways: placements by name.
        turns, steps: of each rival, and of a turn.
        layout: of images and weights in memory.
        seed: of the weights.
    """

    network: str
    batch: int
    image_size: int
    channels: int
    classes: int
    ways: tuple[str, ...]
    turns: int
    steps: int
    layout: str = "contiguous"
    seed: int = 0
    network_args: dict[str, Any] = field(default_factory=dict)

    def rivals(self) -> tuple[str, ...]:
        """All that is measured."""
        return (*self.ways, DDP)


@dataclass(frozen=True, kw_only=True)
class ParallelRow:
    """One rival on so many workers; bytes and seconds are of a step, at the worker that has most of them.

    Attributes:
        workers, way: how many, and the placement or ``ddp``.
        images_per_s: of all workers together, by the median step.
        seconds, low_s, high_s: of a step: median and quartiles over the turns.
        times_ddp: how many times as fast as DDP, median over the turns.
        sent, predicted_sent: bytes sent, counted and predicted; None: not counted.
        head_sent, predicted_head_sent: of these for fully connected layers.
        wire: bytes that left the host's card; None: no links.
        peak, predicted_peak: most bytes of tensors.
        exposed_s: in calls that move data to other workers or wait for them; None: not known.
        losses: of all workers' samples, step by step.
    """

    workers: int
    way: str
    images_per_s: float
    seconds: float
    low_s: float
    high_s: float
    times_ddp: float
    sent: float | None
    predicted_sent: int | None
    head_sent: float | None
    predicted_head_sent: int | None
    wire: float | None
    peak: int
    predicted_peak: int | None
    exposed_s: float | None
    losses: tuple[float, ...]


def bench_parallel(
    training: Training, workers: int, *, links: Links | None, on_event: Callable[[Event], None]
) -> list[ParallelRow]:
    """Measures one number of workers.

    Args:
        training: what is trained.
        workers: how many.
        links: between them; None: all are on this host.
        on_event: told of every turn.

    Raises:
        ConfigError: a placement does not fit, or this machine permits no such links.
        LostRankError: a rank was lost.
    """
    events: list[Event] = []

    def take(event: Event) -> None:
        events.append(event)
        on_event(event)

    spec = asdict(training) | {"ways": training.rivals()}
    if links is None:
        _run_here(spec, workers, take)
    else:
        _run_apart(spec, workers, links, take)
    return rows_of(events, training, workers)


def _run_here(spec: dict[str, Any], workers: int, take: Callable[[Event], None]) -> None:
    from windlass.train import raise_outcome

    threads = threads_per_rank(workers)
    launcher = Launcher(
        PROGRAM, ["--spec", json.dumps(spec | {"threads": threads})], num_ranks=workers, threads=threads, stall_s=600,
        on_event=take,
    )  # fmt: skip
    raise_outcome(launcher.run())


def _run_apart(spec: dict[str, Any], workers: int, links: Links, take: Callable[[Event], None]) -> None:
    threads = threads_per_rank(workers)
    with Namespaces(hosts=workers, latency_ns=links.latency_ns, bits_per_s=links.bits_per_s) as cluster:
        take({"kind": "links", "shaped_by": cluster.shaped_by})
        spec = spec | {"threads": threads, "card": CARD, "master": cluster.addresses[0]}
        program = [sys.executable, "-m", "mpi4py", "-m", PROGRAM, "--spec", json.dumps(spec)]
        environment = {"OMP_NUM_THREADS": str(threads)}
        run_and_listen(cluster.mpiexec(1, program), on_event=take, limit_s=LIMIT_S, environment=environment)


# --- rows ---------------------------------------------------------------------------------------------------


def rows_of(events: Sequence[Event], training: Training, workers: int) -> list[ParallelRow]:
    """The rows of what the ranks have said."""
    expected = next(event["ranks"] for event in events if event["kind"] == "expected")
    turns = {way: [event["ranks"] for event in events if event.get("way") == way] for way in training.rivals()}
    times = {way: [max(rank["seconds"] for rank in turn) for turn in found] for way, found in turns.items()}
    return [_row(way, turns[way], times, [rank[way] for rank in expected], training, workers) for way in turns]


def _row(
    way: str, turns: Sequence[Sequence[dict[str, Any]]], times: dict[str, list[float]],
    expected: Sequence[dict[str, Any]], training: Training, workers: int,
) -> ParallelRow:  # fmt: skip
    low, middle, high = quartiles(times[way])

    def most(name: str) -> Any:
        """The median over the turns of the worker that has most."""
        found = [max(rank[name] for rank in turn) for turn in turns if turn[0][name] is not None]
        return statistics.median(found) if found else None

    def foreseen(name: str) -> Any:
        return max((rank[name] for rank in expected), default=0) if expected[0][name] is not None else None

    ratios = [theirs / ours for theirs, ours in zip(times[DDP], times[way], strict=True)]
    losses = [sum(parts) for parts in zip(*(rank["losses"] for rank in turns[0]), strict=True)]
    return ParallelRow(
        workers=workers,
        way=way,
        images_per_s=training.batch * workers / middle,
        seconds=middle,
        low_s=low,
        high_s=high,
        times_ddp=statistics.median(ratios),
        sent=most("sent"),
        predicted_sent=foreseen("sent"),
        head_sent=most("head_sent"),
        predicted_head_sent=foreseen("head_sent"),
        wire=most("wire"),
        peak=max(rank["peak"] for rank in turns[0]),
        predicted_peak=foreseen("peak"),
        exposed_s=most("exposed_s"),
        losses=tuple(losses[:SAMPLES_KEPT]),
    )


def rows_to_json(
    rows: Sequence[ParallelRow], training: Training, machine: dict[str, Any], *, links: Links | None, shaped_by: str
) -> str:
    """The results with the machine, as JSON."""
    setting = {"training": asdict(training), "links": links and asdict(links), "shaped_by": shaped_by}
    return json.dumps({"machine": machine, **setting, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


# --- options ------------------------------------------------------------------------------------------------


def parse_ways(text: str) -> tuple[str, ...]:
    """Placements from a comma-separated list.

    >>> parse_ways("data, hybrid:b")
    ('data', 'hybrid:b')
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in BUILDERS:
            raise ConfigError(f"--ways: {unknown('placement', name, BUILDERS)}")
    if not names:
        raise ConfigError(f"--ways: needs some of {', '.join(BUILDERS)}")
    return names


def parse_link(text: str) -> Links:
    """A link from bandwidth and, after a comma, latency.

    >>> parse_link("1Gbit,50us")
    Links(latency_ns=50000, bits_per_s=1000000000)
    """
    bandwidth, comma, latency = text.partition(",")
    try:
        return Links(latency_ns=parse_ns(latency) if comma else LATENCY_NS, bits_per_s=parse_bits_per_s(bandwidth))
    except ConfigError as error:
        raise ConfigError(f"--link {text}: {error}") from None


def parse_workers(text: str) -> tuple[int, ...]:
    """Numbers of workers from a comma-separated list.

    >>> parse_workers("2,4")
    (2, 4)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise ConfigError(f"--workers: needs whole numbers of at least 2, comma-separated, got {text!r}")
    return tuple(int(part) for part in parts)
