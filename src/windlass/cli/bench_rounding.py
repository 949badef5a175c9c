"""``windlass bench rounding``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.errors import ConfigError
from windlass.runs.files import write_atomically


def bench_rounding_command(
    elements: Annotated[str, typer.Option(help="Of a tensor; K, M and G are powers of 1024.")] = "16M",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    turns: Annotated[int, typer.Option(help="Turns of each way; medians are over them.")] = 15,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Rounding to 16 bits beside QPyTorch, torchao and a copy, in turns, in one process."""
    from windlass.bench.rounding import FORMAT, bench_rounding, parse_elements, rows_to_json
    from windlass.cli.bench import _check_json, _versions
    from windlass.engine.launch import num_cores
    from windlass.runs.folder import describe_machine

    count = parse_elements(elements)
    for option, value, least in (("--turns", turns, 1), ("--threads", threads, 0)):
        if value < least:
            raise ConfigError(f"{option}: needs at least {least}, got {value}")
    _check_json(json_path)

    import torch

    threads = threads or num_cores()
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=None)

        def on_turn(what: str) -> None:
            progress.update(task, description=what)

        rows, notes = bench_rounding(count, turns=turns, on_turn=on_turn)
    machine = describe_machine(hosts=[], threads=threads, versions=_versions())
    print(f"{machine['cpu']}, {threads} thread(s), PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    print(f"{count:,} elements, {FORMAT} where nothing else is said, {turns} turns")
    for note in notes:
        print(note)
    print("| | ms (quartiles) | G elements/s | GB/s | of the copy | times QPyTorch |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        times = "" if row.times_qpytorch is None else f"{row.times_qpytorch:.1f}"
        print(
            f"| {row.by} | {1e3 * row.seconds:.2f} ({1e3 * row.low_s:.2f}–{1e3 * row.high_s:.2f}) | "
            f"{row.elements_per_s / 1e9:.2f} | {row.bytes_per_s / 1e9:.1f} | {100 * row.of_copy:.0f} % | {times} |"
        )
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, machine, elements=count, notes=notes))
