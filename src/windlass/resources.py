"""What a run needs of memory and disk, predicted, against what there is."""

from __future__ import annotations

from pathlib import Path

from windlass.config import TrainConfig
from windlass.errors import ConfigError, WriteError
from windlass.networks.capture import capture
from windlass.objective import has_own_loss
from windlass.optim.rules import UPDATE_RULES
from windlass.parallel.limits import check_memory, predict_all, training_bytes
from windlass.parallel.trace import trace
from windlass.placing import global_shape
from windlass.plan.derive import derive
from windlass.plan.graph import Graph
from windlass.plan.levers import LEVERS
from windlass.plan.plan import Plan
from windlass.plan.recipe import Recipe, parse_recipe
from windlass.plan.sizes import parse_bytes
from windlass.prepare import Prepared
from windlass.report.units import num_bytes, plain
from windlass.runs.folder import check_writable, free_bytes, memory_bytes
from windlass.tuning.network import plan_kept_bytes, plan_workspace_bytes

OPTIMIZER_COPIES = {"SGD": 1, "Adagrad": 1, "Adam": 2, "AdamW": 2}
"""Tensors of the parameters' size that PyTorch's optimizers keep."""


def worker_bytes(graph: Graph, *, update_rule: str, world_size: int, accumulate: int = 1) -> int:
    """Predicted most bytes of tensors on one worker.

    The peak of a micro-batch, the images and labels of the others, flat gradients (the rank's own and, with others,
    the sum), and the optimizer's state.
    """
    copies = 1 + (world_size > 1) + OPTIMIZER_COPIES[UPDATE_RULES[update_rule].torch_class]
    return graph.peak_bytes + (accumulate - 1) * graph.input_bytes + copies * graph.memories()["∇W"]


def rounded_bytes(prepared: Prepared, recipe: Recipe, *, accumulate: int) -> int:
    """The same under a recipe, with the late formats if there are any.

    One worker keeps gradients as codes, which the peak has already; several have flat ones, as they exchange them.
    The optimizer's state is float32.
    """
    config, world = prepared.job.config, prepared.world
    is_alone = world.size == 1 and accumulate == 1
    graph = capture(
        prepared.module, prepared.graph.input_shape, name=config.network, num_classes=prepared.dataset.num_classes,
        keep_gradients=is_alone or accumulate > 1, recipe=recipe, share=1.0, defer_gradients=not is_alone,
    )  # fmt: skip
    numbers = sum(parameter.numel() for parameter in prepared.module.parameters() if parameter.requires_grad)
    sent = recipe.gradients.bits // 8 if recipe.exchange == "16bit" and world.size > 1 else 4
    flat = 0 if is_alone else sent * (1 + (world.size > 1))
    state = 4 * OPTIMIZER_COPIES[UPDATE_RULES[config.update.name].torch_class]
    return graph.peak_bytes + (accumulate - 1) * graph.input_bytes + (flat + state) * numbers


def checkpoint_bytes(graph: Graph, *, update_rule: str) -> int:
    """About the bytes of one checkpoint."""
    copies = 1 + OPTIMIZER_COPIES[UPDATE_RULES[update_rule].torch_class]
    return copies * graph.memories()["W"] + (1 << 16)


def check_resources(prepared: Prepared) -> dict[str, str]:
    """Memory and disk against what the run will need; what was found, in words.

    Raises:
        ConfigError: the memory will not do.
        WriteError: the disk will not do.
    """
    config, world = prepared.job.config, prepared.world
    rule, folder = config.update.name, Path(prepared.job.folder)
    tensors = needed_bytes(prepared)
    _check_limit(tensors, config)
    scratch = plan_workspace_bytes(prepared.plan, prepared.graph, threads=prepared.threads)
    needed = world.local_size * (max(tensors) + plan_kept_bytes(prepared.plan, prepared.graph) + scratch)
    available = memory_bytes("MemAvailable")
    if available and needed > available:
        raise ConfigError(
            f"{world.local_size} worker(s) on {world.host} need about {_size(needed)} of memory, {_size(available)} "
            f"are available: {_advice(config)} or more hosts"
        )
    check_writable(folder)
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # the one being written
    needed_disk = kept * checkpoint_bytes(prepared.graph, update_rule=rule)
    free = free_bytes(folder)
    if needed_disk > free:
        raise WriteError(
            f"{folder}: {kept} checkpoints need about {_size(needed_disk)}, {_size(free)} are free: set "
            f"checkpoint.keep_last lower or name another --out"
        )
    return {
        "memory": f"{_size(needed)} predicted on this host, {_size(available)} available{_savings(prepared.plan)}",
        "disk": f"{_size(needed_disk)} for checkpoints, {_size(free)} free",
    }


def needed_bytes(prepared: Prepared) -> list[int]:
    """Predicted most bytes of tensors on every worker."""
    config, world = prepared.job.config, prepared.world
    if prepared.placement is None:
        parts = int(prepared.plan.value("accumulate"))
        recipe = parse_recipe(str(prepared.plan.value("number_format")))
        if not recipe.is_plain:
            return [rounded_bytes(prepared, recipe, accumulate=parts)] * world.size
        own = worker_bytes(prepared.graph, update_rule=config.update.name, world_size=world.size, accumulate=parts)
        return [own] * world.size
    shape, module = global_shape(prepared), prepared.module
    traced = trace(module, shape)
    derived = derive(traced.ops, prepared.placement, outputs=traced.outputs, own_loss=has_own_loss(module))
    graphs = predict_all(module, derived, shape, network=config.network, num_classes=prepared.dataset.num_classes)
    copies = OPTIMIZER_COPIES[UPDATE_RULES[config.update.name].torch_class]
    return [training_bytes(graph, derived, rank, optimizer_copies=copies) for rank, graph in enumerate(graphs)]


def _check_limit(needed: list[int], config: TrainConfig) -> None:
    if not config.memory_limit:
        return
    try:
        check_memory(needed, parse_bytes(config.memory_limit), placement=config.parallel)
    except ConfigError as error:
        raise ConfigError(f"{error}: {_advice(config)}") from None


def _advice(config: TrainConfig) -> str:
    """What needs less memory."""
    if config.parallel == "data":
        return "take a smaller --batch, --accumulate, --recompute blocks, --parallel model with more --workers"
    return "take a smaller --batch or more --workers"


def _savings(plan: Plan) -> str:
    """What micro-batches and recomputing change, in the plan's own words."""
    asked = [name for name in ("accumulate", "recompute") if plan.value(name) != LEVERS[name].default]
    return "".join(f"; {name} {plan.value(name)}: {plan.levers[name].reason}" for name in asked)


def _size(size: float) -> str:
    return plain(num_bytes(size))
