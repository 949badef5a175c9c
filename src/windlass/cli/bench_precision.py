"""``windlass bench precision``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from windlass.errors import ConfigError, unknown
from windlass.networks import NETWORKS
from windlass.plan.number import Rounding, check_rounding
from windlass.runs.files import write_atomically

if TYPE_CHECKING:
    from windlass.bench.precision import Experiment, Point, PrecisionRow, Run, RunResult
    from windlass.bench.precision_cost import CostRow

LAYOUTS = ("contiguous", "channels_last")
COST_NETWORKS = "lenet5,resnet18"
TURNS = 15


def bench_precision_command(
    data: Annotated[str, typer.Option(help="Images to learn, as for windlass train: mnist:PATH, digits, ...")] = "",
    networks: Annotated[
        str | None, typer.Option(help="dnn,cnn of the paper; with --cost built-in names [default: lenet5,resnet18].")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Of a run; default the network's own.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each way, of the seeds 0, 1, ...; default the network's own.")
    ] = None,
    fl: Annotated[str, typer.Option(help="Fraction bits of 16, comma-separated.")] = "14,12,10,8",
    rounding: Annotated[str, typer.Option(help="stochastic, nearest, floor; comma-separated.")] = "stochastic,nearest",
    processes: Annotated[int, typer.Option(help="Runs at once, of one thread each; 0: one on every core.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into this file (.png, .svg, .pdf).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    cost: Annotated[bool, typer.Option("--cost", help="Time a training step instead.")] = False,
    recipe: Annotated[str, typer.Option(help="With --cost: the number formats.")] = "fixed16",
    batch: Annotated[int | None, typer.Option(help="With --cost: images of a step; default several.")] = None,
    turns: Annotated[int, typer.Option(help="With --cost: turns of each; medians are over them.")] = TURNS,
    threads: Annotated[int, typer.Option(help="With --cost: 0: all cores.")] = 0,
    layout: Annotated[str, typer.Option(help="With --cost: contiguous or channels_last.")] = "contiguous",
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="With --cost: keep freed memory, for all alike, as training does.")
    ] = False,
) -> None:
    """Training in 16-bit fixed point beside float32, rounded stochastically and to nearest (Gupta et al. 2015).

    With --cost: what a training step costs beside float32 and QPyTorch.
    """
    from windlass.bench.convplot import check_plot_path
    from windlass.cli.bench import _check_json

    _check_json(json_path)
    if cost:
        if data or plot is not None or epochs is not None:
            raise ConfigError("--cost trains nothing: it goes without --data, --plot and --epochs")
        _check_cost(networks or COST_NETWORKS, recipe, batch=batch, turns=turns, threads=threads, layout=layout)
        _cost(
            _names(networks or COST_NETWORKS), recipe, batch=batch, turns=turns, threads=threads, layout=layout,
            keep_memory=keep_memory, json_path=json_path,
        )  # fmt: skip
        return
    if batch is not None:
        raise ConfigError("--batch: goes with --cost; the paper's minibatches are of 100")
    if plot is not None:
        check_plot_path(plot)
    if processes < 0:
        raise ConfigError(f"--processes: needs at least 0, got {processes}")
    _train(
        parse_experiment(data, networks=networks, epochs=epochs, seeds=seeds, fl=fl, rounding=rounding),
        processes=processes, plot=plot, json_path=json_path,
    )  # fmt: skip


def parse_experiment(
    data: str, *, networks: str | None, epochs: int | None, seeds: int | None, fl: str, rounding: str
) -> Experiment:
    """The experiment that the options ask for.

    Raises:
        ConfigError: names the option.
        DataError: the data is not there.
    """
    from windlass.bench.precision import PAPER_NETWORKS, Experiment
    from windlass.data import check_dataset

    if not data:
        raise ConfigError("--data: needs images to learn, such as mnist:PATH")
    chosen = _names(networks) if networks is not None else tuple(PAPER_NETWORKS)
    for name in chosen:
        if name not in PAPER_NETWORKS:
            raise ConfigError(f"--networks: {unknown('network of the paper', name, PAPER_NETWORKS)}")
    for option, value in (("--epochs", epochs), ("--seeds", seeds)):
        if value is not None and value < 1:
            raise ConfigError(f"{option}: needs at least 1, got {value}")
    check_dataset(data)
    return Experiment(
        data=data, networks=chosen, fls=_fls(fl), roundings=_roundings(rounding), num_seeds=seeds, epochs=epochs
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise ConfigError(f"--networks: needs names, comma-separated, got {text!r}")
    return names


def _fls(text: str) -> tuple[int, ...]:
    from windlass.bench.precision import FLS, WL

    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        found = ()
    if not found or not all(fl in FLS for fl in found):
        last = FLS.stop - 1
        raise ConfigError(f"--fl: needs fraction bits of {WL}, {FLS.start} to {last}, comma-separated, got {text!r}")
    return found


def _roundings(text: str) -> tuple[Rounding, ...]:
    try:
        found = tuple(check_rounding(name) for name in _names(text))
    except ConfigError as error:
        raise ConfigError(f"--rounding: {str(error).removeprefix('--networks: ')}") from None
    return tuple(dict.fromkeys(found))


def _train(experiment: Experiment, *, processes: int, plot: Path | None, json_path: Path | None) -> None:
    from windlass.bench.precision import results_to_json
    from windlass.bench.precision_run import bench_precision, check_data
    from windlass.cli.bench import _versions
    from windlass.engine.launch import num_cores
    from windlass.runs.folder import describe_machine

    check_data(experiment)
    processes = processes or num_cores()
    runs = experiment.runs()
    machine = describe_machine(hosts=[], threads=1, versions=_versions())
    results: list[RunResult] = []
    console = Console(stderr=True)
    try:
        with _bar(console) as progress:
            task = progress.add_task("starting", total=sum(run.epochs for run in runs))

            def on_point(run: Run, point: Point) -> None:
                what = f"{run}: epoch {point.epoch}, test error {point.test_error:.2f} %"
                progress.update(task, advance=1, description=what)

            def on_result(result: RunResult) -> None:
                results.append(result)
                if json_path is not None:
                    write_atomically(json_path, results_to_json(results, experiment, machine))

            bench_precision(experiment, num_processes=processes, on_point=on_point, on_result=on_result)
    except KeyboardInterrupt:
        if results:
            print(f"interrupted; {len(results)} of {len(runs)} runs are finished")
            _show(results, experiment, machine, processes=processes, plot=plot)
        raise typer.Abort from None
    _show(results, experiment, machine, processes=processes, plot=plot)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _show(
    results: Sequence[RunResult], experiment: Experiment, machine: dict[str, str], *, processes: int, plot: Path | None
) -> None:
    from windlass.bench.precision import rows_of
    from windlass.bench.precision_run import num_samples

    train, test = num_samples(experiment.data)
    print(f"{machine['cpu']}, {processes} process(es) of 1 thread, PyTorch {machine['torch']}, "
          f"commit {machine['commit'] or '?'}")  # fmt: skip
    print(f"{experiment.data}: {train:,} samples to learn, {test:,} to test; minibatches of {experiment.batch}")
    rows = rows_of(results)
    for network in experiment.networks:
        mine = [row for row in rows if row.network == network]
        print(f"\n{network}, {experiment.epochs_of(network)} epoch(s), {len(experiment.seeds_of(network))} seed(s)\n")
        for line in (*recipe_lines(mine), "", *table(mine)):
            print(line)
    if plot is not None:
        from windlass.bench.precisionplot import draw_precision

        draw_precision(results, plot, title=f"{train:,} samples of {experiment.data.partition(':')[0]}, WL = 16; "
                       f"mean, least and most over the seeds")  # fmt: skip


def recipe_lines(rows: Sequence[PrecisionRow]) -> list[str]:
    """The recipe of every way, a line each."""
    return [f"{row.way}: --precision '{row.recipe}'" for row in rows]


def table(rows: Sequence[PrecisionRow]) -> list[str]:
    """Lines of a table over the ways of one network."""
    head = ["numbers", "test error, % (least–most)", "to float32, points ± standard error", "training loss"]
    head += ["updates rounded to zero", "updates not zero", "parameters that stand still", "s a run", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            row.way,
            f"{row.test_error:.2f} ({row.low:.2f}–{row.high:.2f})",
            _difference(row),
            f"{row.train_loss:.4f}",
            _share(row.zeroed),
            _share(row.moved),
            "" if row.moved is None else f"{row.still} of {row.num_parameters}",
            f"{row.seconds:.1f}",
            row.verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _difference(row: PrecisionRow) -> str:
    if row.difference is None or row.moved is None:
        return ""
    return f"{row.difference:+.2f}" + ("" if row.standard_error is None else f" ± {row.standard_error:.2f}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _check_cost(
    networks: str, recipe: str, *, batch: int | None, turns: int, threads: int, layout: str
) -> None:  # fmt: skip
    from windlass.plan.recipe import parse_recipe

    for name in _names(networks):
        if name not in NETWORKS or name == "coates":
            raise ConfigError(f"--networks: {unknown('network', name, [one for one in NETWORKS if one != 'coates'])}")
    for option, value, least in (("--batch", batch, 1), ("--turns", turns, 1), ("--threads", threads, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option}: needs at least {least}, got {value}")
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout: {unknown('layout', layout, LAYOUTS)}")
    parse_recipe(recipe)


def _cost(
    networks: Sequence[str], recipe: str, *, batch: int | None, turns: int, threads: int, layout: str,
    keep_memory: bool, json_path: Path | None,
) -> None:  # fmt: skip
    from windlass.cli.tune import keep_memory_as_in_training
    from windlass.engine.launch import num_cores

    if keep_memory:  # before PyTorch's first tensor
        keep_memory_as_in_training()

    import torch

    from windlass.bench.precision_cost import bench_cost, cost_cases, num_steps, rows_to_json
    from windlass.cli.bench import _versions
    from windlass.runs.folder import describe_machine

    threads = threads or num_cores()
    torch.set_num_threads(threads)
    cases = cost_cases(networks, batch=batch, layout=layout)
    with _bar(Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=num_steps(cases, turns))
        rows, notes = bench_cost(
            cases, recipe, turns=turns, on_turn=lambda what: progress.update(task, advance=1, description=what)
        )
    machine = describe_machine(hosts=[], threads=threads, versions=_versions()) | {"keeps_memory": keep_memory}
    print(f"{machine['cpu']}, {threads} thread(s), PyTorch {machine['torch']}, commit {machine['commit'] or '?'}")
    memory = "kept" if keep_memory else "as PyTorch leaves it"
    print(
        f"a training step: forward, loss, backward, SGD with momentum; {layout}, freed memory {memory}, {turns} turns"
    )
    for line in (*notes, *cost_table(rows)):
        print(line)
    if json_path is not None:
        write_atomically(json_path, rows_to_json(rows, machine, recipe=recipe, notes=notes))


def cost_table(rows: Sequence[CostRow]) -> list[str]:
    """Lines of a table over everything that was measured."""
    lines = [
        "| network, images | numbers | turns | ms a step (quartiles) | times float32 (quartiles) | first loss | last |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.by} | {row.turns} | "
            f"{1e3 * row.seconds:.2f} ({1e3 * row.low_s:.2f}–{1e3 * row.high_s:.2f}) | "
            f"{row.times_float32:.2f} ({row.times_low:.2f}–{row.times_high:.2f}) | "
            f"{row.first_loss:.4f} | {row.last_loss:.4f} |"
        )
    return lines
