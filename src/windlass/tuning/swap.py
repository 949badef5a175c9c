"""Puts Windlass's layers in the place of PyTorch's convolutions, leaving everything else of a module as it was.

Parameters are shared, not copied; hooks, modes, state_dict keys and the user's own attributes stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from windlass.errors import ConfigError
from windlass.plan.convolution import ConvChoice
from windlass.plan.graph import Graph
from windlass.plan.shapes import CONV_KIND, module_name

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps hooks that see its input or output."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What becomes of one convolution: its algorithms, and the activation computed with it."""

    choice: ConvChoice
    activation: Literal["relu"] | None = None


@dataclass(frozen=True, slots=True)
class Follower:
    """A ReLU that follows a convolution in an `nn.Sequential`.

    Attributes:
        sequential, key: where it stands.
        relu: the module.
    """

    sequential: nn.Sequential
    key: str
    relu: nn.ReLU


def is_convolution(module: nn.Module) -> bool:
    """Whether it is PyTorch's Conv2d or Windlass's, and no subclass, whose forward may do anything."""
    from windlass.layers import Conv2d

    return type(module) in (nn.Conv2d, Conv2d)


def refusal(conv: nn.Conv2d) -> str | None:
    """Why a convolution must stay as it is, or None."""
    if "forward" in vars(conv):
        return "its forward was replaced"
    if conv._parameters.get("weight") is None:
        return "its weight is made by a hook"
    if conv.padding_mode != "zeros":
        return f"pads with {conv.padding_mode}, not with zeros"
    if conv.weight.dtype != torch.float32:
        return f"computes in {str(conv.weight.dtype).removeprefix('torch.')}, not in float32"
    if conv.weight.device.type != "cpu":
        return f"is on {conv.weight.device.type}, not on the CPU"
    return None


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """Every convolution of PyTorch's or Windlass's own class by path, each once."""
    found = {}
    for path, child in module.named_modules():
        if is_convolution(child):
            assert isinstance(child, nn.Conv2d)
            found[path] = child
    return found


def followers(module: nn.Module) -> dict[nn.Conv2d, Follower]:
    """The ReLUs that could be computed with the convolution before them, as far as modules tell.

    Both stand side by side in an `nn.Sequential` with PyTorch's own forward, the convolution stands nowhere else,
    and nobody has a hook on either.  Whether the Sequential is called as a whole, only a run tells.
    """
    places: dict[nn.Module, int] = {}
    for parent in module.modules():
        for child in parent._modules.values():
            if child is not None:
                places[child] = places.get(child, 0) + 1
    found = {}
    for parent in module.modules():
        if not isinstance(parent, nn.Sequential) or type(parent).forward is not nn.Sequential.forward:
            continue
        rows = list(parent._modules.items())
        for (_, conv), (key, relu) in pairwise(rows):
            if not isinstance(conv, nn.Conv2d) or not is_convolution(conv) or type(relu) is not nn.ReLU:
                continue
            if places[conv] == 1 and not _has_hooks(conv) and not _has_hooks(relu):
                found[conv] = Follower(parent, key, relu)
    return found


def sole_relus(graph: Graph, module: nn.Module) -> dict[str, Follower]:
    """The followers by layer name that the captured graph shows to be their convolution's only reader."""
    paths = dict(module.named_modules())
    readers: dict[str, list[str]] = {}
    for layer in graph.layers:
        for name in layer.inputs:
            readers.setdefault(name, []).append(layer.name)
    possible = followers(module)
    found = {}
    for layer in graph.layers:
        conv = paths.get(layer.name)
        if layer.kind != CONV_KIND or not isinstance(conv, nn.Conv2d) or conv not in possible:
            continue
        follower, names = possible[conv], readers.get(layer.name, [])
        if len(names) == 1 and paths.get(module_name(names[0])) is follower.relu:
            found[layer.name] = follower
    return found


def swap_convolutions(
    module: nn.Module, swaps: Mapping[nn.Conv2d, Swap], *, relus: Mapping[nn.Conv2d, Follower]
) -> nn.Module:
    """Replaces convolutions in place and returns the module (another one only where it is itself a convolution).

    A convolution that stays PyTorch's in all directions, without an activation, is left alone.

    Args:
        module: where they stand.
        swaps: what becomes of which.
        relus: the ReLU of each that gets an activation; an `nn.Identity` takes its place.

    Raises:
        ConfigError: a convolution cannot be replaced.
    """
    new: dict[nn.Module, nn.Module] = {}
    for conv, swap in swaps.items():
        why = refusal(conv)
        if swap.choice == ConvChoice() and swap.activation is None and type(conv) is nn.Conv2d:
            continue
        if why is not None:
            raise ConfigError(f"convolution {_path(module, conv)}: {why}: only torch computes it")
        new[conv] = converted(conv, swap)
    for conv, swap in swaps.items():
        if swap.activation is not None and conv in relus:
            follower = relus[conv]
            identity = nn.Identity()
            identity.training = follower.relu.training
            follower.sequential._modules[follower.key] = identity
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]
    return new.get(module, module)


def converted(conv: nn.Conv2d, swap: Swap) -> nn.Conv2d:
    """Windlass's layer with everything that `conv` has."""
    from windlass.layers import Conv2d

    before = conv.activation if isinstance(conv, Conv2d) else None
    return Conv2d.from_torch(conv, algorithm=str(swap.choice), activation=swap.activation or before)


def _path(module: nn.Module, conv: nn.Module) -> str:
    return next((path for path, child in module.named_modules() if child is conv), "") or "itself"


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)
