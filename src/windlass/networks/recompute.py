"""Activation checkpointing: a network's blocks keep their inputs and compute the rest again in the backward pass.

What is a block.  The network's children are looked at (those of its only child, where it wraps another network).  An
`nn.Sequential` is opened; its members run in blocks, each of which ends after a pooling layer or before a member that
is a network of its own (a residual block, an Inception), and layers that follow such a member are of its block.  So
VGG's and AlexNet's features fall into their stages, ResNet's stages into residual blocks.  Any other child with
children of its own is one block.  A layer that stands directly in the network is none, nor does a block begin with a
layer that writes into its input, for that input would be gone when the block runs again.

A block runs under `torch.utils.checkpoint` (without reentrance) in training only.  Names of modules and parameters
stay as they are: a module's ``forward`` is shadowed, nothing is moved.  In the second run the block's buffers are
copies, so BatchNorm's running statistics see each batch once; random states are put back where a block may draw.

Source: Chen, Xu, Zhang, Guestrin 2016, arXiv:1604.06174, section 4.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from itertools import islice, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from windlass.errors import ConfigError

_AGAIN: ContextVar[bool] = ContextVar("recomputing", default=False)
POOLS = ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "FractionalMaxPool", "LPPool")
"""How the names of PyTorch's pooling layers begin."""


def is_recomputing() -> bool:
    """Whether what runs now is a block's second run."""
    return _AGAIN.get()


def recompute_blocks(module: nn.Module, *, name: str = "") -> tuple[str, ...]:
    """Has every block of the network computed again in the backward pass; the blocks, as paths of their modules.

    A network that is so already stays as it is.

    Args:
        module: the network; changed.
        name: what errors call it.

    Raises:
        ConfigError: it has no blocks.
    """
    found: list[str] = []
    path, network = _unwrapped(module)
    for key, child in [("", network)] if _opens(network) else network.named_children():
        place = ".".join(filter(None, (path, key)))
        if _opens(child):
            found += _divide(child, place)
        elif any(True for _ in child.children()):
            found.append(place)
            _shadow(child, functools.partial(_run, child.forward, (child,)))
    if not found:
        raise ConfigError(
            f"recompute: network {name or type(module).__name__!r} has no blocks: all its layers stand in one module "
            f"of their own forward; put parts of it into nn.Sequential or modules"
        )
    return tuple(found)


def _unwrapped(module: nn.Module) -> tuple[str, nn.Module]:
    """The network inside modules that hold nothing but it, and its path."""
    path: list[str] = []
    while not _opens(module):
        children = list(module.named_children())
        if len(children) != 1 or not any(True for _ in children[0][1].children()):
            break
        path.append(children[0][0])
        module = children[0][1]
    return ".".join(path), module


def _opens(module: nn.Module) -> bool:
    """Whether it runs its members one after another and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _divide(sequential: nn.Module, path: str) -> list[str]:
    """Shadows a Sequential's forward with one that runs it block by block."""
    assert isinstance(sequential, nn.Sequential)
    members = list(sequential.named_children())
    if not members:
        return []
    bounds = (0, *_cuts([member for _, member in members]), len(members))
    _shadow(sequential, functools.partial(_run_blocks, sequential, bounds))
    names = [key for key, _ in members]
    return [
        f"{path}.{names[start]}".lstrip(".") + (f"..{names[stop - 1]}" if stop - start > 1 else "")
        for start, stop in pairwise(bounds)
    ]


def _cuts(members: Sequence[nn.Module]) -> list[int]:
    """Where a new block begins among a Sequential's members, the first left out.

    >>> _cuts([nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(1, 1, 1), nn.ReLU()])
    [3]
    """
    cuts = []
    for index, (before, member) in enumerate(pairwise(members), start=1):
        is_own = any(True for _ in member.children()) and not _opens(member)
        begins = _last(before).startswith(POOLS) or is_own
        if begins and not getattr(member, "inplace", False):
            cuts.append(index)
    return cuts


def _last(module: nn.Module) -> str:
    """The class of the last layer of a Sequential, or of the module itself."""
    while _opens(module) and isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return type(module).__name__


def _shadow(module: nn.Module, forward: Callable[..., Any]) -> None:
    if "forward" not in vars(module):
        module.forward = forward


def _run_blocks(sequential: nn.Sequential, bounds: tuple[int, ...], value: Any) -> Any:
    for start, stop in pairwise(bounds):
        members = tuple(islice(sequential, start, stop))
        value = _run(functools.partial(_chain, members), members, value)
    return value


def _chain(members: tuple[nn.Module, ...], value: Any) -> Any:
    for member in members:
        value = member(value)
    return value


def _run(function: Callable[..., Any], members: tuple[nn.Module, ...], *args: Any) -> Any:
    """`function`, which runs these modules; in training without keeping what it computes."""
    if not torch.is_grad_enabled() or not members[0].training:
        return function(*args)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=any(map(_may_draw, members)),
        context_fn=lambda: (nullcontext(), _again(members)),
    )


def _may_draw(module: nn.Module) -> bool:
    """Whether it may draw random numbers: dropout with a chance, and every layer that is not PyTorch's own."""
    layers = [layer for layer in module.modules() if not any(True for _ in layer.children())]
    known = [layer for layer in layers if type(layer).__module__.startswith(("torch.", "windlass.layers"))]
    return len(known) < len(layers) or any(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in layers)


@contextmanager
def _again(members: tuple[nn.Module, ...]) -> Iterator[None]:
    """A second run: whatever it writes into buffers goes into copies."""
    layers = [layer for member in members for layer in member.modules()]
    held = [(layer, dict(layer._buffers)) for layer in layers if layer._buffers]
    token = _AGAIN.set(True)
    try:
        for layer, buffers in held:
            layer._buffers.update({name: buffer.clone() for name, buffer in buffers.items() if buffer is not None})
        yield
    finally:
        for layer, buffers in held:
            layer._buffers.update(buffers)
        _AGAIN.reset(token)
