"""What counts as one layer of a network."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def is_leaf(module: nn.Module) -> bool:
    """Whether one call of `module` is one layer: it has no children, or they only re-parametrise it."""
    if isinstance(module, nn.MultiheadAttention):
        return True  # it uses its child's weights without calling it
    children = [name for name, _ in module.named_children()]
    return not children or (parametrize.is_parametrized(module) and children == ["parametrizations"])
