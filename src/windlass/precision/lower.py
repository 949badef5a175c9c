"""Rounding after the layers of a model, by kinds of layers: the two ways of QPyTorch's `auto_low`.

A kind is what one of PyTorch's own files of layers lists, and Windlass' layers of that kind.  Subclasses count as their
base, and a layer is taken as a whole: what it contains is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import (
    activation,
    batchnorm,
    conv,
    dropout,
    fold,
    instancenorm,
    linear,
    loss,
    normalization,
    padding,
    pooling,
)

from windlass.errors import ConfigError, unknown
from windlass.layers.local import DivisiveNorm2d, L2Pool2d, LocallyConnected2d, SubtractiveNorm2d

Types = tuple[type[nn.Module], ...]


def _listed(*files: ModuleType) -> Types:
    return tuple(getattr(file, name) for file in files for name in file.__all__)


LAYER_TYPES: dict[str, Types] = {
    "conv": (*_listed(conv, fold), LocallyConnected2d),
    "linear": _listed(linear),
    "pool": (*_listed(pooling), L2Pool2d),
    "pad": _listed(padding),
    "activation": _listed(activation),
    "normalization": (*_listed(batchnorm, instancenorm, normalization), SubtractiveNorm2d, DivisiveNorm2d),
    "dropout": _listed(dropout),
    "loss": _listed(loss),
}
# Attention stands in the file of activations, but is a small network; it reads the weights of its last layer itself.
_NEVER: Types = (nn.Identity, nn.MultiheadAttention, linear.NonDynamicallyQuantizableLinear)

_NAME = "output_quantizer"  # of the rounding among a layer's modules


class Rounded(nn.Sequential):
    """A layer, `[0]`, and the rounding of its output, `[1]`; takes whatever the layer takes."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, rounded; of several tensors (a pooling's indices, say) the first."""
        return _round_first(self[1], self[0](*args, **kwargs))


def round_outputs(model: nn.Module, layer_types: Sequence[str], quantizer: Callable[[], nn.Module]) -> nn.Module:
    """Adds to every layer of these kinds a module `output_quantizer`, which its output goes through; returns `model`.

    Names of parameters stay as they are.  A layer that has one already gets the new one after it.

    Raises:
        ConfigError: there is no such kind, or no such layer in the model.
    """
    found = {id(layer): layer for _, _, layer in _find(nn.ModuleList([model]), layer_types)}
    for layer in found.values():
        _add(layer, quantizer())
    return model


def _add(layer: nn.Module, quantizer: nn.Module) -> None:
    if hasattr(layer, _NAME):
        quantizer = nn.Sequential(getattr(layer, _NAME), quantizer)
    else:
        layer.register_forward_hook(_hook)
    layer.add_module(_NAME, quantizer)


def append_rounding(model: nn.Module, layer_types: Sequence[str], quantizer: Callable[[], nn.Module]) -> nn.Module:
    """A copy of `model` with `Rounded(layer, quantizer())` in place of every layer of these kinds.

    A layer that stands in several places stays one layer.

    Raises:
        ConfigError: there is no such kind, or no such layer in the model.
    """
    holder = nn.ModuleList([copy.deepcopy(model)])
    rounded: dict[int, Rounded] = {}
    for parent, name, layer in _find(holder, layer_types):
        if id(layer) not in rounded:
            rounded[id(layer)] = Rounded(layer, quantizer())
        parent.add_module(name, rounded[id(layer)])
    return holder[0]


def _find(holder: nn.Module, layer_types: Sequence[str]) -> list[tuple[nn.Module, str, nn.Module]]:
    """The layers in `holder`, each with the module that it stands in and its name there."""
    types = _types(layer_types)
    found = list(_walk(holder, types))
    if layer_types and not found:
        raise ConfigError(f"the model has no layer of type {', '.join(layer_types)}: nothing would be rounded")
    return found


def _walk(parent: nn.Module, types: Types) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for name, child in parent._modules.items():  # named_children would leave out a layer's second place
        if child is None:
            continue
        if isinstance(child, types) and not isinstance(child, _NEVER):
            yield parent, name, child
        else:
            yield from _walk(child, types)


def _types(layer_types: Sequence[str]) -> Types:
    if isinstance(layer_types, str) or not isinstance(layer_types, Sequence):
        raise ConfigError(f"layer_types is a list of {', '.join(LAYER_TYPES)}; got {layer_types!r}")
    for kind in layer_types:
        if kind not in LAYER_TYPES:
            raise ConfigError(unknown("layer type", str(kind), list(LAYER_TYPES)))
    return tuple(kind for name in layer_types for kind in LAYER_TYPES[name])


def _hook(layer: nn.Module, args: Any, output: Any) -> Any:
    return _round_first(getattr(layer, _NAME), output)


def _round_first(quantizer: nn.Module, output: Any) -> Any:
    if isinstance(output, Tensor):
        return quantizer(output)
    first, *others = output
    return (quantizer(first), *others)
