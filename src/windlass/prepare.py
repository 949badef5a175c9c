"""Everything that stands before the first step: data, network, graph, plan, checks.

All ranks do the same; what can go wrong goes wrong on all of them together, before anything is written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from windlass.check.plan import check_plan
from windlass.config import LEVERS_SET, TrainConfig, read_yaml
from windlass.data import Dataset, open_dataset
from windlass.data.serving import BatchServer
from windlass.engine.agree import on_all, on_root
from windlass.engine.allreduce import Allreduce
from windlass.engine.launch import threads_per_rank
from windlass.engine.world import World
from windlass.errors import ConfigError, WindlassError
from windlass.job import Job
from windlass.networks import NETWORKS, build_network, input_size
from windlass.networks.capture import capture
from windlass.networks.recompute import recompute_blocks
from windlass.plan.graph import Graph
from windlass.plan.pick import AUTO
from windlass.plan.placement import Placement
from windlass.plan.plan import Choice, Plan, plan_from_mapping
from windlass.plan.recipe import parse_recipe
from windlass.precision.lowered import layer_names
from windlass.runs.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from windlass.tuning.choose import choose_plan
from windlass.tuning.cluster import tuned_chooser
from windlass.tuning.convolution import OnEvent, make_tuner
from windlass.tuning.cost import Layout
from windlass.tuning.network import apply_plan, complete, tune_network, with_convolutions
from windlass.tuning.results import Settings
from windlass.tuning.worth import decide_tuning

T = TypeVar("T")

VARIED_SIZE = 224
"""Side of images from files for a network that says nothing of its own."""

NAP_S = 0.02
"""How long a rank that waits for rank 0's measurements sleeps between looks."""


@dataclass
class Prepared:
    """A run that is ready to start on this rank."""

    job: Job
    world: World
    dataset: Dataset
    module: torch.nn.Module
    graph: Graph
    plan: Plan
    train: BatchServer
    test: BatchServer
    threads: int
    checkpoint: Checkpoint | None = None
    placement: Placement | None = None

    def seat(self, world: World) -> None:
        """From now on this rank is one of `world`: it serves that one's shards."""
        self.world = world
        for server in (self.train, self.test):
            server.seat(world.rank, world.size)


