"""``windlass bench parallel``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.config import assignment
from windlass.errors import ConfigError, unknown
from windlass.networks import NETWORKS
from windlass.report.units import num_bytes, plain
from windlass.runs.files import write_atomically

if TYPE_CHECKING:
    from windlass.bench.cluster import Links
    from windlass.bench.parallel import ParallelRow, Training

WAYS = "data,model,hybrid:a,hybrid:b,hybrid:c"
LAYOUTS = ("contiguous", "channels_last")


def bench_parallel_command(
    network: Annotated[str, typer.Option(help="Built-in name.")] = "alexnet",
    workers: Annotated[str, typer.Option(help="Numbers of workers, comma-separated.")] = "2,4",
    batch_per_worker: Annotated[int, typer.Option(help="Images of a worker and step.")] = 128,
    image_size: Annotated[int | None, typer.Option(help="Side of the images; default the network's own.")] = None,
    classes: Annotated[int | None, typer.Option(help="Classes; default the network's own.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="network_args.KEY=VALUE of the network's constructor.")
    ] = None,
    ways: Annotated[str, typer.Option(help="Placements by name, comma-separated; DDP is measured beside them.")] = WAYS,
    turns: Annotated[int, typer.Option(help="Turns of each; medians are over them.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps of a turn, after one to warm up.")] = 2,
    layout: Annotated[str, typer.Option(help="Of images and weights: contiguous or channels_last.")] = "contiguous",
    link: Annotated[
        str | None,
        typer.Option(help="Each worker on a host of its own, behind a cable: 1Gbit, or 1Gbit,50us with latency."),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Training under each placement beside PyTorch DDP over Gloo, in turns, in the same ranks."""
    from windlass.bench.convplot import check_plot_path
    from windlass.bench.parallel import Training, parse_link, parse_ways, parse_workers
    from windlass.cli.bench import _check_json

    if network not in NETWORKS:
        raise ConfigError(f"--network: {unknown('network', network, NETWORKS)}")
    entry = NETWORKS[network]
    size = entry.default_size if image_size is None else image_size
    num_classes = entry.num_classes if classes is None else classes
    lowest = {"--batch-per-worker": (batch_per_worker, 1), "--image-size": (size, entry.min_size),
              "--classes": (num_classes, 1), "--turns": (turns, 1), "--steps": (steps, 1)}  # fmt: skip
    for option, (value, least) in lowest.items():
        if value < least:
            raise ConfigError(f"{option}: needs at least {least}, got {value}")
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout: {unknown('layout', layout, LAYOUTS)}")
    training = Training(
        network=network, batch=batch_per_worker, image_size=size, channels=entry.in_channels, classes=num_classes,
        ways=parse_ways(ways), turns=turns, steps=steps, layout=layout, network_args=_arguments(settings or []),
    )  # fmt: skip
    numbers = parse_workers(workers)
    links = parse_link(link) if link is not None else None
    _check_json(json_path)
    if plot is not None:
        check_plot_path(plot)
    check_fits(training, numbers)
    if links is not None and (trouble := links_trouble(links)):
        print(f"skipped: {trouble}")
        return
    _measure(training, numbers, links, json_path=json_path, plot=plot)


def check_fits(training: Training, numbers: tuple[int, ...]) -> None:
    """Refuses, before any rank starts, a placement that the network cannot take.

    Raises:
        ConfigError: names it.
    """
    from windlass.networks import build_network
    from windlass.parallel.find import find_placement
    from windlass.parallel.trace import trace

    shape = {"in_channels": training.channels, "image_size": training.image_size}
    module = build_network(training.network, num_classes=training.classes, **shape, **training.network_args)
    if callable(getattr(module, "own_loss", None)):
        raise ConfigError(f"--network: {training.network} learns without labels, which DDP's loop here needs")
    for workers in numbers:
        side = training.image_size
        traced = trace(module, (training.batch * workers, training.channels, side, side))
        for name in training.ways:
            find_placement(name, traced.ops, workers=workers, outputs=traced.outputs)


