"""What a divided network takes over from the whole one beside its layers: order, names, its own objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from windlass.errors import ConfigError
from windlass.parallel.trace import Traced


def ancestors(traced: Traced, names: Sequence[str]) -> set[str]:
    """The ops of these names and all that they depend on."""
    found = set(names)
    for op in reversed(traced.ops):
        if op.name in found:
            found.update(op.inputs)
    return found


def refuse_names(module: nn.Module, placed: nn.Module) -> None:
    """Raises ConfigError where a part of the network is called as an attribute that a divided network has."""
    for name in (*dict(module.named_children()), *module._parameters, *module._buffers):
        if hasattr(placed, name):
            raise ConfigError(f"a part of the network is called {name!r}, which a divided network uses itself")


def put_in_order(placed: nn.Module, network: nn.Module) -> None:
    """Gives parts and parameters the network's order, which optimizers and files go by."""
    for table in ("_modules", "_parameters"):
        ours, order = getattr(placed, table), list(getattr(network, table))
        known = sorted(ours.items(), key=lambda row: order.index(row[0]) if row[0] in order else len(order))
        ours.clear()
        ours.update(known)
    for name, part in placed.named_children():
        whole = network._modules.get(name)
        if whole is not None:
            put_in_order(part, whole)


def without_tensors(module: nn.Module, name: str) -> Any:
    """An attribute of the network that does not hold its parameters: methods get a network without any."""
    value = getattr(module, name)
    if getattr(value, "__self__", None) is not module:
        return value
    empty = module.__class__.__new__(module.__class__)
    empty.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        empty.__dict__[table] = {}
    return getattr(empty, name)
