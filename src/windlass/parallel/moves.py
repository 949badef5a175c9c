"""Moves a tensor from one layout to another, and its gradient back.

The steps are the plan's (`windlass.plan.layout.route`).  A move is one operation for autograd: forward it runs the
steps of the tensor, backward those of the gradient, which start from the layout in which the consumer computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from windlass.parallel.transport import Shape, Tag, Transport, reduce, total
from windlass.plan.layout import Box, Layout, Step, after, box_shape, extents, local_shape, message_boxes
from windlass.plan.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Edge:
    """What lies between the producer of a tensor and one of its consumers.

    Attributes:
        consumer: for whom the bytes are counted.
        source, steps: the producer's layout and the way to what the consumer needs.
        grad_source, back_steps: in what layout the consumer's gradient comes, and its way back.
    """

    consumer: str
    source: Layout
    steps: tuple[Step, ...]
    grad_source: Layout
    back_steps: tuple[Step, ...]

    @property
    def silent(self) -> bool:
        """Whether nothing is to be done in either direction."""
        return not self.steps and not self.back_steps


def move(tensor: Tensor, edge: Edge, *, shape: Shape, transport: Transport, fresh: bool = False) -> Tensor:
    """The tensor as the consumer needs it.

    Args:
        tensor: this worker's part.
        edge: whence and whither.
        shape: of the whole tensor.
        transport: the way to the others.
        fresh: the result will be written in place and must not share the tensor's memory.
    """
    if edge.silent:
        return tensor
    moved: Tensor = _Move.apply(tensor, edge, shape, transport, fresh)  # type: ignore[no-untyped-call]
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, edge: Edge, shape: Shape, transport: Transport, fresh: bool) -> Tensor:
        ctx.edge, ctx.shape, ctx.transport = edge, shape, transport
        moved = run_steps(tensor, edge.source, edge.steps, shape, transport, tag=(edge.consumer, "forward"))
        if moved.untyped_storage() is tensor.untyped_storage() or moved._is_view():
            return moved.clone() if fresh else moved.view_as(moved)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        edge = ctx.edge
        tag = (edge.consumer, "backward")
        moved = run_steps(grad, edge.grad_source, edge.back_steps, ctx.shape, ctx.transport, tag=tag)
        return moved, None, None, None, None


def run_steps(
    tensor: Tensor, source: Layout, steps: tuple[Step, ...], shape: Shape, transport: Transport, *, tag: Tag
) -> Tensor:
    """This worker's part after the steps; `shape` is that of the whole."""
    at = source
    for step in steps:
        if step.kind == "reduce":
            tensor = reduce(transport, tensor, step.axis, tag=tag)
        elif step.kind == "slice":
            tensor = tensor[own_part(shape, at, step, transport)]
        else:
            tensor = _exchange(tensor, shape, at, step, transport, tag)
        at = after(at, step)
    return tensor


def own_part(shape: Shape, at: Layout, step: Step, transport: Transport) -> tuple[slice, ...]:
    """Where a ``slice`` finds this worker's part."""
    send, _ = _boxes(shape, at, step, transport.mesh, transport.rank)
    return slices(send[transport.mesh.coordinates(transport.rank)[step.axis]])


def _exchange(tensor: Tensor, shape: Shape, at: Layout, step: Step, transport: Transport, tag: Tag) -> Tensor:
    send, receive = _boxes(shape, at, step, transport.mesh, transport.rank)
    pieces = transport.exchange(
        step.axis, [tensor[slices(box)] for box in send], [box_shape(box) for box in receive], tag=tag
    )
    if step.kind == "scatter":
        return total(pieces)
    return assemble(pieces, receive, local_shape(shape, after(at, step), transport.mesh, transport.rank))


def assemble(pieces: list[Tensor], boxes: tuple[Box, ...], shape: Shape) -> Tensor:
    """One tensor of the pieces, each at its box."""
    out = pieces[0].new_empty(shape)
    for piece, box in zip(pieces, boxes, strict=True):
        if math.prod(piece.shape):
            out[slices(box)].copy_(piece)
    return out


@lru_cache(maxsize=4096)
def _boxes(shape: Shape, at: Layout, step: Step, mesh: Mesh, rank: int) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    return message_boxes(shape, at, step, mesh, rank)


def slices(box: Box) -> tuple[slice, ...]:
    """A box as an index."""
    return tuple(slice(start, stop) for start, stop in box)


def part_of(whole: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    """The view of a whole tensor that `rank` holds under a layout."""
    return whole[slices(extents(tuple(whole.shape), layout, mesh, rank))]
