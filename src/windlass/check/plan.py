"""Refuses a plan that cannot run on the network it is given for, naming the place."""

from __future__ import annotations

from windlass.errors import ConfigError, unknown
from windlass.plan.graph import Graph
from windlass.plan.levers import LEVERS, spell
from windlass.plan.plan import Plan


def check_plan(plan: Plan, graph: Graph, *, where: str = "plan") -> None:
    """Raises ConfigError unless `plan` fits `graph` and every lever stands at a possible value.

    Args:
        plan: the plan, perhaps edited by hand.
        graph: the captured network on which it is to run.
        where: names the plan in errors, e.g. its file.
    """
    _check_network(plan, graph, where)
    for name in LEVERS:
        if name not in plan.levers:
            raise ConfigError(f"{where}: levers.{name}: is missing; its default is {spell(LEVERS[name].default)}")
    for name, choice in plan.levers.items():
        if name not in LEVERS:
            raise ConfigError(f"{where}: levers: {unknown('lever', name, LEVERS)}")
        refusal = LEVERS[name].refusal(choice.value)
        if refusal:
            raise ConfigError(f"{where}: levers.{name}: {refusal}")
    _check_layers(plan, graph, where)
    if plan.batch < plan.workers:
        raise ConfigError(
            f"{where}: batch: {plan.workers} workers need a batch of at least {plan.workers}, got {plan.batch}"
        )


def _check_network(plan: Plan, graph: Graph, where: str) -> None:
    if plan.network != graph.network:
        raise ConfigError(f"{where}: network: the plan is for {plan.network}, this run trains {graph.network}")
    if plan.input_shape != graph.input_shape[1:]:
        raise ConfigError(
            f"{where}: input_shape: the plan is for samples of shape {_times(plan.input_shape)}, "
            f"this run has {_times(graph.input_shape[1:])}"
        )
    if plan.graph != graph.digest():
        raise ConfigError(
            f"{where}: graph: the plan is for another form of {plan.network} ({plan.graph}; this run's is "
            f"{graph.digest()}): make a new one with windlass plan"
        )


def _check_layers(plan: Plan, graph: Graph, where: str) -> None:
    kinds = {layer.name: layer.kind for layer in graph.layers}
    convolutions = {name for name, kind in kinds.items() if kind.startswith("conv")}
    for layer in plan.layers:
        refusal = LEVERS["convolution"].refusal(layer.convolution)
        if refusal:
            raise ConfigError(f"{where}: layers.{layer.name}.convolution: {refusal}")
        if layer.name not in convolutions:
            raise ConfigError(f"{where}: layers: {unknown('convolution', layer.name, convolutions)}")
        if layer.kind and layer.kind != kinds[layer.name]:
            raise ConfigError(
                f"{where}: layers.{layer.name}.kind: the plan says {layer.kind}, the network has {kinds[layer.name]}"
            )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
