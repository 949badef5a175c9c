"""What a picture of a placement shows: the layers with weights, and what is sent between them.

A column is a layer with weights and all layers without, since the column before, whose messages are drawn in front of
it.  Bytes are those of the worker that sends most (`windlass.plan.traffic`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from windlass.plan.derive import Derived, Parameter, Placed
from windlass.plan.graph import INPUT
from windlass.plan.layout import Layout, Shape, Step
from windlass.plan.mesh import Mesh
from windlass.plan.rules import rule_of


@dataclass(frozen=True, slots=True)
class Move:
    """Messages between two columns.

    Attributes:
        words: for a person.
        axis: of the mesh, along which they go.
        kind: a step's, or ``fringe`` or ``statistics``.
    """

    words: str
    axis: int
    kind: str


@dataclass(frozen=True, slots=True)
class Column:
    """One layer, or several of one kind of placement.

    Attributes:
        names: the layers'.
        kind: of the last.
        shape, layout: of its output.
        weight: its largest parameter.
        moves, back_moves: before it, since the column before.
        forward_bytes, backward_bytes, gradient_bytes: the most that one worker sends: for the moves, and for the sum
            of the weights' gradients.
    """

    names: tuple[str, ...]
    kind: str
    shape: Shape
    layout: Layout
    weight: Parameter | None = None
    moves: tuple[Move, ...] = ()
    back_moves: tuple[Move, ...] = ()
    forward_bytes: int = 0
    backward_bytes: int = 0
    gradient_bytes: int = 0


def columns_of(derived: Derived) -> tuple[Column, ...]:
    """The input, the layers with weights, and the outputs as the loss reads them."""
    sent = _most_sent(derived)
    first = next(placed for placed in derived.ops if INPUT in placed.op.inputs)
    found = [Column((INPUT,), "samples", first.op.input_shapes[first.op.inputs.index(INPUT)], derived.input)]
    pending: list[Placed] = []
    for placed in derived.ops:
        pending.append(placed)
        if rule_of(placed.op).leads:
            found.append(_column(placed, pending, derived.placement.mesh, sent))
            pending = []
    found.append(_last_column(derived, pending, sent))
    return tuple(found)


def _column(placed: Placed, pending: Sequence[Placed], mesh: Mesh, sent: Mapping[str, tuple[int, ...]]) -> Column:
    weight = max(placed.parameters, key=lambda parameter: math.prod(parameter.shape), default=None)
    bytes_of = [sum(sent.get(other.op.name, (0, 0, 0))[place] for other in pending) for place in range(3)]
    return Column(
        (placed.op.name,), placed.op.kind, placed.op.output_shape, placed.output, weight, _moves(pending, mesh),
        _back_moves(pending, mesh), *bytes_of,
    )  # fmt: skip


def _last_column(derived: Derived, pending: Sequence[Placed], sent: Mapping[str, tuple[int, ...]]) -> Column:
    """The main output on its way to the loss."""
    output, mesh = derived.outputs[0], derived.placement.mesh
    drawn = {placed.op.name for placed in derived.ops} - {placed.op.name for placed in pending}
    ways = [tuple(_step_moves(steps, mesh)) for steps in (output.moves, output.back_moves)]
    known = {placed.op.name for placed in derived.ops}
    others = [bytes_of for name, bytes_of in sent.items() if name not in known]
    ours = [sent[name] for name in sent if name in known - drawn]
    totals = [sum(bytes_of[place] for bytes_of in (*ours, *others)) for place in range(3)]
    shape = derived.placed(output.name).op.output_shape
    return Column(
        ("loss",), "outputs", shape, output.need, None, _distinct((*_moves(pending, mesh), *ways[0])),
        _distinct((*_back_moves(pending, mesh), *ways[1])), *totals,
    )  # fmt: skip


def _most_sent(derived: Derived) -> dict[str, tuple[int, int, int]]:
    """Bytes forward, backward and for gradients, of the worker that sends most, by op."""
    found: dict[str, tuple[int, int, int]] = {}
    for rank in range(derived.placement.mesh.size):
        for row in derived.traffic(rank):
            ours = (row.forward_sent, row.backward_sent, row.gradient_sent)
            before = found.get(row.name, (0, 0, 0))
            found[row.name] = (max(before[0], ours[0]), max(before[1], ours[1]), max(before[2], ours[2]))
    return found


def _moves(pending: Sequence[Placed], mesh: Mesh) -> tuple[Move, ...]:
    return _distinct(move for placed in pending for move in _moves_of(placed, mesh))


def _moves_of(placed: Placed, mesh: Mesh) -> Iterator[Move]:
    for steps, share in zip(placed.moves, placed.shares, strict=True):
        yield from () if share else _step_moves(steps, mesh)
    for halo in placed.halos:
        yield Move(f"fringe of {halo.dim} over {mesh.names[halo.axis]}", halo.axis, "fringe")
    for axis in placed.sync_axes:
        yield Move(f"statistics over {mesh.names[axis]}", axis, "statistics")


def _back_moves(pending: Sequence[Placed], mesh: Mesh) -> tuple[Move, ...]:
    return _distinct(move for placed in reversed(pending) for move in _back_moves_of(placed, mesh))


def _back_moves_of(placed: Placed, mesh: Mesh) -> Iterator[Move]:
    for axis in placed.sync_axes:
        yield Move(f"statistics over {mesh.names[axis]}", axis, "statistics")
    for halo in placed.halos if placed.input_grads[0] else ():
        yield Move(f"fringe of {halo.dim} over {mesh.names[halo.axis]}", halo.axis, "fringe")
    for steps, share in zip(placed.back_moves, placed.shares, strict=True):
        yield from () if share else _step_moves(steps, mesh)


def _step_moves(steps: Sequence[Step], mesh: Mesh) -> Iterator[Move]:
    return (Move(step.words(mesh), step.axis, step.kind) for step in steps)


def _distinct(moves: Iterable[Move]) -> tuple[Move, ...]:
    return tuple(dict.fromkeys(moves))


def joined(columns: Sequence[Column]) -> tuple[Column, ...]:
    """Neighbours that are placed alike, with nothing sent between them, as one."""
    found = [columns[0]]
    for column in columns[1:]:
        last = found[-1]
        alike = last.kind != "samples" and column.kind == last.kind and column.layout == last.layout
        if alike and _cuts(column.weight) == _cuts(last.weight) and not column.moves and not column.back_moves:
            names, gradient_bytes = (*last.names, *column.names), last.gradient_bytes + column.gradient_bytes
            found[-1] = replace(last, names=names, shape=column.shape, gradient_bytes=gradient_bytes)
        else:
            found.append(column)
    return tuple(found)


def _cuts(weight: Parameter | None) -> object:
    return weight and (weight.layout, weight.sum_axes)
