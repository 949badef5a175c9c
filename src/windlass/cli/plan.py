"""``windlass plan``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from windlass.cli.levers import ACCUMULATE_HELP, MESH_HELP, PARALLEL_HELP, PRECISION_HELP, RECOMPUTE_HELP, given_levers
from windlass.cli.tune import ACCURACY_HELP, TUNE_HELP, WORKSPACE_HELP, TuningBar, keep_memory_as_in_training
from windlass.config import DEFAULT_TUNE, assignment, config_from_layers, join
from windlass.runs.files import to_yaml, write_atomically


def plan_command(
    network: Annotated[str, typer.Argument(help="Built-in name, or package.module:function.")],
    data: Annotated[str, typer.Option(help="The data source that the network will be trained on.")] = "digits",
    workers: Annotated[int, typer.Option(help="Ranks that share every batch.")] = 1,
    batch: Annotated[int, typer.Option(help="Global batch.")] = 64,
    precision: Annotated[str | None, typer.Option(help=PRECISION_HELP)] = None,
    parallel: Annotated[str | None, typer.Option(help=PARALLEL_HELP)] = None,
    mesh: Annotated[str | None, typer.Option(help=MESH_HELP)] = None,
    accumulate: Annotated[int | None, typer.Option(help=ACCUMULATE_HELP)] = None,
    recompute: Annotated[str | None, typer.Option(help=RECOMPUTE_HELP)] = None,
    tune: Annotated[str, typer.Option(help=TUNE_HELP)] = DEFAULT_TUNE,
    accuracy: Annotated[str, typer.Option(help=ACCURACY_HELP)] = "standard",
    workspace_mb: Annotated[int, typer.Option(help=WORKSPACE_HELP)] = 64,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the plan; default: print it.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the configuration.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Write the plan the trainer would use: every lever at its value, with its reason."""
    given = {
        "network": network,
        "data": {"source": data},
        "workers": workers,
        "batch": batch,
        "tune": tune,
        "accuracy": accuracy,
        "workspace_mb": workspace_mb,
        **given_levers(precision=precision, parallel=parallel, mesh=mesh, accumulate=accumulate, recompute=recompute),
    }
    config = config_from_layers([join([given, *map(assignment, settings or [])])])

    if config.tune in ("measure", "auto"):
        keep_memory_as_in_training()

    import torch

    from windlass.data import open_dataset
    from windlass.engine.launch import threads_per_rank
    from windlass.engine.world import LocalWorld
    from windlass.prepare import capture_step, image_size, network_for, plan_for

    dataset = open_dataset(config.data.source, holdout=config.data.holdout)
    size = image_size(config, dataset)
    module = network_for(config, dataset, size)
    shape = (dataset.image_shape[0], size, size)
    graph, plain = capture_step(config, module, LocalWorld(), shape=shape, num_classes=dataset.num_classes)
    threads = config.threads or threads_per_rank(config.workers)
    torch.set_num_threads(threads)
    with TuningBar() as bar:
        steps = config.epochs * -(-len(dataset.train) // config.batch)
        chosen = plan_for(config, graph, module, plain=plain, steps=steps, threads=threads, on_event=bar.handle)
    mapping = chosen.to_mapping()
    text = json.dumps(mapping, indent=1, ensure_ascii=False) + "\n" if json_output else to_yaml(mapping)
    if out is None:
        sys.stdout.write(text)
    else:
        write_atomically(out, text)
        print(out)
