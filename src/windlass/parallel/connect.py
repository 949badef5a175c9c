"""Keeps a worker in the autograd graph where it has nothing to compute.

A part can be empty: fewer rows or channels than workers, no samples.  The worker still takes part in every exchange of
the backward pass, so its empty tensors must lead to its inputs and parameters as the others' do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def nothing(shape: Sequence[int], sources: Sequence[Tensor]) -> Tensor:
    """Zeros of `shape` whose gradient reaches all `sources`, as zeros."""
    zeros: Tensor = _Nothing.apply(tuple(shape), *sources)  # type: ignore[no-untyped-call]
    return zeros


def attach(tensor: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """The tensor itself; the `sources`, which had no part in it, get zeros as gradients."""
    attached: Tensor = _Attach.apply(tensor, *sources)  # type: ignore[no-untyped-call]
    return attached


def _zeros(ctx: Any, given: int) -> list[Tensor | None]:
    wanted = ctx.needs_input_grad[given:]
    return [
        torch.zeros(shape, dtype=dtype, device=device) if want else None
        for want, (shape, dtype, device) in zip(wanted, ctx.sources, strict=True)
    ]


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *sources: Tensor) -> Tensor:
        ctx.sources = [(source.shape, source.dtype, source.device) for source in sources]
        return sources[0].new_zeros(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_zeros(ctx, 1))


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *sources: Tensor) -> Tensor:
        ctx.sources = [(source.shape, source.dtype, source.device) for source in sources]
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *_zeros(ctx, 1))
