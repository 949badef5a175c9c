"""What one worker computes of an op: the network's own layer with the worker's part of its parameters.

A layer of the network is copied with its type and settings, so that PyTorch's, Windlass's and a user's own layers
compute as they did; only parameters are cut, and with them the settings that say their sizes.  Where a fringe is
fetched, the padding along it comes with it and the copy has none there.  Three kinds need more than a copy: batch
normalisation meets the other workers, dropout draws the whole batch's mask, and of a layer whose input channels are
divided only the first worker adds the bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from windlass.errors import ConfigError
from windlass.parallel.calls import Call, invoke
from windlass.parallel.connect import attach
from windlass.parallel.masks import PlacedDropout, Position
from windlass.parallel.moves import part_of
from windlass.parallel.normalise import PlacedBatchNorm
from windlass.parallel.transport import Transport
from windlass.plan.derive import Parameter, Placed
from windlass.plan.layout import DIMS, WHOLE, Layout, Split
from windlass.plan.rules import Cut

DIM_NAMES = {place: name for name, place in DIMS.items()}


def layout_of(parameter: Parameter) -> Layout:
    """How a parameter lies, its dims called as those of activations are."""
    return tuple(Split(DIM_NAMES[cut.dim], cut.unit) if isinstance(cut, Cut) else WHOLE for cut in parameter.layout)


@dataclass
class Builder:
    """Makes the local modules of one worker.

    Attributes:
        transport: the way to the others.
        position: what the ops share.
        parameters: the parameters made so far, by the whole one's identity: what is shared stays shared.
        modules: the layers made so far, by the network's layer.
    """

    transport: Transport
    position: Position
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    modules: dict[int, tuple[tuple[str, ...], nn.Module]] = field(default_factory=dict)

    def build(self, call: Call, placed: Placed, number: int, weights: Callable[[str], Tensor]) -> nn.Module:
        """The local module of an op.

        Args:
            call: how the whole op is computed.
            placed: how it lies.
            number: its place among the ops.
            weights: looks up a parameter of the placed network by its full name.

        Raises:
            ConfigError: a layer that is called twice lies in two ways.
        """
        if not isinstance(call.target, nn.Module):
            return Function(call, weights)
        known = self.modules.get(id(call.target))
        if known is not None and placed.op.kind != "dropout":
            if known[0] != placed.ways and any(True for _ in call.target.parameters()):
                raise ConfigError(
                    f"layer {placed.op.name} is called twice and divided in two ways: {', '.join(known[0])} and"
                    f" {', '.join(placed.ways)}; its weights can lie in one way only"
                )
            if known[0] == placed.ways:
                return known[1]
        made = SPECIAL.get(placed.op.kind, _copy)(self, call.target, placed, number)
        self.modules[id(call.target)] = (placed.ways, made)
        return made

    def divided(self, module: nn.Module, placed: Placed) -> nn.Module:
        """A copy of a layer with this worker's part of its parameters and buffers."""
        made = copy.copy(module)
        for table in ("_parameters", "_buffers", "_modules"):
            made.__dict__[table] = dict(module.__dict__[table])
        layouts = {parameter.name: layout_of(parameter) for parameter in placed.parameters}
        for name, whole in module._parameters.items():
            if whole is not None:
                made._parameters[name] = self._parameter(whole, layouts.get(name))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made._buffers[name] = self._part(buffer, buffer_layout(placed, name)).clone()
        return made

    def _parameter(self, whole: nn.Parameter, layout: Layout | None) -> nn.Parameter:
        if id(whole) not in self.parameters:
            part = self._part(whole.detach(), layout).clone()
            self.parameters[id(whole)] = nn.Parameter(part, requires_grad=whole.requires_grad)
        return self.parameters[id(whole)]

    def _part(self, whole: Tensor, layout: Layout | None) -> Tensor:
        return whole if layout is None else part_of(whole, layout, self.transport.mesh, self.transport.rank)


CUT_BUFFERS: Mapping[str, tuple[str, ...]] = {"batch_norm": ("running_mean", "running_var")}
"""Buffers that lie as the channels of the output do; all others are whole everywhere."""


def buffer_layout(placed: Placed, name: str) -> Layout | None:
    """How a buffer lies, its channels being its dim 0; None: whole."""
    if name not in CUT_BUFFERS.get(placed.op.kind, ()):
        return None
    return tuple(
        Split("batch", part.unit) if isinstance(part, Split) and part.dim == "channel" else WHOLE
        for part in placed.output
    )