def prepare(
    job: Job,
    world: World,
    *,
    module: torch.nn.Module | None = None,
    on_event: OnEvent = lambda event: None,
    note: Callable[[str, int], None] = lambda phase, step: None,
) -> Prepared:
    """Opens the data, builds and captures the network, and reads, chooses, checks and applies the plan.

    Args:
        job: what to run.
        world: the ranks.
        module: the network itself, instead of `config.network`'s name (one worker only).
        on_event: told on rank 0 what is measured, and warned.
        note: told that this rank still lives.

    Raises:
        ConfigError, DataError: on every rank alike.
    """
    config = job.config
    threads = config.threads or threads_per_rank(min(world.local_size, config.workers))  # spares wait
    torch.set_num_threads(threads)
    dataset = on_all(world, lambda: open_dataset(config.data.source, holdout=config.data.holdout))
    size = image_size(config, dataset)
    torch.manual_seed(config.seed)
    network = module or on_all(world, lambda: network_for(config, dataset, size))
    on_all(world, lambda: parse_recipe(config.number_format).check_layers(layer_names(network)))
    graph, plain = capture_step(
        config, network, world, shape=(dataset.image_shape[0], size, size), num_classes=dataset.num_classes
    )
    steps = config.epochs * -(-len(dataset.train) // config.batch)
    choose = functools.partial(
        plan_for, config, graph, network, plain=plain, steps=steps, threads=threads, on_event=on_event
    )
    plan = on_root_alone(world, choose, note=lambda: note("waiting for rank 0, which measures", 0))
    network = on_all(world, lambda: apply_plan(plan, graph, network))
    serve = {
        "dataset": dataset, "image_size": size, "seed": config.seed,
        "rank": world.rank, "world_size": world.size, "batch": config.batch,
    }  # fmt: skip
    return Prepared(
        job=job,
        world=world,
        dataset=dataset,
        module=network,
        graph=graph,
        plan=plan,
        train=BatchServer(dataset.train, augment=config.data.augment, shuffle=True, **serve),  # type: ignore[arg-type]
        test=BatchServer(dataset.test, augment=(), shuffle=False, **serve),  # type: ignore[arg-type]
        threads=threads,
        checkpoint=on_root(world, lambda: _checkpoint(job)),
    )


def image_size(config: TrainConfig, dataset: Dataset) -> int:
    """Side of the images that the network gets."""
    if config.data.image_size:
        return config.data.image_size
    if dataset.varied_sizes:
        return NETWORKS[config.network].default_size if config.network in NETWORKS else VARIED_SIZE
    return input_size(config.network, dataset.image_shape[1])


def network_for(config: TrainConfig, dataset: Dataset, size: int) -> torch.nn.Module:
    """The configured network, for this data."""
    return build_network(
        config.network,
        num_classes=dataset.num_classes,
        in_channels=dataset.image_shape[0],
        image_size=size,
        **config.network_args,
    )


def capture_step(
    config: TrainConfig, module: torch.nn.Module, world: World, *, shape: tuple[int, int, int], num_classes: int
) -> tuple[Graph, Graph | None]:
    """The graph of what a worker runs at once: a micro-batch of its share, with blocks recomputed as asked for.

    The network's blocks are computed again from here on, where that is asked for.

    Args:
        config: what is asked for.
        module: the network.
        world: the ranks; rank 0 captures for all.
        shape: of one sample.
        num_classes: of the labels.

    Returns:
        The graph, and where micro-batches or recomputing are asked for the one without them.
    """
    share = math.ceil(config.batch / config.workers)

    def captured(batch: int) -> Graph:
        return capture(module, (batch, *shape), name=config.network, num_classes=num_classes)

    plain = on_root(world, lambda: captured(share)) if config.accumulate > 1 or config.recompute != "none" else None
    if config.recompute == "blocks":
        on_all(world, lambda: recompute_blocks(module, name=config.network))
    return on_root(world, lambda: captured(math.ceil(share / config.accumulate))), plain


def plan_for(
    config: TrainConfig,
    graph: Graph,
    module: torch.nn.Module,
    *,
    steps: int,
    threads: int,
    on_event: OnEvent,
    plain: Graph | None = None,
) -> Plan:
    """The plan in the configuration's file, checked and completed, or the one Windlass chooses for so many steps.

    `graph` and `plain` are those of `capture_step`.
    """
    settings, why = _settings(config)
    plan = _plan_for(
        config, graph, module, steps=steps, threads=threads, on_event=on_event, plain=plain, settings=settings
    )
    convolution = plan.levers["convolution"]
    told = Choice(convolution.value, convolution.reason.removesuffix(why) + why)
    return dataclasses.replace(plan, levers={**plan.levers, "convolution": told})


def _plan_for(
    config: TrainConfig,
    graph: Graph,
    module: torch.nn.Module,
    *,
    steps: int,
    threads: int,
    on_event: OnEvent,
    plain: Graph | None,
    settings: Settings,
) -> Plan:
    if not config.plan:
        asked = {name: getattr(config, name) for name in LEVERS_SET}
        plan = choose_plan(graph, workers=config.workers, batch=config.batch, asked=asked, plain=plain)
        if settings.tune == "auto" and settings.accuracy != "exact":
            tune, reason = decide_tuning(graph, steps=steps, threads=threads, accuracy=settings.accuracy)
            settings = dataclasses.replace(settings, tune=tune)
            if tune == "off":
                lever = Choice("torch", f"PyTorch's own (oneDNN): {reason}")
                return dataclasses.replace(plan, levers={**plan.levers, "convolution": lever})
        if settings.tune == "off" or settings.accuracy == "exact":
            return plan
        return _tuned(plan, graph, module, settings=settings, threads=threads, on_event=on_event)
    where = f"plan {config.plan}"
    plan = plan_from_mapping(read_yaml(Path(config.plan), "plan"), where=where)
    check_plan(plan, graph, where=where)
    for name, ours in (("workers", config.workers), ("batch", config.batch)):
        if getattr(plan, name) != ours:
            raise ConfigError(f"{where}: {name}: the plan says {getattr(plan, name)}, the configuration {ours}")
    for name in LEVERS_SET:
        if plan.value(name) != getattr(config, name):
            raise ConfigError(
                f"{where}: levers.{name}: the plan says {plan.value(name)}, the configuration {getattr(config, name)}"
            )
    whole = complete(plan, graph)
    if plan.value("convolution") != "auto" or len(plan.layers) == len(whole.layers):
        return whole
    settings = dataclasses.replace(settings, tune="model") if settings.tune == "off" else settings
    rows = {row.name: row for row in plan.layers}
    tuned = _tuned(whole, graph, module, settings=settings, threads=threads, on_event=on_event)
    return dataclasses.replace(tuned, layers=tuple(rows.get(row.name, row) for row in tuned.layers))


def _settings(config: TrainConfig) -> tuple[Settings, str]:
    """What the chooser of convolutions is asked for: no less accurate than the number format can bear; and why."""
    settings, recipe = config.convolution_settings(), parse_recipe(config.number_format)
    if recipe.is_plain:
        return settings, ""
    accuracy, why = recipe.accuracy(settings.accuracy)
    return dataclasses.replace(settings, accuracy=accuracy), f"; {why}"


def _tuned(
    plan: Plan, graph: Graph, module: torch.nn.Module, *, settings: Settings, threads: int, on_event: OnEvent
) -> Plan:
    tuner = make_tuner(settings, threads=threads, on_event=on_event)
    layout: Layout = "channels_last" if plan.value("layout") == "channels_last" else "contiguous"
    return with_convolutions(plan, tune_network(graph, module, layout=layout, tuner=tuner))


def allreduce_for(world: World, plan: Plan) -> Allreduce:
    """What sums gradients over these ranks, as the plan says; every one of them calls this."""
    lever, fixed_order = str(plan.value("allreduce")), bool(plan.value("fixed_order"))
    choose = tuned_chooser(world) if lever == AUTO and not fixed_order else None
    return Allreduce(world, lever, fixed_order=fixed_order, choose=choose)


def on_root_alone(world: World, action: Callable[[], T], *, note: Callable[[], None]) -> T:
    """`on_root` for what takes long and wants the machine: the other ranks sleep meanwhile, and say they live."""
    outcome: tuple[T | None, WindlassError | None] = (None, None)
    if world.rank == 0:
        try:
            outcome = (action(), None)
        except WindlassError as error:
            outcome = (None, error)
    arrived = world.start_sum(np.zeros(1), np.empty(1))
    while not arrived.test():
        note()
        time.sleep(NAP_S)

    def give() -> T:
        value, error = outcome
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    return on_root(world, give)


def _checkpoint(job: Job) -> Checkpoint | None:
    if not job.resume:
        return None
    return read_checkpoint(find_checkpoint(Path(job.folder) / "checkpoints", job.resume_from))
