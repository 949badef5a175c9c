"""A large parameter in slices of its first dimension, so that the optimizer has little of it in float32 at once.

The rules of `ELEMENTWISE` change every number by its own gradient and its own state alone: a slice is stepped as if it
were a parameter, with its part of the state.  What the state has once for all numbers (how many steps there were) is
the same before every slice, and that of the last slice stays.  Other optimizers see a parameter as a whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
)  # fmt: skip
"""Optimizers that can be given a slice of a parameter."""
LARGE = 1 << 21
"""Of a parameter with more numbers so many are float32 at once."""


def slices(x: Tensor, most: int) -> list[slice]:
    """Ranges of the first dimension with at most so many numbers; one range where it cannot be cut in memory.

    >>> slices(torch.empty(5, 2), 4)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    >>> slices(torch.empty(5, 2).t(), 4)
    [slice(0, 2, None)]
    """
    length, row = x.shape[0], math.prod(x.shape[1:])
    step = max(1, most // max(1, row)) if x.stride(0) == row else length
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class SlicedState:
    """The optimizer's state of one parameter, of which it sees a slice at a time.

    Args:
        optimizer: one of `ELEMENTWISE`.
        parameter: its own.
        like: has the whole parameter's shape and strides.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, like: Tensor) -> None:
        self._states, self._parameter, self._like = optimizer.state, parameter, like
        self._before: dict[str, Any] = dict(self._states.get(parameter, {}))
        self._after: dict[str, Any] = {}

    def show(self, part: slice) -> None:
        """The optimizer finds the state of this slice."""
        self._states[self._parameter] = {key: self._of(value, part) for key, value in self._before.items()}

    def take(self, part: slice) -> None:
        """What the optimizer has left becomes part of the whole."""
        shape = self._like[part].shape
        for key, value in self._states[self._parameter].items():
            if not (isinstance(value, Tensor) and value.shape == shape):
                self._after[key] = value
                continue
            if key not in self._after:
                known = self._before.get(key)
                self._after[key] = self._empty(value) if known is None else known
            whole = self._after[key]
            if whole.untyped_storage()._cdata != value.untyped_storage()._cdata:
                whole[part].copy_(value)

    def give_back(self) -> None:
        """The optimizer has the whole state."""
        if self._after or self._parameter in self._states:
            self._states[self._parameter] = self._after

    def _empty(self, like: Tensor) -> Tensor:
        return torch.empty_strided(self._like.shape, self._like.stride(), dtype=like.dtype)

    def _of(self, value: Any, part: slice) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value[part] if value.shape == self._like.shape else value.clone()
