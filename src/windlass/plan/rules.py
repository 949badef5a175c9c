"""What each kind of layer can do along one axis of a mesh, and what that takes and gives.

A rule looks at one axis alone: `Line` says in what part the layer then needs its inputs, in what part their
gradients and its output come out, and how its parameters lie.  A layer on several axes is its lines side by side
(`windlass.plan.derive`).  The table `RULES` is by kind; whatever is not listed is a module of the user's own, of
which only this is taken for granted: samples do not meet in it, as PyTorch's DDP supposes.

Where the lines of convolutions and linear layers come from: with y = W x, cutting y cuts W's rows and leaves each
member an addend of Wᵀ ∇y; cutting x cuts W's columns and leaves each member an addend of y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from windlass.plan.halo import Halo
from windlass.plan.layout import PARTIAL, WHOLE, Part, Split
from windlass.plan.placement import Op


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter is cut along `dim` of its own shape, between units of `unit`."""

    dim: int
    unit: int = 1


@dataclass(frozen=True, slots=True)
class Line:
    """What a layer does along one axis.

    Attributes:
        needs: part of each input.
        grads: in what part the gradient of each input comes out.
        output: part of the output.
        cuts: the parameters that are cut; the others lie whole.
        sums: whether the gradients of those that lie whole are addends along the axis.
        halo: the fringe to be fetched.
        own_bias: only the first member adds the bias.
        sync: statistics over samples or places must be summed along the axis.
    """

    needs: tuple[Part, ...]
    grads: tuple[Part, ...]
    output: Part
    cuts: Mapping[str, Cut] = field(default_factory=dict)
    sums: bool = False
    halo: Halo | None = None
    own_bias: bool = False
    sync: bool = False


MakeLine: TypeAlias = Callable[[Op, tuple[Part, ...], int], Line]
Refusal: TypeAlias = Callable[[Op, str], str | None]


