"""Dropout whose mask does not depend on where a sample is computed.

Each sample's mask is drawn from (seed of the step, number of the op, number of the sample), whole; a worker keeps the
part that it holds.  So every placement, and every number of workers, drops the same activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from windlass.plan.layout import Layout, extents
from windlass.plan.mesh import Mesh

MASK_63 = (1 << 63) - 1


@dataclass(slots=True)
class Position:
    """Where a run is; all ops of a placed network look at one.

    Attributes:
        seed: of the step's random numbers.
        batch: samples of the forward pass, all workers' together.
        samples: the numbers of these samples within the step; None: from 0.
    """

    seed: int = 0
    batch: int = 0
    samples: Sequence[int] | None = None


def mixed(*numbers: int) -> int:
    """A 63-bit number that differs for other `numbers` (the finaliser of splitmix64, Steele et al. 2014).

    >>> mixed(1, 2) == mixed(1, 2), mixed(1, 2) == mixed(2, 1)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state ^ (number & ((1 << 64) - 1))) + 0x9E3779B97F4A7C15 & ((1 << 64) - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & ((1 << 64) - 1)
        state ^= state >> 31
    return state & MASK_63


class PlacedDropout(nn.Module):
    """Dropout of elements on this worker's part of a tensor.

    Args:
        p: share of elements that are dropped.
        shape: of the whole tensor; its batch is the position's.
        layout, mesh, rank: what the worker holds.
        position: the run's.
        number: of the op within the network.
    """

    def __init__(
        self,
        p: float,
        *,
        shape: tuple[int, ...],
        layout: Layout,
        mesh: Mesh,
        rank: int,
        position: Position,
        number: int,
    ) -> None:
        super().__init__()
        self.p, self.shape, self.layout = p, shape, layout
        self.mesh, self.rank, self.position, self.number = mesh, rank, position, number

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training, scaled so that the expectation stays; nothing in evaluation."""
        if not self.training or self.p == 0:
            return x
        dropped: Tensor = _Drop.apply(x, self.mask(x), 1 / (1 - self.p) if self.p < 1 else 0.0)  # type: ignore[no-untyped-call]
        return dropped

    def mask(self, x: Tensor) -> Tensor:
        """Which of the worker's elements stay."""
        (first, last), *box = extents((self.position.batch, *self.shape[1:]), self.layout, self.mesh, self.rank)
        mask = torch.empty(tuple(x.shape), dtype=torch.bool)
        whole = torch.empty(self.shape[1:], dtype=torch.bool)
        part = whole[tuple(slice(start, stop) for start, stop in box)]
        generator = torch.Generator()
        samples = self.position.samples
        for row, place in enumerate(range(first, last)):
            sample = place if samples is None else samples[place]
            generator.manual_seed(mixed(self.position.seed, self.number, sample))
            whole.bernoulli_(1 - self.p, generator=generator)
            mask[row].copy_(part)
        return mask.to(x.device)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(mask)
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None, None
