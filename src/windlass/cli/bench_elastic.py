"""``windlass bench elastic``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.engine.launch import num_cores
from windlass.errors import ConfigError, unknown
from windlass.networks import NETWORKS
from windlass.runs.files import write_atomically

if TYPE_CHECKING:
    from windlass.bench.elastic import Loss


def bench_elastic_command(
    network: Annotated[str, typer.Option(help="Built-in name; trained on digits.")] = "lenet5",
    workers: Annotated[int, typer.Option(help="Ranks on this host.")] = 3,
    kills: Annotated[int, typer.Option(help="How many ranks are killed, one after the other.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """A killed rank: how soon the others notice and go on, beside torchrun's restart from a checkpoint."""
    from windlass.bench.elastic import CHECKPOINT_STEPS, bench_elastic, rows_to_json
    from windlass.cli.bench import _check_json, _versions
    from windlass.runs.folder import describe_machine

    if network not in NETWORKS:
        raise ConfigError(f"--network: {unknown('network', network, NETWORKS)}")
    if kills < 1:
        raise ConfigError(f"--kills: needs at least 1, got {kills}")
    if workers <= kills:
        raise ConfigError(f"--workers: after {kills} kills one must be left, so at least {kills + 1}, got {workers}")
    _check_json(json_path)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=2 * kills)

        def on_loss(loss: Loss) -> None:
            progress.update(task, advance=1, description=f"{loss.by}: next step after {loss.next_step_s:.2f} s")

        rows, losses = bench_elastic(network=network, workers=workers, kills=kills, on_loss=on_loss)
    machine = describe_machine(hosts=[], threads=1, versions=_versions())
    print(f"{machine['cpu']}, {num_cores()} cores, PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    print(
        f"{network} on digits, {workers} workers, {kills} kills; torchrun with Gloo and a checkpoint every "
        f"{CHECKPOINT_STEPS} steps; seconds from the kill, median (worst)"
    )
    print("| | noticed | next step complete | complete steps done again | processes started |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.by} | {row.noticed_s:.3f} ({row.worst_noticed_s:.3f}) | {row.next_step_s:.3f} "
            f"({row.worst_next_step_s:.3f}) | {row.steps_again:g} | {row.new_processes:g} |"
        )
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, losses, machine))
