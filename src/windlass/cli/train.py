"""``windlass train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from windlass.cli.levers import (
    ACCUMULATE_HELP,
    BATCH_HELP,
    MESH_HELP,
    PARALLEL_HELP,
    PRECISION_HELP,
    RECOMPUTE_HELP,
    batches,
    given_levers,
)
from windlass.cli.tune import ACCURACY_HELP, TUNE_HELP, WORKSPACE_HELP
from windlass.config import assignment, config_file, join
from windlass.display import make_display
from windlass.engine.world import world_from_environment
from windlass.errors import ConfigError
from windlass.train import execute, make_job


def train_command(
    network: Annotated[
        str | None, typer.Argument(help="Built-in name, or package.module:function.", show_default="lenet5")
    ] = None,
    network_option: Annotated[str | None, typer.Option("--network", help="The same as the argument.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist:PATH, fashion-mnist:PATH, cifar10:PATH, folder:PATH, synthetic[:CxHxW], "
            "patches[:SOURCE:HxW]."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ranks that share every batch.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    batch: Annotated[str | None, typer.Option(help=BATCH_HELP)] = None,
    precision: Annotated[str | None, typer.Option(help=PRECISION_HELP)] = None,
    parallel: Annotated[str | None, typer.Option(help=PARALLEL_HELP)] = None,
    mesh: Annotated[str | None, typer.Option(help=MESH_HELP)] = None,
    accumulate: Annotated[int | None, typer.Option(help=ACCUMULATE_HELP)] = None,
    recompute: Annotated[str | None, typer.Option(help=RECOMPUTE_HELP)] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    lr: Annotated[float | None, typer.Option(help="Base learning rate.")] = None,
    scale_lr: Annotated[
        str | None, typer.Option(help="The rate follows the batch, from update.base_batch: linear, sqrt or none.")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="Update rule: sgd, momentum, nesterov, adagrad, adam, adamw.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, step, exponential, milestones, cosine or linear.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Epochs over which the rate rises from 0.")] = None,
    augment: Annotated[str | None, typer.Option(help="E.g. shift:2,flip; none for no augmentation.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; default the next free runs/NETWORK-DATA-NNN.")] = None,
    plan: Annotated[str | None, typer.Option(help="Plan file (windlass plan writes one).")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Refuse a run that is predicted to need more a worker, e.g. 500MiB.")
    ] = None,
    tune: Annotated[str | None, typer.Option(help=TUNE_HELP)] = None,
    accuracy: Annotated[str | None, typer.Option(help=ACCURACY_HELP)] = None,
    workspace_mb: Annotated[int | None, typer.Option(help=WORKSPACE_HELP)] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration file (YAML).")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the configuration, e.g. checkpoint.keep_last=3."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    resume_from: Annotated[str, typer.Option(help="From this checkpoint: best, last or step-….")] = "",
    elastic: Annotated[bool, typer.Option("--elastic", help="Go on without ranks that die.")] = False,
    spares: Annotated[int | None, typer.Option(help="With --elastic: ranks that wait for a dead one's place.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, take one step, write nothing.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved configuration.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Every event as a line of JSON.")] = False,
) -> None:
    """Train a network on so many workers, with a plan and a report."""
    if network and network_option and network != network_option:
        raise ConfigError(f"the network is given twice: {network} and --network {network_option}")
    given = {
        "network": network or network_option,
        "workers": workers,
        "epochs": epochs,
        **batches(batch),
        **given_levers(precision=precision, parallel=parallel, mesh=mesh, accumulate=accumulate, recompute=recompute),
        "seed": seed,
        "out": out,
        "plan": plan,
        "tune": tune,
        "accuracy": accuracy,
        "workspace_mb": workspace_mb,
        "memory_limit": memory_limit,
        "data": _given({"source": data, "augment": augment}),
        "update": _given({"name": update, "lr": lr, "scaling": scale_lr}),
        "schedule": _given({"name": schedule, "warmup_epochs": warmup}),
        "elastic": _given({"enabled": elastic or None, "spares": spares}),
    }
    layers: list[Mapping[str, Any]] = [config_file(config)] if config else []
    layers.append(join([_given(given), *map(assignment, settings or [])]))
    job = make_job(layers, resume=resume, resume_from=resume_from, dry_run=dry_run)
    if print_config:
        from windlass.runs.files import to_yaml

        print(to_yaml(job.config.to_mapping()), end="")
        return
    with make_display(display_mode(quiet=quiet, json_lines=json_lines)) as display:
        execute(job, on_event=display.handle)


def display_mode(*, quiet: bool, json_lines: bool) -> str:
    """The display for ``--quiet`` and ``--json``."""
    if quiet and json_lines:
        raise ConfigError("--quiet and --json exclude each other")
    rank, _ = world_from_environment() or (0, 1)
    return "quiet" if quiet or rank != 0 else "json" if json_lines else "auto"


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """What was given: neither None nor an empty mapping."""
    return {name: value for name, value in values.items() if value is not None and value != {}}
