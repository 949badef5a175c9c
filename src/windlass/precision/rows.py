"""A fully connected layer with many weights, by ranges of its outputs: of one range at a time weights are float32.

Each range is a layer of its own to autograd, which takes them in turn on the way back: a range's weights are widened,
its gradient is computed, rounded, and forgotten before the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from windlass.precision.slices import LARGE, slices
from windlass.precision.stored import Stored

TakeRows = Callable[[Stored, slice, Tensor], None]
"""Gets the gradient of a range of a parameter's first dimension."""


class _Range(torch.autograd.Function):
    """A range of a weight on the way forward; on the way back its gradient goes to whoever keeps it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, stored: Stored, rows: slice, take: TakeRows) -> Tensor:
        ctx.stored, ctx.rows, ctx.take, ctx.version = stored, rows, take, stored.version
        return stored.part(rows).wide()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        if ctx.stored.version != ctx.version:
            raise RuntimeError(f"{ctx.stored.name} was changed between the forward and the backward pass")
        ctx.take(ctx.stored, ctx.rows, gradients[0])
        return None, None, None, None


def linear_by_rows(
    x: Tensor, parameter: nn.Parameter, bias: Tensor | None, *, stored: Stored, take: TakeRows,
    know: Callable[[Tensor, Stored], None],
) -> Tensor:  # fmt: skip
    """`functional.linear` with the weight that is stored.

    Args:
        x: the layer's input.
        bias: one number an output, or None.
        parameter: the weight, hidden.
        stored: its codes.
        take: gets its gradient.
        know: is told of the widened weights of each range, and of what they are.
    """
    outputs = []
    for rows in slices(stored.codes, LARGE):
        weight = _Range.apply(parameter, stored, rows, take)  # type: ignore[no-untyped-call]
        know(weight, stored.part(rows))
        outputs.append(functional.linear(x, weight, None if bias is None else bias[rows]))
    return torch.cat(outputs, dim=-1)
