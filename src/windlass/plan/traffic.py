"""Bytes that one worker sends and receives for each layer in one step, from the placement alone.

They are those of the messages that the run hands over, to the byte: the moves between layers, the fringes of tiles,
the sums of batch statistics, and the sums of weight gradients.  What a worker keeps for itself is no message.

Every sum over an axis is a ``reduce``: each member adds up one even flat piece and hands the sum to all, which is
the least that any allreduce can send (Patarasuk and Yuan 2009): 2 (p - 1) / p of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from windlass.plan.handover import make_rounds
from windlass.plan.head import handover_axis, head_of
from windlass.plan.layout import (
    DIMS,
    Layout,
    Shape,
    Split,
    Step,
    bytes_of_steps,
    elements_of_reduce,
    local_shape,
)
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Handover

if TYPE_CHECKING:
    from windlass.plan.derive import Derived, Output, Placed

Count = tuple[int, int]
"""Bytes sent and received."""


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """What one worker sends to others and receives from them for one layer in one step, in bytes.

    Attributes:
        name: the op's, or "loss of" an output.
        forward_sent, forward_received: activities, fringes and statistics.
        backward_sent, backward_received: their gradients.
        gradient_sent, gradient_received: gradients of weights.
    """

    name: str
    forward_sent: int = 0
    forward_received: int = 0
    backward_sent: int = 0
    backward_received: int = 0
    gradient_sent: int = 0
    gradient_received: int = 0

    @property
    def sent(self) -> int:
        """All that is sent."""
        return self.forward_sent + self.backward_sent + self.gradient_sent

    @property
    def received(self) -> int:
        """All that is received."""
        return self.forward_received + self.backward_received + self.gradient_received


LABEL_ITEMSIZE = 8
"""Labels are long integers."""


def traffic_of(derived: Derived, rank: int, *, batch: int | None = None, itemsize: int = 4) -> tuple[LayerTraffic, ...]:
    """See `Derived.traffic`."""
    place = _Place(derived, rank, itemsize, batch)
    handover = derived.placement.handover
    if handover is not None and handover.scheme != "a":
        return _in_rounds(place, handover)
    return (*(_row(placed, place) for placed in derived.ops), *_output_rows(derived.outputs, place))


# --- one pass over the batch --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """One worker's place, and how many samples there are."""

    derived: Derived
    rank: int
    itemsize: int
    batch: int | None

    @property
    def mesh(self) -> Mesh:
        return self.derived.placement.mesh

    def sized(self, shape: Shape) -> Shape:
        return shape if self.batch is None else (self.batch, *shape[1:])

    def steps(self, shape: Shape, source: Layout, steps: tuple[Step, ...]) -> Count:
        return bytes_of_steps(self.sized(shape), source, steps, self.mesh, self.rank, self.itemsize)

    def sums(self, num_elements: int, axes: Sequence[int]) -> Count:
        """A sum over these axes, one after the other."""
        places = self.mesh.coordinates(self.rank)
        count = sum(elements_of_reduce(num_elements, self.mesh.extent(axis), places[axis]) for axis in axes)
        return count * self.itemsize, count * self.itemsize


def _row(placed: Placed, place: _Place) -> LayerTraffic:
    forward, backward = (_total(pair) for pair in zip(_moves(placed, place), _inside(placed, place), strict=True))
    return LayerTraffic(placed.op.name, *forward, *backward, *_weight_sums(placed, place))


def _output_rows(outputs: Sequence[Output], place: _Place) -> list[LayerTraffic]:
    rows = []
    for output in outputs:
        if output.moves or output.back_moves:
            producer = place.derived.placed(output.name)
            shape = producer.op.output_shape
            forward = place.steps(shape, producer.output, output.moves)
            rows.append(LayerTraffic(output.tag, *forward, *place.steps(shape, output.need, output.back_moves)))
    return rows


def _moves(placed: Placed, place: _Place) -> tuple[Count, Count]:
    """Of the inputs to where they are needed, and of their gradients back; what is shared counts where it is made."""
    forward, backward = [], []
    for number, name in enumerate(placed.op.inputs):
        if not placed.shares[number]:
            shape, given = placed.op.input_shapes[number], place.derived.layout_of(name)
            forward.append(place.steps(shape, given, placed.moves[number]))
            backward.append(place.steps(shape, placed.grads[number], placed.back_moves[number]))
    return _total(forward), _total(backward)


def _inside(placed: Placed, place: _Place) -> tuple[Count, Count]:
    """Of fringes and statistics, forward and backward."""
    forward, backward = [], []
    if placed.halos:
        sent, received = _fringes(placed, place)
        forward.append((sent, received))
        backward.append((received, sent) if placed.input_grads[0] else (0, 0))
    if placed.sync_axes:
        shape = place.sized(placed.op.output_shape)
        channels = local_shape(shape, placed.output, place.mesh, place.rank)[1]
        forward.append(place.sums(2 * channels + 1, placed.sync_axes))
        backward.append(place.sums(2 * channels, placed.sync_axes) if placed.input_grads[0] else (0, 0))
    return _total(forward), _total(backward)