def _no_refusal(op: Op, way: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Rule:
    """What a kind of layer can do.

    Attributes:
        lines: what it does, by way.
        refusal: why one layer of the kind cannot take a way of `lines`; None if it can.
        leads: whether a pattern of a placement means it; other layers go on as their inputs lie.
    """

    lines: Mapping[str, MakeLine]
    refusal: Refusal = _no_refusal
    leads: bool = False


DIM_WAYS: dict[str, tuple[str, ...]] = {
    "batch": ("batch",),
    "channel": ("out",),
    "height": ("rows", "out"),
    "width": ("columns", "out"),
}
"""How a layer goes on with an input that is split by this dim: the first way that it can take, or replicated."""

SPATIAL = {"rows": ("height", 0), "columns": ("width", 1)}
"""Dim and place in a pair, by way."""


def rule_of(op: Op) -> Rule:
    """The rule of an op's kind; its own modules' names are compared without case."""
    if op.kind in ARITHMETIC and len(set(op.input_shapes)) > 1:
        return OTHER
    if op.kind == "linear" and len(op.output_shape) != 2:
        return OTHER
    if op.kind == "cat" and op.attribute("dim", 1) not in (1, 1 - len(op.output_shape)):
        return OTHER
    if op.kind == "flatten" and op.output_shape != _flat(op.input_shapes[0]):
        return OTHER
    return RULES.get(op.kind.lower(), OTHER)


def refusal(op: Op, way: str) -> str | None:
    """Why the op cannot take a way along any axis, or None."""
    rule = rule_of(op)
    if way not in rule.lines:
        return f"a layer of kind {op.kind} can be {' or '.join(rule.lines)}"
    return rule.refusal(op, way)


def following_way(op: Op, offered: tuple[Part, ...]) -> str:
    """How an op that nobody named goes on along an axis on which its inputs lie so."""
    for part in offered:
        for way in DIM_WAYS[part.dim] if isinstance(part, Split) else ():
            if refusal(op, way) is None:
                return way
    return "replicate"


def line_of(op: Op, way: str, offered: tuple[Part, ...], axis: int) -> Line:
    """What the op does along an axis of the mesh in this way, its inputs lying as `offered`."""
    return rule_of(op).lines[way](op, offered, axis)


# --- lines --------------------------------------------------------------------------------------------------


def _same(op: Op, part: Part, *, sums: bool = False, halo: Halo | None = None, sync: bool = False) -> Line:
    parts = (part,) * len(op.inputs)
    return Line(parts, parts, part, sums=sums, halo=halo, sync=sync)


def _replicate(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    return _same(op, WHOLE)


def _batch(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    return _same(op, Split("batch"), sums=True)


def _rows(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    return _same(op, Split("height"), sums=True)


def _columns(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    return _same(op, Split("width"), sums=True)


def _windows(way: str, pad: str) -> MakeLine:
    """Rows or columns of a sliding window."""
    dim, place = SPATIAL[way]

    def line(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
        return _same(op, Split(dim), sums=True, halo=Halo(dim, axis, *_geometry(op, place), pad))

    return line


def _channels(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    """Each member its channels from input to output; parameters have one entry a channel."""
    part = _channel_part(offered)
    line = _same(op, part)
    cuts = {name: Cut(0, part.unit) for name, _ in op.parameters}
    return Line(line.needs, line.grads, line.output, cuts=cuts)


def _channel_part(offered: tuple[Part, ...]) -> Split:
    split = (part for part in offered if isinstance(part, Split) and part.dim == "channel")
    return next(split, Split("channel"))


def _out(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    groups = _groups(op)
    unit = 1 if groups == 1 else op.output_shape[1] // groups
    cuts = {name: Cut(0, unit) for name, _ in op.parameters}
    if groups == 1:
        return Line((WHOLE,), (PARTIAL,), Split("channel"), cuts=cuts)
    part = Split("channel", op.input_shapes[0][1] // groups)
    return Line((part,), (part,), Split("channel", unit), cuts=cuts)


def _in(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    part = _channel_part(offered)
    cuts = {"weight": Cut(1, part.unit)}
    return Line((part,), (part,), PARTIAL, cuts=cuts, sums=True, own_bias=True)


def _flatten_channels(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
    """The maps of a channel stay together."""
    part = _channel_part(offered)
    return Line((part,), (part,), Split("channel", part.unit * math.prod(op.input_shapes[0][2:])))


def _synchronised(make: MakeLine) -> MakeLine:
    """Batch normalisation: means and variances over all samples and places."""

    def line(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
        found = make(op, offered, axis)
        return Line(found.needs, found.grads, found.output, sums=True, sync=True)

    return line


def _untied(way: str) -> MakeLine:
    """Rows or columns of a layer whose weights differ from place to place: each place's lie with its outputs."""
    windows = _windows(way, "zero")

    def line(op: Op, offered: tuple[Part, ...], axis: int) -> Line:
        found = windows(op, offered, axis)
        cuts = {name: Cut(dim) for name, shape in op.parameters if (dim := _place_dim(op, shape, way)) is not None}
        return Line(found.needs, found.grads, found.output, cuts=cuts, sums=True, halo=found.halo)

    return line


def _place_dim(op: Op, shape: tuple[int, ...], way: str) -> int | None:
    """Which dim of an untied layer's parameter counts the rows or columns of its output."""
    places = op.output_shape[2:]
    for first in (0, len(shape) - 2):
        if len(shape) >= 2 and shape[first : first + 2] == places:
            return first + SPATIAL[way][1]
    return None


# --- geometry -----------------------------------------------------------------------------------------------


def _geometry(op: Op, place: int) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation along height (0) or width (1)."""
    kernel = _pair(op, "kernel_size", _default_kernel(op))[place]
    stride = _pair(op, "stride", kernel if op.kind.lower() in POOLS else 1)[place]
    return kernel, stride, _pair(op, "padding", 0)[place], _pair(op, "dilation", 1)[place]


def _pair(op: Op, name: str, default: int) -> tuple[int, int]:
    value = op.attribute(name)
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(number, int) for number in value):
        return value
    number = value if isinstance(value, int) else default
    return number, number


def _default_kernel(op: Op) -> int:
    """LeNet-5's own layers: 2 x 2 sums, and the last side of the kernels."""
    return op.parameters[0][1][-1] if op.kind.lower() == "partialconv2d" and op.parameters else 2


def _groups(op: Op) -> int:
    value = op.attribute("groups", 1)
    assert isinstance(value, int), f"{op.name}: groups {value!r}"
    return value


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], math.prod(shape[1:])


# --- refusals -----------------------------------------------------------------------------------------------


def _window_refusal(op: Op, way: str) -> str | None:
    """A window can be cut by rows or columns if nothing but a constant lies beyond the image."""
    if way not in SPATIAL:
        return None
    if len(op.output_shape) != 4:
        return f"only maps of (batch, channels, height, width) have {way}, got {op.output_shape}"
    if op.attribute("padding_mode", "zeros") != "zeros" or isinstance(op.attribute("padding"), str):
        return f"{way} need zeros of a given number as padding"
    return None


def _average_refusal(op: Op, way: str) -> str | None:
    """What an average is divided by must not depend on where the image ends."""
    uneven = op.attribute("ceil_mode", False) or not op.attribute("count_include_pad", True)
    if way in SPATIAL and uneven:
        return f"{way} need a pooling that counts its padding and has no ceil_mode"
    return _window_refusal(op, way)


def _l2_refusal(op: Op, way: str) -> str | None:
    if way == "out" and op.attribute("maps", 1) != 1:
        return f"it pools {op.attribute('maps')} maps together"
    return _window_refusal(op, way)


def _convolution_refusal(op: Op, way: str) -> str | None:
    if way == "in" and _groups(op) > 1:
        return f"the input channels of {_groups(op)} groups are not summed over: only out, by whole groups"
    strange = [name for name, _ in op.parameters if name not in ("weight", "bias")]
    if way in ("out", "in") and strange:
        return f"its parameter {strange[0]} is neither weight nor bias"
    return _window_refusal(op, way)


# --- the table ----------------------------------------------------------------------------------------------

SAMPLES: dict[str, MakeLine] = {"batch": _batch, "replicate": _replicate}
WITHOUT_WINDOW: dict[str, MakeLine] = {**SAMPLES, "rows": _rows, "columns": _columns}


def _sliding(pad: str) -> dict[str, MakeLine]:
    return {**SAMPLES, "rows": _windows("rows", pad), "columns": _windows("columns", pad)}


OTHER = Rule(SAMPLES)
ELEMENTWISE = Rule({**WITHOUT_WINDOW, "out": _channels})
SUBSAMPLING = Rule({**_sliding("zero"), "out": _channels}, _average_refusal)
ARITHMETIC = ("add", "sub", "mul", "div")
POOLS = ("max_pool2d", "avg_pool2d", "subsampling", "l2pool2d")
ALL_CHANNELS = Rule(_sliding("zero"), _average_refusal)

ELEMENTWISE_KINDS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus", "softsign"),
    *("tanh", "sigmoid", "hardtanh", "hardsigmoid", "hardswish", "squash", "dropout", "identity", "clamp", "neg"),
    *("abs", "square", "sqrt", "exp", "contiguous", "clone", *ARITHMETIC),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE_KINDS, ELEMENTWISE),
    "conv2d": Rule({**_sliding("zero"), "out": _out, "in": _in}, _convolution_refusal, leads=True),
    "linear": Rule({**SAMPLES, "out": _out, "in": _in}, _convolution_refusal, leads=True),
    "partialconv2d": Rule(_sliding("zero"), _window_refusal, leads=True),
    "locallyconnected2d": Rule(
        {**SAMPLES, "rows": _untied("rows"), "columns": _untied("columns")}, _window_refusal, leads=True
    ),
    "batch_norm": Rule(
        {
            "batch": _synchronised(_batch),
            "rows": _synchronised(_rows),
            "columns": _synchronised(_columns),
            "out": _channels,
            "replicate": _replicate,
        }
    ),
    "max_pool2d": Rule({**_sliding("lowest"), "out": _channels}, _window_refusal),
    "avg_pool2d": SUBSAMPLING,
    "subsampling": SUBSAMPLING,
    "l2pool2d": Rule({**_sliding("zero"), "out": _channels}, _l2_refusal),
    "subtractivenorm2d": ALL_CHANNELS,
    "divisivenorm2d": ALL_CHANNELS,
    "adaptive_avg_pool2d": Rule({**SAMPLES, "out": _channels}),
    "adaptive_max_pool2d": Rule({**SAMPLES, "out": _channels}),
    "flatten": Rule({**SAMPLES, "out": _flatten_channels}),
    "local_response_norm": Rule(WITHOUT_WINDOW),
    "cat": Rule(WITHOUT_WINDOW),
    "channels": Rule(WITHOUT_WINDOW),
    "stopgradient": ELEMENTWISE,
    "radialbasisoutput": OTHER,
}
"""Rules by kind."""
