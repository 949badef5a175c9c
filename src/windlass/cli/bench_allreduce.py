"""``windlass bench allreduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.errors import ConfigError
from windlass.plan.pick import ALLREDUCE_NAMES
from windlass.plan.sizes import format_bytes, size_range
from windlass.runs.files import write_atomically

ON_ONE_HOST = ",".join(name for name in ALLREDUCE_NAMES if name != "hierarchical")


def bench_allreduce_command(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks on this host, comma-separated.")] = "2,4",
    sizes: Annotated[str, typer.Option(help="Sizes of buffers: a range by powers of four, or a list.")] = "1KiB..64MiB",
    algorithms: Annotated[str, typer.Option(help="What to measure beside Gloo and what is chosen.")] = ON_ONE_HOST,
    turns: Annotated[int, typer.Option(help="Turns of each; medians are over them.")] = 9,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Allreduce by every schedule, the MPI library and Gloo through PyTorch, in turns, in the same ranks."""
    from windlass.bench.allreduce import bench_allreduce, check_algorithms, rows_to_json
    from windlass.bench.convplot import check_plot_path
    from windlass.cli.bench import _check_json, _versions
    from windlass.runs.folder import describe_machine

    numbers = _numbers(ranks)
    buffers = size_range(sizes)
    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    check_algorithms(names)
    if turns < 1:
        raise ConfigError(f"--turns: needs at least 1, got {turns}")
    _check_json(json_path)
    if plot is not None:
        check_plot_path(plot)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=len(numbers) * len(buffers))

        def on_event(event: dict[str, Any]) -> None:
            what = f"{event['ranks']} ranks, {format_bytes(event['num_bytes'])}"
            progress.update(task, advance=1, description=what)

        rows = bench_allreduce(numbers, buffers, algorithms=names, turns=turns, on_event=on_event)
    machine = describe_machine(hosts=[], threads=1, versions=_versions())
    print(f"{machine['cpu']}, PyTorch {machine['torch']}, commit {machine['commit'] or '?'}, {turns} turns, float32")
    for number in numbers:
        print(f"\n{number} ranks, µs a call at the slowest rank (times as fast as Gloo, as the library)\n")
        for line in _table([row for row in rows if row.ranks == number]):
            print(line)
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, machine))
    if plot is not None:
        from windlass.bench.allreduceplot import draw_allreduce

        draw_allreduce(rows, plot, title=f"Allreduce, {machine['cpu']}, one host")


def _table(rows: list[Any]) -> list[str]:
    names = list(dict.fromkeys(row.by for row in rows))
    lines = ["| buffer | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for num_bytes in sorted({row.num_bytes for row in rows}):
        cells = [_cell(row) for name in names for row in rows if (row.by, row.num_bytes) == (name, num_bytes)]
        lines.append(f"| {format_bytes(num_bytes)} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Any) -> str:
    number = f"{1e6 * row.seconds:,.1f}"
    if row.by != "chosen":
        return number
    return f"{number} {row.picked} ({row.times_gloo:.1f}, {row.times_library:.2f})"


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) >= 2 for part in parts):
        raise ConfigError(f"--ranks: needs whole numbers of at least 2, comma-separated, got {text!r}")
    return [int(part) for part in parts]
