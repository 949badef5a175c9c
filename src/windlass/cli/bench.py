"""``windlass bench``: claims, made by measuring beside the rival in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.engine.launch import num_cores
from windlass.errors import ConfigError
from windlass.runs.files import write_atomically

app = typer.Typer(help="Measure Windlass beside its rivals.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench_group() -> None:
    """Measure Windlass beside its rivals, interleaved in one run."""


@app.command("train")
def bench_train_command(
    networks: Annotated[str, typer.Option(help="Names, comma-separated.")] = "lenet5,resnet18",
    workers: Annotated[int, typer.Option(help="Ranks on this host.")] = 2,
    turns: Annotated[int, typer.Option(help="Turns of each rival; medians are over them.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Data-parallel training beside PyTorch DDP over Gloo, in turns, in the same processes."""
    from windlass.bench.train import bench_train, rows_to_json
    from windlass.runs.folder import describe_machine

    if workers < 2:
        raise ConfigError(f"--workers: DDP needs at least 2, got {workers}")
    if turns < 1:
        raise ConfigError(f"--turns: needs at least 1, got {turns}")
    if json_path is not None and not json_path.parent.is_dir():
        raise ConfigError(f"--json {json_path}: there is no folder {json_path.parent}")
    names = [name.strip() for name in networks.split(",") if name.strip()]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=2 * turns * len(names))

        def on_turn(event: dict[str, Any]) -> None:
            progress.update(task, advance=1, description=f"{event['network']}, turn {event['turn'] + 1}")

        rows = bench_train(names, workers=workers, turns=turns, on_turn=on_turn)
    machine = describe_machine(hosts=[], threads=rows[0].threads, versions=_versions())
    print(f"{machine['cpu']}, {num_cores()} cores, PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    print("| network | workers | batch | Windlass, images/s | DDP with Gloo, images/s | ratio (quartiles) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.network} | {row.workers} × {row.threads} thread(s) | {row.batch} | "
            f"{row.windlass_images_per_s:,.0f} | {row.ddp_images_per_s:,.0f} | "
            f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f}) |"
        )
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, machine))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": version("torch"), "mpi4py": version("mpi4py"), "windlass": version("windlass")}