# --- kinds of their own -------------------------------------------------------------------------------------


def _copy(builder: Builder, module: nn.Module, placed: Placed, number: int) -> nn.Module:
    made = builder.divided(module, placed)
    _resize(made, placed)
    _unpad(made, placed)
    return made


def _resize(made: nn.Module, placed: Placed) -> None:
    """Sets what a layer says of its sizes."""
    weight = made._parameters.get("weight")
    if isinstance(made, nn.Conv2d) and weight is not None:
        filters, depth = weight.shape[:2]
        if made.groups > 1:
            made.groups = max(1, filters // (made.out_channels // made.groups))
        made.out_channels, made.in_channels = filters, depth * made.groups
    elif isinstance(made, nn.Linear) and weight is not None:
        made.out_features, made.in_features = weight.shape


def _unpad(made: Any, placed: Placed) -> None:
    """Takes away the padding that comes with the fringes."""
    dims = {DIMS[halo.dim] - 2 for halo in placed.halos}
    padding = placed.op.attribute("padding")
    if not dims or not isinstance(padding, tuple) or not hasattr(made, "padding"):
        return
    if isinstance(made.padding, str) and len(dims) == 1 and made.padding == "same":
        other = 1 - min(dims)
        if made.dilation[other] * (made.kernel_size[other] - 1) % 2:
            raise ConfigError(
                f"layer {placed.op.name}: padding 'same' around an even kernel cannot be divided along one dim alone"
            )
    made.padding = tuple(0 if place in dims else number for place, number in enumerate(padding))


def _addend(builder: Builder, module: nn.Module, placed: Placed, number: int) -> nn.Module:
    made = _copy(builder, module, placed, number)
    if "in" in placed.ways and getattr(module, "activation", None) is not None:
        raise ConfigError(
            f"layer {placed.op.name}: its activation is part of it and wants the whole sum, so its input channels"
            " cannot be divided"
        )
    places = builder.transport.mesh.coordinates(builder.transport.rank)
    if made._parameters.get("bias") is None or not any(places[axis] for axis in placed.own_bias_axes):
        return made
    return Addend(made)


def _batch_norm(builder: Builder, module: nn.Module, placed: Placed, number: int) -> nn.Module:
    made: Any = builder.divided(module, placed)
    if made._parameters.get("weight") is not None:
        made.num_features = made._parameters["weight"].shape[0]
    if not placed.sync_axes:
        return made  # type: ignore[no-any-return]
    return PlacedBatchNorm(made, axes=placed.sync_axes, transport=builder.transport, name=placed.op.name).train(
        module.training
    )


def _dropout(builder: Builder, module: Any, placed: Placed, number: int) -> nn.Module:
    return PlacedDropout(
        module.p,
        shape=placed.op.output_shape,
        layout=placed.output,
        mesh=builder.transport.mesh,
        rank=builder.transport.rank,
        position=builder.position,
        number=number,
    ).train(module.training)


SPECIAL: Mapping[str, Callable[[Builder, Any, Placed, int], nn.Module]] = {
    "conv2d": _addend,
    "linear": _addend,
    "batch_norm": _batch_norm,
    "dropout": _dropout,
}
"""Kinds that need more than a copy."""


class Addend(nn.Module):
    """A convolution or linear layer whose bias another worker adds; its own gets zeros as gradient."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            self.register_parameter(name, layer._parameters[name])
        self._layer = (layer,)  # no child: the parameters are this module's

    def forward(self, x: Tensor) -> Tensor:
        """The addend without bias."""
        layer: Any = self._layer[0]
        if isinstance(layer, nn.Linear):
            return attach(functional.linear(x, self.weight), [self.bias])
        return attach(layer._conv_forward(x, self.weight, None), [self.bias])


class Function(nn.Module):
    """A function of tensors, as a layer without parameters of its own."""

    def __init__(self, call: Call, weights: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._call, self._weights = call, weights

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call it on this worker's parts."""
        target: Any = self._call.target
        result: Tensor = invoke(target, self._call, inputs, self._weights)
        return result

    def extra_repr(self) -> str:
        """What is called."""
        return str(getattr(self._call.target, "__name__", self._call.target))
