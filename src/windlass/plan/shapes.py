"""The convolutions of a captured network as shapes: what the chooser prices and the check compares with domains."""

from __future__ import annotations

from collections.abc import Mapping

from windlass.errors import ConfigError
from windlass.plan.convolution import CONV_ALGORITHMS, ConvChoice, ConvShape
from windlass.plan.graph import INPUT, Graph, Layer
from windlass.plan.plan import Plan

CONV_KIND = "conv2d"
"""A layer's kind where Windlass has algorithms of its own; other convolutions are PyTorch's."""


def graph_convolutions(graph: Graph) -> dict[str, ConvShape]:
    """The shape of every 2-D convolution by layer name, for the graph's batch.

    Left out are those that the graph does not tell in whole: convolutions called as functions, and those whose
    input came through an operation that changed its shape without being a layer.
    """
    outputs = {INPUT: graph.input_shape} | {layer.name: layer.output_shape for layer in graph.layers}
    shapes = {layer.name: _shape(layer, outputs) for layer in graph.layers if layer.kind == CONV_KIND}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def module_name(layer: str) -> str:
    """The path of the module that a layer is a call of.

    >>> module_name("features.3#2")
    'features.3'
    """
    return layer.partition("#")[0]


def conv_choices(plan: Plan, graph: Graph) -> dict[str, ConvChoice]:
    """The algorithms of every convolution whose shape is known, by layer name.

    A layer's own row in the plan holds; a layer without one takes the lever's algorithm where that can compute
    it, else PyTorch's.
    """
    rows = {layer.name: layer.convolution for layer in plan.layers}
    lever = str(plan.value("convolution"))
    return {
        name: ConvChoice.parse(rows[name]) if name in rows else default_choice(lever, shape)
        for name, shape in graph_convolutions(graph).items()
    }


def default_choice(lever: str, shape: ConvShape) -> ConvChoice:
    """What the lever's value means for a layer that has no row of its own.

    >>> shape = ConvShape(batch=1, in_channels=4, height=8, width=8, out_channels=4, kernel=(1, 1))
    >>> str(default_choice("winograd-4x4", shape)), str(default_choice("direct", shape))
    ('torch', 'direct')
    """
    algorithm = CONV_ALGORITHMS.get(lever)
    if algorithm is None or algorithm.refusal(shape) is not None:
        return ConvChoice()
    return ConvChoice(lever, lever, lever)


def same_padding(padding: object, *, kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """PyTorch's `padding` (two numbers, ``"same"`` or ``"valid"``) as top, bottom, left, right.

    Of an odd number of zeros, ``"same"`` puts the odd one after the image.

    >>> same_padding("same", kernel=(3, 4), dilation=(1, 1))
    (1, 1, 1, 2)
    """
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2
    height, width = _pair(padding)
    return height, height, width, width


def _shape(layer: Layer, outputs: Mapping[str, tuple[int, ...]]) -> ConvShape | None:
    attributes = dict(layer.attributes)
    if len(layer.inputs) != 1 or len(outputs.get(layer.inputs[0], ())) != 4 or len(layer.output_shape) != 4:
        return None
    batch, channels, height, width = outputs[layer.inputs[0]]
    try:
        kernel, stride, dilation = (_pair(attributes.get(name)) for name in ("kernel_size", "stride", "dilation"))
        groups = attributes.get("groups")
        shape = ConvShape(
            batch=batch,
            in_channels=channels,
            height=height,
            width=width,
            out_channels=layer.output_shape[1],
            kernel=kernel,
            stride=stride,
            padding=same_padding(attributes.get("padding"), kernel=kernel, dilation=dilation),
            dilation=dilation,
            groups=groups if isinstance(groups, int) else 1,
        )
    except (ConfigError, TypeError):
        return None
    found = (shape.batch, shape.out_channels, shape.out_height, shape.out_width)
    return shape if channels == attributes.get("in_channels") and found == layer.output_shape else None


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(number, int) for number in value):
        return value[0], value[1]
    raise TypeError(f"needs two whole numbers, got {value!r}")
