"""The convolutions of a captured network: their choices into a plan, and a plan's choices into the module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from windlass.errors import ConfigError
from windlass.plan.convolution import DIRECTIONS, ConvChoice, ConvShape, Direction
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.plan import Choice, LayerChoice, Plan
from windlass.plan.shapes import conv_choices, graph_convolutions, module_name
from windlass.tuning.convolution import Tuner
from windlass.tuning.cost import Layout
from windlass.tuning.report import ConvolutionPlan
from windlass.tuning.results import ConvCase, LayerTuning
from windlass.tuning.swap import Swap, convolutions, refusal, sole_relus, swap_convolutions


def tune_network(graph: Graph, module: nn.Module, *, layout: Layout, tuner: Tuner) -> ConvolutionPlan:
    """The choice for every convolution of a network; calls of one module share one choice.

    Args:
        graph: the network as captured, with one worker's share of the batch.
        module: the network.
        layout: memory format of images and weights.
        tuner: chooses.
    """
    alone = layer_refusals(graph, module)
    cases: dict[str, list[ConvCase]] = {}
    for name, case in graph_cases(graph, layout=layout).items():
        if module_name(name) not in alone:
            cases.setdefault(module_name(name), []).append(case)
    tuned = {layer.name: layer for layer in tuner.tune_all(cases)}
    relus = sole_relus(graph, module)
    layers = []
    for name in dict.fromkeys(module_name(layer.name) for layer in _conv_layers(graph)):
        layer = tuned.get(name) or LayerTuning(name=name, reason=alone.get(name, "its shape is not known"))
        fuses = name in relus and layer.choice.forward != "torch"
        layers.append(replace(layer, activation="relu") if fuses else layer)
    return ConvolutionPlan(layers=tuple(layers), settings=tuner.settings, machine=tuner.machine)


def graph_cases(graph: Graph, *, layout: Layout) -> dict[str, ConvCase]:
    """Every convolution's call in a training step, by layer name."""
    layers = {layer.name: layer for layer in graph.layers}
    return {
        name: ConvCase(
            shape=shape,
            layout=layout,
            weight_layout=layout,
            bias=_has_bias(layers[module_name(name)], shape),
            directions=_directions(layers[name]),
        )
        for name, shape in graph_convolutions(graph).items()
    }


def layer_refusals(graph: Graph, module: nn.Module) -> dict[str, str]:
    """Why convolutions must stay PyTorch's, by module path; those that need not are left out."""
    found = convolutions(module)
    known = {module_name(name) for name in graph_convolutions(graph)}
    reasons: dict[str, str] = {}
    for layer in _conv_layers(graph):
        name = module_name(layer.name)
        if name not in found:
            reasons[name] = f"it is no {layer.kind} module of PyTorch's own class"
        elif (why := refusal(found[name])) is not None:
            reasons[name] = why
        elif name not in known:
            reasons[name] = "its input's shape is not known"
    return reasons


def with_convolutions(plan: Plan, tuned: ConvolutionPlan) -> Plan:
    """The plan with the tuned algorithms: the lever says ``auto``, each layer its own."""
    rows = {layer.name: layer for layer in tuned.layers}
    layers = tuple(
        LayerChoice(row.name, row.kind, str(layer.choice), layer.summary)
        if (layer := rows.get(module_name(row.name))) is not None
        else row
        for row in plan.layers
    )
    levers = {**plan.levers, "convolution": Choice("auto", tuned.summary())}
    return replace(plan, levers=levers, layers=layers)


def complete(plan: Plan, graph: Graph) -> Plan:
    """The plan with a row for every convolution: what the lever's value means for those that have none."""
    choices, rows = conv_choices(plan, graph), {row.name: row for row in plan.layers}
    layers = tuple(
        rows.get(layer.name) or LayerChoice(layer.name, layer.kind, str(choices.get(layer.name, ConvChoice())))
        for layer in _conv_layers(graph)
    )
    return replace(plan, layers=layers)


def apply_plan(plan: Plan, graph: Graph, module: nn.Module) -> nn.Module:
    """Gives the module's convolutions the plan's algorithms, in place; ReLUs right behind them come along.

    A module whose plan says PyTorch's everywhere is not touched.

    Raises:
        ConfigError: the plan names an algorithm for a convolution that must stay PyTorch's.
    """
    choices = {module_name(name): choice for name, choice in conv_choices(plan, graph).items()}
    changed = {name: choice for name, choice in choices.items() if choice != ConvChoice()}
    if not changed:
        return module
    alone = layer_refusals(graph, module)
    for name, choice in changed.items():
        if name in alone:
            raise ConfigError(f"plan: layers.{name}.convolution: {choice}: {alone[name]}: only torch computes it")
    found, relus = convolutions(module), sole_relus(graph, module)
    swaps = {
        found[name]: Swap(choice, "relu" if name in relus and choice.forward != "torch" else None)
        for name, choice in changed.items()
    }
    return swap_convolutions(module, swaps, relus={found[name]: relu for name, relu in relus.items()})


def plan_workspace_bytes(plan: Plan, graph: Graph, *, threads: int) -> int:
    """The most scratch memory that a convolution of the plan takes on one worker; one runs at a time."""
    needed = [
        (choice.of(direction), direction, graph_convolutions(graph)[name])
        for name, choice in conv_choices(plan, graph).items()
        for direction in DIRECTIONS
        if choice.of(direction) != "torch"
    ]
    if not needed:
        return 0
    from windlass.kernels import convolve

    return max(
        convolve.workspace_bytes(algorithm, direction, shape=shape, threads=threads)
        for algorithm, direction, shape in needed
    )


def plan_kept_bytes(plan: Plan, graph: Graph) -> int:
    """Bytes of weights' spectra that all convolutions of the plan keep from the forward to the backward pass."""
    layers, shapes = {layer.name: layer for layer in _conv_layers(graph)}, graph_convolutions(graph)
    kept = [
        (choice.forward, shapes[name])
        for name, choice in conv_choices(plan, graph).items()
        if choice.forward == choice.input != "torch" and "input" in _directions(layers[name])
    ]
    if not kept:
        return 0
    from windlass.kernels import convolve

    return sum(4 * convolve.kept_floats(algorithm, shape=shape) for algorithm, shape in kept)


def _conv_layers(graph: Graph) -> Sequence[Layer]:
    return [layer for layer in graph.layers if layer.kind.startswith("conv")]


def _has_bias(layer: Layer, shape: ConvShape) -> bool:
    """A layer that came to shared weights second tells nothing; it is taken to have one."""
    return layer.num_parameters != shape.num_weights


def _directions(layer: Layer) -> tuple[Direction, ...]:
    """The network's input has no gradient."""
    return tuple(direction for direction in DIRECTIONS if direction != "input" or layer.inputs != (INPUT,))