def links_trouble(links: Links) -> str:
    """Why this machine permits no such links; empty: it does."""
    from windlass.engine.namespaces import namespaces_trouble, pick_shaper

    trouble = namespaces_trouble()
    if not trouble:
        try:
            pick_shaper(latency_ns=links.latency_ns)
        except ConfigError as error:
            return str(error)
    return trouble


def _arguments(settings: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for setting in settings:
        mapping = assignment(setting)
        if set(mapping) != {"network_args"} or not isinstance(mapping["network_args"], dict):
            raise ConfigError(f"--set: needs network_args.KEY=VALUE here, got {setting!r}")
        arguments |= mapping["network_args"]
    return arguments


def _measure(
    training: Training, numbers: tuple[int, ...], links: Links | None, *, json_path: Path | None, plot: Path | None
) -> None:
    from windlass.bench.cluster import describe_links
    from windlass.bench.parallel import bench_parallel, rows_to_json
    from windlass.cli.bench import _versions
    from windlass.engine.launch import threads_per_rank
    from windlass.runs.folder import describe_machine

    machine = describe_machine(hosts=[], threads=threads_per_rank(numbers[0]), versions=_versions())
    print(f"{machine['cpu']}, PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    side = training.image_size
    print(
        f"{training.network}, {training.batch} images of {side}² a worker, {training.turns} turns of {training.steps} "
        f"steps, {training.layout}; data is windlass train's own way, gradients averaged in buckets"
    )
    rows: list[ParallelRow] = []
    said: list[str] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        total = training.turns * len(training.rivals()) * len(numbers)
        task = progress.add_task("starting", total=total)

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "turn":
                what = f"{event['workers']} workers, {event['way']}, turn {event['turn'] + 1}"
                progress.update(task, advance=1, description=what)
            elif event["kind"] == "links":
                said.append(event["shaped_by"])

        for workers in numbers:
            progress.update(task, description=f"{workers} workers start")
            rows += bench_parallel(training, workers, links=links, on_event=on_event)
    if links is not None:
        print(f"each worker on a host of its own, {describe_links(links)}; {said[0]}; all share this machine's cores")
    for workers in numbers:
        print(f"\n{workers} workers × {threads_per_rank(workers)} thread(s); bytes and seconds of a step, at most\n")
        for line in table([row for row in rows if row.workers == workers]):
            print(line)
    if json_path is not None:
        shaped_by = said[0] if said else ""
        write_atomically(json_path, rows_to_json(rows, training, machine, links=links, shaped_by=shaped_by))
    if plot is not None:
        from windlass.bench.parallelplot import draw_parallel

        where = "one host" if links is None else describe_links(links)
        draw_parallel(
            rows, plot, title=f"{training.network}, {training.batch} images a worker, {machine['cpu']}, {where}"
        )


def table(rows: list[ParallelRow]) -> list[str]:
    """Lines of a table; counted bytes with the predicted ones in brackets, unless they are the same."""
    has_wire = any(row.wire is not None for row in rows)
    head = ["placement", "images/s", "ms a step (quartiles)", "times DDP", "sent", "for fully connected layers"]
    head += ["through the card"] if has_wire else []
    head += ["memory peak", "exposed communication, ms", "first losses"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row.way,
            f"{row.images_per_s:,.1f}",
            f"{1e3 * row.seconds:,.1f} ({1e3 * row.low_s:,.1f}–{1e3 * row.high_s:,.1f})",
            f"{row.times_ddp:.2f}",
            _both(row.sent, row.predicted_sent),
            _both(row.head_sent, row.predicted_head_sent),
            *([_both(row.wire, None)] if has_wire else []),
            _both(row.peak, row.predicted_peak),
            "" if row.exposed_s is None else f"{1e3 * row.exposed_s:,.1f}",
            " ".join(f"{loss:.5f}" for loss in row.losses[:2]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _both(counted: float | None, predicted: int | None) -> str:
    if counted is None:
        return "" if predicted is None else f"({_size(predicted)})"
    if predicted is None or counted == predicted:
        return _size(counted)
    return f"{_size(counted)} ({_size(predicted)})"


def _size(size: float) -> str:
    return plain(num_bytes(size))
