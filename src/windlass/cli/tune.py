"""``windlass tune``: the algorithm of every convolution of a network, and why."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from windlass.errors import ConfigError
from windlass.networks import check_network_name
from windlass.plan.convolution import ACCURACIES
from windlass.tuning.results import TUNES, Settings

TUNE_HELP = (
    "How convolutions get their algorithms: " + "; ".join(f"{name}: {what}" for name, what in TUNES.items()) + "."
)
ACCURACY_HELP = f"How much an algorithm may round: {', '.join(ACCURACIES)}."
WORKSPACE_HELP = "Scratch memory that an algorithm may take, MiB per thread."
PATIENCE_S = 2.0
"""A bar is shown for what takes longer."""


def tune_command(
    network: Annotated[str, typer.Argument(help="Built-in name, or package.module:function.")],
    batch: Annotated[int, typer.Option(help="Samples of a step on one worker.")] = 8,
    image_size: Annotated[int | None, typer.Option(help="Side of the input; default the network's own.")] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of the input; default the network's own.")] = None,
    layout: Annotated[str, typer.Option(help="channels_last or contiguous.")] = "channels_last",
    threads: Annotated[int, typer.Option(help="Threads of the worker; 0: all cores.")] = 0,
    accuracy: Annotated[str, typer.Option(help=ACCURACY_HELP)] = "standard",
    tune: Annotated[str, typer.Option(help=TUNE_HELP)] = "measure",
    workspace_mb: Annotated[int, typer.Option(help=WORKSPACE_HELP)] = 64,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="network_args.KEY=VALUE of the network's constructor.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything known as JSON.")] = False,
) -> None:
    """Choose the algorithm of every convolution of a network, beside PyTorch's own."""
    wish = Settings(tune=tune, accuracy=accuracy, workspace_mb=workspace_mb)
    if layout not in ("channels_last", "contiguous"):
        raise ConfigError(f"--layout: needs channels_last or contiguous, got {layout!r}")
    for option, value, lowest in (("--batch", batch, 1), ("--threads", threads, 0)):
        if value < lowest:
            raise ConfigError(f"{option}: needs a number of at least {lowest}, got {value}")
    check_network_name(network)
    keep_memory_as_in_training()

    import torch

    from windlass.cli.inspect import build_and_capture
    from windlass.engine.launch import num_cores
    from windlass.tuning.convolution import make_tuner
    from windlass.tuning.network import tune_network

    module, graph = build_and_capture(
        network, batch=batch, classes=None, channels=channels, size=image_size, settings=settings or []
    )
    threads = threads or num_cores()
    torch.set_num_threads(threads)
    with TuningBar() as bar:
        tuner = make_tuner(wish, threads=threads, on_event=bar.handle)
        found = tune_network(graph, module, layout=layout, tuner=tuner)  # type: ignore[arg-type]
    if json_output:
        head = {"network": network, "input_shape": list(graph.input_shape), "layout": layout}
        print(json.dumps(head | found.to_mapping(), ensure_ascii=False))
        return
    shape = "×".join(map(str, graph.input_shape))
    machine = tuner.machine
    print(f"{network}, input {shape}, {layout}, {threads} thread(s), accuracy {accuracy}, tune {tune}")
    print(f"measured peaks: {machine.peak_flops / 1e9:.0f} GFLOP/s, {machine.bytes_per_s / 1e9:.0f} GB/s")
    print(found)


def keep_memory_as_in_training() -> None:
    """What the ranks of a run do with freed memory, so that what is measured here is what happens there."""
    from windlass.engine.memory import ask_for_huge_pages, keep_freed_memory

    ask_for_huge_pages()
    keep_freed_memory()


class TuningBar:
    """A bar on stderr while convolutions are measured, once that has taken two seconds; warnings as lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("measuring {task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=None)
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            self._progress.stop()

    def handle(self, event: dict[str, Any]) -> None:
        """Shows one event of the chooser."""
        if event["kind"] == "warning":
            print(f"windlass: {event['message']}", file=sys.stderr, flush=True)
        if event["kind"] != "tuning":
            return
        if not self._shown and time.monotonic() - self._began > PATIENCE_S:
            self._progress.start()
            self._shown = True
        description = f"{event['layer']}, {event['direction']}"
        self._progress.update(self._task, description=description, completed=event["done"], total=event["total"])
