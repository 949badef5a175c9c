"""``windlass bench``: claims, made by measuring beside the rival in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from windlass.cli.bench_elastic import bench_elastic_command
from windlass.cli.tune import ACCURACY_HELP, TUNE_HELP, WORKSPACE_HELP, keep_memory_as_in_training
from windlass.engine.launch import num_cores
from windlass.errors import ConfigError, unknown
from windlass.networks import NETWORKS
from windlass.plan.convolution import DIRECTIONS, Direction
from windlass.runs.files import write_atomically
from windlass.tuning.results import Settings

app = typer.Typer(help="Measure Windlass beside its rivals.", no_args_is_help=True, rich_markup_mode=None)

app.command("elastic")(bench_elastic_command)


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
    _check_json(json_path)
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


@app.command("conv")
def bench_conv_command(
    network: Annotated[str | None, typer.Option(help="Every distinct convolution of this network.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the network's input; default its own.")] = None,
    kernel_sizes: Annotated[str, typer.Option(help="Sides of filters, comma-separated.")] = "3,5,7,9,11,15,21,31",
    channels: Annotated[int, typer.Option(help="Channels in and out, with --kernel-sizes.")] = 64,
    size: Annotated[int, typer.Option(help="Side of the images, with --kernel-sizes.")] = 56,
    depthwise: Annotated[bool, typer.Option("--depthwise", help="One group per channel.")] = False,
    batch: Annotated[int, typer.Option(help="Images.")] = 8,
    directions: Annotated[str, typer.Option(help="Of forward, input, weight.")] = "forward,input,weight",
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    turns: Annotated[int, typer.Option(help="Turns of each rival; medians are over them.")] = 7,
    accuracy: Annotated[str, typer.Option(help=ACCURACY_HELP)] = "standard",
    workspace_mb: Annotated[int, typer.Option(help=WORKSPACE_HELP)] = 64,
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Keep freed memory, for all alike, as training does.")
    ] = False,
    details: Annotated[bool, typer.Option("--details", help="A line for every algorithm and rival.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Convolutions by every algorithm beside PyTorch's own and fft-conv-pytorch, in turns, in one process."""
    from windlass.bench import convplot
    from windlass.bench.conv import bench_conv, kernel_cases, network_cases, notes, num_turns, rows_to_json
    from windlass.cli import convtable

    lowest = {"--channels": channels, "--size": size, "--batch": batch, "--turns": turns}
    for option, value in lowest.items():
        if value < 1:
            raise ConfigError(f"{option}: needs at least 1, got {value}")
    if threads < 0:
        raise ConfigError(f"--threads: needs at least 0, got {threads}")
    settings = Settings(accuracy=accuracy, workspace_mb=workspace_mb)
    wanted = _directions(directions)
    _check_json(json_path)
    if plot is not None:
        convplot.check_plot_path(plot)
    if keep_memory:
        keep_memory_as_in_training()
    if network is not None:
        if network not in NETWORKS:
            raise ConfigError(f"--network: {unknown('network', network, NETWORKS)}")
        cases = network_cases(network, batch=batch, size=image_size)
        title = f"{network}, batch {batch}"
    else:
        sides = _sides(kernel_sizes)
        cases = kernel_cases(sides, channels=channels, size=size, batch=batch, depthwise=depthwise)
        title = f"{batch}×{channels}×{size}×{size}" + (", depthwise" if depthwise else f" to {channels} channels")

    import torch

    from windlass.runs.folder import describe_machine
    from windlass.tuning.machine import measure_machine

    threads = threads or num_cores()
    torch.set_num_threads(threads)
    machine = measure_machine(threads=threads)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=num_turns(cases, wanted))

        def on_turn(what: str) -> None:
            progress.update(task, advance=1, description=what)

        rows = bench_conv(cases, directions=wanted, settings=settings, machine=machine, turns=turns, on_turn=on_turn)
    described = describe_machine(hosts=[], threads=threads, versions=_versions())
    described |= {"peak_flops": machine.peak_flops, "bytes_per_s": machine.bytes_per_s, "keeps_memory": keep_memory}
    print(
        f"{described['cpu']}, {threads} thread(s), measured peak {machine.peak_flops / 1e9:.0f} GFLOP/s, "
        f"PyTorch {described['torch']}, commit {described['commit'] or '?'}, {turns} turns, accuracy {accuracy}"
    )
    print(f"{title}, freed memory {'kept' if keep_memory else 'as PyTorch leaves it'}")
    for line in (*notes(), *(convtable.details(rows) if details else convtable.summary(rows))):
        print(line)
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, described, notes=notes()))
    if plot is not None and network is not None:
        convplot.draw_network(rows, plot, title=f"{title}, {described['cpu']}, {threads} threads")
    elif plot is not None:
        convplot.draw_kernels(
            rows, plot, title=f"{title}, {described['cpu']}, {threads} threads", peak_flops=machine.peak_flops
        )


