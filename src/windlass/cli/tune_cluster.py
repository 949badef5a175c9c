"""``windlass tune``: a network's convolutions, or with ``windlass tune cluster`` the allreduce of these ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from typer.core import TyperGroup

from windlass.cli.tune import tune_command
from windlass.errors import ConfigError
from windlass.plan.sizes import format_bytes, size_range
from windlass.runs.files import write_atomically

NETWORK = "network"
LIMIT_S = 600.0


class _NetworkByDefault(TyperGroup):
    """``windlass tune NETWORK`` is ``windlass tune network NETWORK``; a network has no name like a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the command's name before what is none."""
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = [NETWORK, *args]
        return super().parse_args(ctx, args)


tune_app = typer.Typer(
    cls=_NetworkByDefault,
    help="Choose by measuring: the algorithms of a network's convolutions, or of these ranks' allreduce.\n\n"
    "windlass tune NETWORK [OPTIONS] is short for windlass tune network NETWORK [OPTIONS].",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tune_app.command(NETWORK)(tune_command)


@tune_app.command("cluster")
def tune_cluster_command(
    ranks: Annotated[int, typer.Option(help="Ranks to start; 0: the slots of --hosts, or a rank for each core.")] = 0,
    hosts: Annotated[Path | None, typer.Option(help="A hostfile of mpiexec; default this host alone.")] = None,
    sizes: Annotated[str, typer.Option(help="Sizes of buffers: a range by powers of four, or a list.")] = "1KiB..64MiB",
    turns: Annotated[int, typer.Option(help="Turns of each; medians are over them.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None,
) -> None:
    """Measure what messages cost and which allreduce is fastest at each size, and keep the table for plans.

    Under mpiexec or srun it measures the ranks that are there.
    """
    from windlass.cli.bench import _check_json
    from windlass.engine.world import world_from_environment

    buffers = size_range(sizes)
    if turns < 1:
        raise ConfigError(f"--turns: needs at least 1, got {turns}")
    _check_json(json_path)
    present = world_from_environment()
    if present is not None and (ranks or hosts):
        raise ConfigError("--ranks and --hosts: under mpiexec or srun the ranks are those that are there")
    events: list[dict[str, Any]] = []
    console = Console(stderr=True)
    quiet = not console.is_terminal or (present is not None and present[0] > 0)
    with Progress(console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("starting", total=None)

        def on_event(event: dict[str, Any]) -> None:
            events.append(event)
            if event["kind"] == "point":
                where = {"host": "within a host", "network": "between hosts"}[event["pair_class"]]
                what = f"messages of {format_bytes(event['num_bytes'])} {where}"
                progress.update(task, description=what)
            elif event["kind"] == "profile":
                progress.update(task, description="allreduce", total=len(buffers), completed=0)
            elif event["kind"] == "size":
                progress.update(task, advance=1, description=f"allreduce of {format_bytes(event['num_bytes'])}")

        if present is not None:
            _here(buffers, turns, on_event)
        else:
            _started(ranks, hosts, buffers, turns, on_event)
    if events:
        _print(events)
        if json_path is not None:
            write_atomically(json_path, json.dumps({"events": [e for e in events if e["kind"] != "point"]}) + "\n")


def _here(buffers: list[int], turns: int, on_event: Any) -> None:
    from mpi4py import MPI

    from windlass.tuning.cluster import tune_and_tell

    if MPI.COMM_WORLD.Get_size() < 2:
        raise ConfigError("tune cluster needs at least 2 ranks, got 1")
    tune_and_tell(MPI.COMM_WORLD, buffers, turns=turns, on_event=on_event)


def _started(ranks: int, hosts: Path | None, buffers: list[int], turns: int, on_event: Any) -> None:
    from windlass.engine.launch import mpiexec_command, num_cores
    from windlass.engine.listen import run_and_listen

    number = ranks or (count_slots(hosts) if hosts is not None else max(2, num_cores()))
    if number < 2:
        raise ConfigError(f"--ranks: needs at least 2, got {number}")
    spec = json.dumps({"sizes": buffers, "turns": turns})
    command = mpiexec_command(number, ["-m", "windlass.tuning.cluster", spec])
    if hosts is not None:
        count_slots(hosts)
        command[1:1] = ["--hostfile", str(hosts)]
    run_and_listen(command, on_event=on_event, limit_s=LIMIT_S)


def count_slots(hostfile: Path) -> int:
    """The slots of a hostfile, ``slots=N`` on a host's line or else 1.

    Raises:
        ConfigError: it cannot be read, or names no host.
    """
    try:
        lines = [line.partition("#")[0].split() for line in hostfile.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hosts {hostfile}: cannot be read: {error}") from error
    found = [
        next((word.partition("=")[2] for word in line[1:] if word.startswith("slots=")), "1") for line in lines if line
    ]
    if not found or not all(number.isdigit() for number in found):
        raise ConfigError(f"--hosts {hostfile}: needs lines like: node1 slots=4")
    return sum(map(int, found))


def _print(events: list[dict[str, Any]]) -> None:
    profile = next(event for event in events if event["kind"] == "profile")
    table = next(event for event in events if event["kind"] == "table")
    print(profile["profile"]["source"] + (f" ({table['topology']})" if table["topology"] else ""))
    for pair_class in profile["points"]:
        cost = profile["profile"][pair_class]
        first, last = cost["segments"][0], cost["segments"][-1]
        name = {"host": "same host", "network": "other host"}[pair_class]
        rate = f"{1e3 / last['ps_per_byte']:.2f} GB/s" if last["ps_per_byte"] else "bandwidth not seen"
        latency_us = (first["alpha_ns"] + 2 * cost["overhead_ns"]) / 1e3
        overhead_us = cost["overhead_ns"] / 1e3
        print(f"{name}: latency {latency_us:.1f} µs, {rate}, overhead {overhead_us:.1f} µs a message on each side")
    gamma = profile["profile"]["gamma_ps_per_byte"]
    print(f"adding: {1e3 / max(gamma, 1):.1f} GB/s\n")
    print("| buffer | chosen | measured µs | predicted µs | runner-up | µs |\n|---|---|---|---|---|---|")
    for event in events:
        if event["kind"] == "size":
            predicted = f"{1e6 * event['predicted_s']:,.1f}" if event["predicted_s"] else ""
            cut = f", segments of {format_bytes(event['segment_bytes'])}" if event["segment_bytes"] else ""
            print(
                f"| {format_bytes(event['num_bytes'])} | {event['chosen']}{cut} | {1e6 * event['measured_s']:,.1f} "
                f"| {predicted} | {event['runner_up']} | {1e6 * event['runner_up_s']:,.1f} |"
            )
    print(f"\nkept in {table['path']}" if table["path"] else "\nnot kept: hosts have different numbers of ranks")
