"""``windlass bench ddp``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.errors import ConfigError, unknown
from windlass.networks import NETWORKS
from windlass.runs.files import write_atomically


def bench_ddp_command(
    network: Annotated[str, typer.Option(help="Built-in name.")] = "resnet18",
    workers: Annotated[int, typer.Option(help="Ranks on this host.")] = 2,
    batch: Annotated[int, typer.Option(help="Images of a rank and step.")] = 32,
    image_size: Annotated[int, typer.Option(help="Side of the images.")] = 32,
    turns: Annotated[int, typer.Option(help="Turns of each backend; medians are over them.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps of a turn.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """PyTorch's DDP on the backend windlass beside gloo, in turns, in the same ranks."""
    from windlass.bench.ddp import bench_ddp, rows_to_json
    from windlass.cli.bench import _check_json, _versions
    from windlass.runs.folder import describe_machine

    if network not in NETWORKS:
        raise ConfigError(f"--network: {unknown('network', network, NETWORKS)}")
    lowest = {"--workers": (workers, 2), "--batch": (batch, 1), "--image-size": (image_size, 1),
              "--turns": (turns, 1), "--steps": (steps, 1)}  # fmt: skip
    for option, (value, least) in lowest.items():
        if value < least:
            raise ConfigError(f"{option}: needs at least {least}, got {value}")
    _check_json(json_path)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=2 * turns)

        def on_event(event: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=f"{event['backend']}, turn {event['turn'] + 1}")

        rows = bench_ddp(
            network, workers=workers, batch=batch, image_size=image_size, turns=turns, steps=steps, on_event=on_event
        )
    machine = describe_machine(hosts=[], threads=1, versions=_versions())
    print(f"{machine['cpu']}, PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    print(f"{network}, {workers} ranks, {batch} images of {image_size}² each, {turns} turns of {steps} steps")
    print("| backend | ms a step (quartiles) | times Gloo | first losses |")
    print("|---|---|---|---|")
    for row in rows:
        losses = " ".join(f"{loss:.6f}" for loss in row.losses)
        print(
            f"| {row.backend} | {1e3 * row.seconds:.1f} ({1e3 * row.low_s:.1f}–{1e3 * row.high_s:.1f}) | "
            f"{row.times_gloo:.2f} | {losses} |"
        )
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, machine))