def _fringes(placed: Placed, place: _Place) -> Count:
    """Axis by axis: what is sent along a later axis has the fringe of the earlier ones."""
    shape, sent, received = place.sized(placed.op.input_shapes[0]), 0, 0
    block = list(local_shape(shape, placed.needs[0], place.mesh, place.rank))
    for halo in placed.halos:
        dim, parts, own = DIMS[halo.dim], place.mesh.extent(halo.axis), place.mesh.coordinates(place.rank)[halo.axis]
        others = math.prod(block) // block[dim] if block[dim] else math.prod(block[:dim] + block[dim + 1 :])
        fetches = halo.fetches(shape[dim], placed.op.output_shape[dim], parts)
        for other in range(parts):
            if other != own:
                sent += others * _length(fetches[other][own])
                received += others * _length(fetches[own][other])
        block[dim] = _length(halo.reads(shape[dim], placed.op.output_shape[dim], parts, own))
    return sent * place.itemsize, received * place.itemsize


def _weight_sums(placed: Placed, place: _Place) -> Count:
    return _total(
        place.sums(math.prod(parameter.local_shape(place.mesh, place.rank)), parameter.sum_axes)
        for parameter in placed.parameters
    )


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _total(counts: Iterable[Count]) -> Count:
    """Sums of what is sent and of what is received."""
    sent, received = 0, 0
    for one, other in counts:
        sent, received = sent + one, received + other
    return sent, received


# --- a head in rounds ---------------------------------------------------------------------------------------


def _in_rounds(place: _Place, handover: Handover) -> tuple[LayerTraffic, ...]:
    """The trunk on the whole batch, the head once a round on the round's samples.

    What crosses is sent once whatever the rounds.  Before, members tell one another their labels.
    """
    derived = place.derived
    head = head_of([placed.op for placed in derived.ops], handover.before)
    sizes, updates, labels = _rounds(place, handover)
    rounds = [replace(place, batch=size) for size in sizes]
    rows = [LayerTraffic("labels", *labels)]
    for placed in derived.ops:
        if placed.op.name in head:
            rows.append(_head_row(placed, place, rounds, updates, crossing=placed.op.name == handover.before))
        else:
            rows.append(_row(placed, place))
    inside = [output for output in derived.outputs if output.name in head]
    rows += _output_rows([output for output in derived.outputs if output.name not in head], place)
    return (*rows, *_summed([_output_rows(inside, turn) for turn in rounds]))


def _head_row(placed: Placed, place: _Place, rounds: Sequence[_Place], updates: int, *, crossing: bool) -> LayerTraffic:
    moves = [_moves(placed, turn) for turn in ([place] if crossing else rounds)]
    pairs = [*moves, *(_inside(placed, turn) for turn in rounds)]
    forward, backward = (_total(pair[way] for pair in pairs) for way in (0, 1))
    sent, received = _weight_sums(placed, place)
    return LayerTraffic(placed.op.name, *forward, *backward, sent * updates, received * updates)


def _summed(rounds: Sequence[Sequence[LayerTraffic]]) -> list[LayerTraffic]:
    """Row by row over all rounds."""
    return [
        LayerTraffic(
            rows[0].name,
            *_total((row.forward_sent, row.forward_received) for row in rows),
            *_total((row.backward_sent, row.backward_received) for row in rows),
        )
        for rows in zip(*rounds, strict=True)
    ]


def _rounds(place: _Place, handover: Handover) -> tuple[list[int], int, Count]:
    """Samples of each round over all workers, how often the head is updated, and the bytes of labels."""
    first = place.derived.placed(handover.before)
    source = place.derived.layout_of(first.op.inputs[0])
    axis = handover_axis(source, first.needs[0])
    assert axis is not None, "check_placement refuses a handover without an axis"
    batch = (place.sized(first.op.input_shapes[0])[0],)
    own, sizes, updates, labels = place.mesh.coordinates(place.rank), [0], 1, (0, 0)
    for line in _lines(place.mesh, source, axis, place.rank):
        counts = [local_shape(batch, source, place.mesh, rank)[0] for rank in line]
        turns = make_rounds(handover, counts)
        sizes = [size + turn.size for size, turn in zip(sizes * (len(turns) // len(sizes)), turns, strict=True)]
        updates = sum(turn.updates for turn in turns) if handover.update_every else 1
        if place.rank in line:
            here = counts[own[axis]]
            labels = (here * (len(line) - 1) * LABEL_ITEMSIZE, (sum(counts) - here) * LABEL_ITEMSIZE)
    return sizes, updates, labels


def _lines(mesh: Mesh, source: Layout, axis: int, rank: int) -> set[tuple[int, ...]]:
    """The groups along the axis of which each has samples of its own."""
    here = mesh.coordinates(rank)
    fixed = [other for other, part in enumerate(source) if other != axis and part != Split("batch")]
    ranks = (other for other in range(mesh.size) if all(mesh.coordinates(other)[at] == here[at] for at in fixed))
    return {mesh.group(other, axis) for other in ranks}