@app.command("step")
def bench_step_command(
    network: Annotated[str, typer.Option(help="Built-in name.")] = "vgg16",
    batch: Annotated[int, typer.Option(help="Images of a step.")] = 8,
    image_size: Annotated[int, typer.Option(help="Side of the network's input; 0: its own.")] = 0,
    threads: Annotated[int, typer.Option(help="0: all cores.")] = 0,
    turns: Annotated[int, typer.Option(help="Measured steps of each.")] = 9,
    accuracy: Annotated[str, typer.Option(help=ACCURACY_HELP)] = "standard",
    tune: Annotated[str, typer.Option(help=TUNE_HELP)] = "measure",
    workspace_mb: Annotated[int, typer.Option(help=WORKSPACE_HELP)] = 64,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """A whole training step, plain PyTorch in channels_last beside the accelerated one, each in a process."""
    from windlass.bench.step import RIVALS, StepSpec, bench_step, rows_to_json
    from windlass.runs.folder import describe_machine

    Settings(accuracy=accuracy, tune=tune, workspace_mb=workspace_mb)
    if network not in NETWORKS:
        raise ConfigError(f"--network: {unknown('network', network, NETWORKS)}")
    for option, value, lowest in (("--batch", batch, 1), ("--turns", turns, 1), ("--threads", threads, 0),
                                  ("--image-size", image_size, 0)):  # fmt: skip
        if value < lowest:
            raise ConfigError(f"{option}: needs at least {lowest}, got {value}")
    _check_json(json_path)
    spec = StepSpec(
        network=network, batch=batch, image_size=image_size, threads=threads or num_cores(), accuracy=accuracy,
        tune=tune, workspace_mb=workspace_mb,
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=(turns + 1) * len(RIVALS))

        def on_turn(name: str, turn: int) -> None:
            progress.update(task, advance=1, description=f"{name}, turn {turn + 1}" if turn >= 0 else f"{name} begins")

        rows = bench_step(spec, turns=turns, on_turn=on_turn)
    machine = describe_machine(hosts=[], threads=spec.threads, versions=_versions())
    print(f"{machine['cpu']}, {spec.threads} thread(s), PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    print(f"{network}, batch {batch}, channels_last, SGD with momentum, {turns} turns, accuracy {accuracy}")
    print("| | ms a step (quartiles) | images/s | times PyTorch (quartiles) | first loss | last loss |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.by} | {1e3 * row.seconds:.1f} ({1e3 * row.low_s:.1f}–{1e3 * row.high_s:.1f}) | "
            f"{row.images_per_s:.1f} | {row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f}) | "
            f"{row.first_loss:.5f} | {row.last_loss:.5f} |"
        )
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, spec, machine))


def _check_json(path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"--json {path}: there is no folder {path.parent}")


def _sides(text: str) -> list[int]:
    try:
        sides = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        sides = []
    if not sides or min(sides) < 1:
        raise ConfigError(f"--kernel-sizes: needs whole numbers of at least 1, comma-separated, got {text!r}")
    return sides


def _directions(text: str) -> list[Direction]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in DIRECTIONS:
            raise ConfigError(f"--directions: {unknown('direction', name, DIRECTIONS)}")
    return [direction for direction in DIRECTIONS if direction in names]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"torch": version("torch"), "mpi4py": version("mpi4py"), "windlass": version("windlass")}
