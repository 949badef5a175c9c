"""Refuses a plan that cannot run on the network it is given for, naming the place."""

from __future__ import annotations

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import CONV_ALGORITHMS, DIRECTIONS, ConvChoice, ConvShape
from windlass.plan.graph import Graph
from windlass.plan.levers import LEVERS, spell
from windlass.plan.plan import Plan, conv_choice
from windlass.plan.recipe import parse_recipe
from windlass.plan.shapes import conv_choices, graph_convolutions, module_name


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
    if plan.batch < plan.workers and plan.value("parallel") == "data":
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
    shapes = graph_convolutions(graph)
    for layer in plan.layers:
        place = f"{where}: layers.{layer.name}"
        choice = conv_choice(layer.convolution, where=f"{place}.convolution")
        if layer.name not in convolutions:
            raise ConfigError(f"{where}: layers: {unknown('convolution', layer.name, convolutions)}")
        if layer.kind and layer.kind != kinds[layer.name]:
            raise ConfigError(f"{place}.kind: the plan says {layer.kind}, the network has {kinds[layer.name]}")
        _check_domain(choice, shapes.get(layer.name), f"{place}.convolution")
        _check_accuracy(choice, shapes.get(layer.name), str(plan.value("number_format")), f"{place}.convolution")
    choices = conv_choices(plan, graph)
    _check_shared(choices, where)
    _check_lever(str(plan.value("convolution")), choices, where)


def _check_domain(choice: ConvChoice, shape: ConvShape | None, where: str) -> None:
    for direction in DIRECTIONS:
        name = choice.of(direction)
        if name == "torch":
            continue
        if shape is None:
            raise ConfigError(f"{where}: only torch computes it: it is no module, or its input's shape is not known")
        refusal = CONV_ALGORITHMS[name].refusal(shape)
        if refusal:
            raise ConfigError(f"{where}: {name} {refusal}")


def _check_accuracy(choice: ConvChoice, shape: ConvShape | None, number_format: str, where: str) -> None:
    """An algorithm may not be so inexact that a recipe's formats see it."""
    limit = parse_recipe(number_format).error_factor()
    for name in {choice.of(direction) for direction in DIRECTIONS} - {"torch"}:
        factor = CONV_ALGORITHMS[name].error_factor(shape) if shape is not None else 1.0
        if factor > limit:
            raise ConfigError(
                f"{where}: {name} is about {factor:g} times as inexact as direct convolution; number format "
                f"{number_format} has room for {limit:.3g} times"
            )


def _check_shared(choices: dict[str, ConvChoice], where: str) -> None:
    """A module that is called several times has one choice."""
    for name, choice in choices.items():
        first = choices.get(module_name(name), choice)
        if choice != first:
            raise ConfigError(
                f"{where}: layers.{name}.convolution: it is {module_name(name)} called again, and that has {first}, "
                f"not {choice}"
            )


def _check_lever(value: str, choices: dict[str, ConvChoice], where: str) -> None:
    """An algorithm for all layers must be that of one at least, or somebody expects what does not happen."""
    if value in ("torch", "auto") or any(value in map(choice.of, DIRECTIONS) for choice in choices.values()):
        return
    raise ConfigError(
        f"{where}: levers.convolution: no layer takes {value}: none is in its domain, or all have algorithms of "
        f"their own under layers"
    )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
