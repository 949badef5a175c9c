"""Fetches the fringe of rows or columns that a tile of a layer's output reads in its neighbours' tiles.

Forward, every worker gets the rows that its outputs read and lays the padding around them; backward, the gradient
of each row goes back to the row's owner, who adds what the readers have sent, in the group's order.  Who reads what
is the plan's (`windlass.plan.halo`); it depends on lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from windlass.parallel.transport import Tag, Transport
from windlass.plan.halo import Halo, Range
from windlass.plan.layout import DIMS, bounds
from windlass.plan.mesh import Mesh

LOWEST = float("-inf")


@dataclass(frozen=True, slots=True)
class Fringe:
    """One worker's messages for one halo; rows count from the start of what is sent or received.

    Attributes:
        dim, axis: the tensor's dim, the mesh's axis.
        gives: per member, the own rows that it reads.
        takes: per member, where its rows lie in what this worker reads.
        own_length, read_length: rows that this worker owns, rows of the image that it reads.
        before, behind: rows of padding around those.
        value: of the padding.
        talks: whether anybody along the axis reads a row of another's.
    """

    dim: int
    axis: int
    gives: tuple[Range, ...]
    takes: tuple[Range, ...]
    own_length: int
    read_length: int
    before: int
    behind: int
    value: float
    talks: bool


@lru_cache(maxsize=4096)
def fringe(halo: Halo, in_length: int, out_length: int, mesh: Mesh, rank: int) -> Fringe:
    """This worker's messages where `in_length` rows of the whole image give `out_length`."""
    parts, place = mesh.extent(halo.axis), mesh.coordinates(rank)[halo.axis]
    fetches = halo.fetches(in_length, out_length, parts)
    owned = bounds(in_length, parts)
    low, high = halo.reads(in_length, out_length, parts, place)
    outputs = bounds(out_length, parts)
    first, last = halo.window(outputs[place], outputs[place + 1])
    empty = outputs[place] == outputs[place + 1]
    return Fringe(
        dim=DIMS[halo.dim],
        axis=halo.axis,
        gives=tuple(_from(rows[place], owned[place]) for rows in fetches),
        takes=tuple(_from(rows, low) for rows in fetches[place]),
        own_length=owned[place + 1] - owned[place],
        read_length=high - low,
        before=0 if empty else low - first,
        behind=0 if empty else last - high,
        value=LOWEST if halo.pad == "lowest" else 0.0,
        talks=any(
            rows[0] < rows[1] for reader, row in enumerate(fetches) for owner, rows in enumerate(row) if reader != owner
        ),
    )


def _from(rows: Range, start: int) -> Range:
    return (rows[0] - start, rows[1] - start) if rows[0] < rows[1] else (0, 0)


def fetch(tensor: Tensor, fringes: tuple[Fringe, ...], *, transport: Transport, tag: str) -> Tensor:
    """The rows that this worker's outputs read, padded; several dims one after the other.

    Args:
        tensor: this worker's rows.
        fringes: one per dim that is cut.
        transport: the way to the others.
        tag: for whom the bytes are counted.
    """
    read: Tensor = _Fetch.apply(tensor, fringes, transport, tag)  # type: ignore[no-untyped-call]
    return read


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, fringes: tuple[Fringe, ...], transport: Transport, tag: str) -> Tensor:
        ctx.fringes, ctx.transport, ctx.tag = fringes, transport, tag
        read = tensor
        for each in fringes:
            read = _gather(read, each, transport, (tag, "forward"))
        padded = _pad(read, fringes)
        return padded.view_as(padded) if padded is tensor else padded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        for each in ctx.fringes:
            grad = grad.narrow(each.dim, each.before, each.read_length)
        for each in reversed(ctx.fringes):
            grad = _return(grad, each, ctx.transport, (ctx.tag, "backward"))
        return grad, None, None, None


def _gather(tensor: Tensor, each: Fringe, transport: Transport, tag: Tag) -> Tensor:
    if not each.talks:
        low, high = each.takes[transport.mesh.coordinates(transport.rank)[each.axis]]
        return tensor if (low, high) == (0, each.own_length) else tensor.narrow(each.dim, *_own(each, transport))
    send = [tensor.narrow(each.dim, low, high - low) for low, high in each.gives]
    pieces = transport.exchange(
        each.axis, send, [_with(tensor, each.dim, high - low) for low, high in each.takes], tag=tag
    )
    return torch.cat(pieces, each.dim)


def _own(each: Fringe, transport: Transport) -> Range:
    """Start and length of the own rows that this worker reads itself."""
    low, high = each.gives[transport.mesh.coordinates(transport.rank)[each.axis]]
    return low, high - low


def _return(grad: Tensor, each: Fringe, transport: Transport, tag: Tag) -> Tensor:
    out = grad.new_zeros(_with(grad, each.dim, each.own_length))
    send = [grad.narrow(each.dim, low, high - low) for low, high in each.takes]
    place = transport.mesh.coordinates(transport.rank)[each.axis]
    pieces = [send[place] if member == place else None for member in range(len(send))]
    if each.talks:
        shapes = [_with(grad, each.dim, high - low) for low, high in each.gives]
        pieces = list(transport.exchange(each.axis, send, shapes, tag=tag))
    for piece, (low, high) in zip(pieces, each.gives, strict=True):
        if piece is not None and high > low:
            out.narrow(each.dim, low, high - low).add_(piece)
    return out


def _with(tensor: Tensor, dim: int, length: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    shape[dim] = length
    return tuple(shape)


def _pad(tensor: Tensor, fringes: tuple[Fringe, ...]) -> Tensor:
    if not any(each.before or each.behind for each in fringes):
        return tensor
    shape = list(tensor.shape)
    for each in fringes:
        shape[each.dim] += each.before + each.behind
    out = tensor.new_full(shape, fringes[0].value)
    inner = out
    for each in fringes:
        inner = inner.narrow(each.dim, each.before, each.read_length)
    inner.copy_(tensor)
    return out
