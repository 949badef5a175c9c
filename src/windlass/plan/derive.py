"""From a placement to what every worker holds, fetches and sums: the collectives follow from the layers' needs.

Along each axis of the mesh every layer has a line (`windlass.plan.rules`): the parts that it needs and gives.  Where
a layer gives a tensor in one layout and the next needs another, `windlass.plan.layout.route` is the communication
between them; the gradient takes the way from the layout in which the reader computes it to that in which the
producer needs it.  Nothing is written by hand: Krizhevsky's gather of activities before the fully connected layers
and its mirror in the backward pass, a tensor-parallel pair of layers, and the sum of weight gradients come out of
the same few rules.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windlass.plan.graph import INPUT
from windlass.plan.halo import Halo
from windlass.plan.layout import (
    DIMS,
    PARTIAL,
    WHOLE,
    Box,
    Layout,
    Part,
    Split,
    Step,
    bounds,
    box_shape,
    gradient_of,
    local_shape,
    route,
)
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Op, Placement
from windlass.plan.rules import Cut, Line, following_way, line_of, rule_of
from windlass.plan.traffic import LayerTraffic, traffic_of

__all__ = ["Cut", "Derived", "Description", "Halo", "Output", "Parameter", "Placed", "derive"]

INPUT_PARTS: dict[str, Part] = {
    "batch": Split("batch"),
    "rows": Split("height"),
    "columns": Split("width"),
    "whole": WHOLE,
}
"""How the input lies, by way."""

WANTED: dict[str, Part] = {"batch": Split("batch"), "rows": Split("height"), "columns": Split("width")}
WANTED |= {"in": Split("channel")}
"""The part of its input that a layer of this way needs, where it is not the whole."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """How one parameter lies on the mesh.

    Attributes:
        name: its own, ``weight``.
        shape: of the whole.
        layout: per axis a `Cut`, or "whole".
        sum_axes: axes over which its gradient must be summed.
    """

    name: str
    shape: tuple[int, ...]
    layout: tuple[Cut | str, ...]
    sum_axes: tuple[int, ...] = ()

    def extents(self, mesh: Mesh, rank: int) -> Box:
        """Start and stop, per dim, of the part that `rank` holds; an inner axis cuts what the outer has left."""
        box = [(0, length) for length in self.shape]
        for cut, place, extent in zip(self.layout, mesh.coordinates(rank), mesh.shape, strict=True):
            if isinstance(cut, Cut):
                start, stop = box[cut.dim]
                cuts = bounds(stop - start, extent, cut.unit)
                box[cut.dim] = (start + cuts[place], start + cuts[place + 1])
        return tuple(box)

    def local_shape(self, mesh: Mesh, rank: int) -> tuple[int, ...]:
        """The shape of the part that `rank` holds."""
        return box_shape(self.extents(mesh, rank))


@dataclass(frozen=True, slots=True)
class Placed:
    """One op on the mesh.

    Attributes:
        op: what it is.
        ways: one of `windlass.plan.placement.WAYS` per axis; ``out`` of a layer without weights: each member its
            own channels.
        needs: layout of each input as the op reads it.
        grads: in what layout the gradient of each input comes out of it.
        output: layout of the output.
        parameters: how they lie.
        halos: fringes to fetch, in the order of axes; a later one sends blocks that the earlier ones extended.
        own_bias_axes: along these only the first member adds the bias.
        sync_axes: along these batch statistics are summed.
        moves: per input, from its producer's layout to what is needed.
        back_moves: per input, from the gradient as it comes to what the producer needs; none where no gradient
            goes: to the network's input, and to what has no parameters above it.
        input_grads: per input, whether a gradient goes back to its producer.
        shares: per input, the earlier op that makes the very same moves (its result is used, and the sum of both
            gradients goes back once), or "".  An op that reads one tensor twice shares with itself.
    """

    op: Op
    ways: tuple[str, ...]
    needs: tuple[Layout, ...]
    grads: tuple[Layout, ...]
    output: Layout
    parameters: tuple[Parameter, ...]
    halos: tuple[Halo, ...]
    own_bias_axes: tuple[int, ...]
    sync_axes: tuple[int, ...]
    moves: tuple[tuple[Step, ...], ...]
    back_moves: tuple[tuple[Step, ...], ...]
    input_grads: tuple[bool, ...]
    shares: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """One of the network's outputs on its way to the loss.

    Attributes:
        name: the op that gives it.
        need: layout in which the loss reads it and makes its gradient.
        moves, back_moves: from and to the op.
    """

    name: str
    need: Layout
    moves: tuple[Step, ...]
    back_moves: tuple[Step, ...]

    @property
    def tag(self) -> str:
        """What its moves are called where bytes are counted."""
        return f"loss of {self.name}"


@dataclass(frozen=True, slots=True)
class Description:
    """One row about one layer, for printing.

    Attributes:
        name, kind: the op's.
        ways: per axis.
        local_shape: of the output that the rank holds.
        moves, back_moves: in words, empty where nothing is sent.
    """

    name: str
    kind: str
    ways: tuple[str, ...]
    local_shape: tuple[int, ...]
    moves: str
    back_moves: str


@dataclass(frozen=True, slots=True)
class Derived:
    """A network on a mesh.

    Attributes:
        placement: what it follows from.
        ops: in the order in which they run.
        input: layout of the network's input.
        outputs: the network's outputs, the main one first.
    """

    placement: Placement
    ops: tuple[Placed, ...]
    input: Layout
    outputs: tuple[Output, ...]

    def placed(self, name: str) -> Placed:
        """The op of this name."""
        return next(placed for placed in self.ops if placed.op.name == name)

    def layout_of(self, name: str) -> Layout:
        """How the output of an op, or the network's input, lies."""
        return self.input if name == INPUT else self.placed(name).output

    def traffic(self, rank: int, *, batch: int | None = None, itemsize: int = 4) -> tuple[LayerTraffic, ...]:
        """Bytes that a worker sends and receives in one training step, layer by layer.

        A row per op, then one per output that moves on its way to the loss; with a handover in rounds first one
        for the labels that members tell one another.

        Args:
            rank: the worker's.
            batch: samples of the step, all workers' together; None: as the ops say.
            itemsize: bytes of an element.
        """
        return traffic_of(self, rank, batch=batch, itemsize=itemsize)

    def describe(self, rank: int = 0) -> tuple[Description, ...]:
        """A row per op, and one per output that moves on its way to the loss."""
        rows = [self._row(placed, rank) for placed in self.ops]
        shapes = {placed.op.name: placed.op.output_shape for placed in self.ops}
        for output in self.outputs:
            if output.moves or output.back_moves:
                shape = local_shape(shapes[output.name], output.need, self.placement.mesh, rank)
                moves, back = (_words(steps, self.placement) for steps in (output.moves, output.back_moves))
                rows.append(Description(output.tag, "loss", (), shape, moves, back))
        return tuple(rows)

    def _row(self, placed: Placed, rank: int) -> Description:
        own = [place for place, share in enumerate(placed.shares) if not share]
        moves = [_words(placed.moves[place], self.placement) for place in own]
        moves += [_fringe(halo, placed.op, self.placement.mesh) for halo in placed.halos]
        moves += [f"statistics over {self.placement.mesh.names[axis]}" for axis in placed.sync_axes]
        back = [_words(placed.back_moves[place], self.placement) for place in own]
        shape = local_shape(placed.op.output_shape, placed.output, self.placement.mesh, rank)
        return Description(placed.op.name, placed.op.kind, placed.ways, shape, _joined(moves), _joined(back))


def _words(steps: tuple[Step, ...], placement: Placement) -> str:
    return ", ".join(step.words(placement.mesh) for step in steps)


def _fringe(halo: Halo, op: Op, mesh: Mesh) -> str:
    """What is fetched, in words; "" where every window lies within its own tile."""
    dim = DIMS[halo.dim]
    crosses = halo.crosses(op.input_shapes[0][dim], op.output_shape[dim], mesh.extent(halo.axis))
    return f"fringe of {halo.dim} over {mesh.names[halo.axis]}" if crosses else ""


def _joined(words: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(word for word in words if word))


# --- the derivation -----------------------------------------------------------------------------------------


def derive(ops: Sequence[Op], placement: Placement, *, outputs: Sequence[str], own_loss: bool = False) -> Derived:
    """What every layer holds and sends under the placement.

    Args:
        ops: the network, every op after those that it reads.
        placement: one that `windlass.check.placement.check_placement` has passed.
        outputs: names of the ops that give the logits, the main one first.
        own_loss: the outputs are maps, over whose elements a loss of the network's own sums: they are wanted cut
            by rows and columns as the input is.
    """
    given = tuple(INPUT_PARTS[way] for way in placement.input)
    names = _Names({INPUT: given}, _readers(ops), {INPUT: False}, {})
    placed = []
    for op in ops:
        here = _place(op, placement, names)
        names.layouts[op.name] = here.output
        names.grads[op.name] = op.kind.lower() != "stopgradient" and (bool(op.parameters) or any(here.input_grads))
        placed.append(here)
    need = tuple(part if own_loss or part == Split("batch") else WHOLE for part in given)
    ends = tuple(_output(name, need, names) for name in outputs)
    return Derived(placement, tuple(placed), given, ends)


@dataclass(frozen=True, slots=True)
class _Names:
    """What is known of tensors by the name of their op.

    Attributes:
        layouts: how each lies.
        readers: the ops that read it.
        grads: whether it has a gradient.
        made: which op first needed it in a layout, its gradient in another.
    """

    layouts: dict[str, Layout]
    readers: Mapping[str, tuple[Op, ...]]
    grads: dict[str, bool]
    made: dict[tuple[str, Layout, Layout], str]


def _output(name: str, need: Layout, names: _Names) -> Output:
    given = names.layouts[name]
    return Output(name, need, route(given, need), _back(need, given, has_grad=names.grads[name]))


def _back(grad: Layout, producer: Layout, *, has_grad: bool) -> tuple[Step, ...]:
    return route(grad, gradient_of(producer)) if has_grad else ()


def named_ways(op: Op, placement: Placement) -> tuple[str, ...] | None:
    """The ways that a placement gives to an op: by its name, or by a pattern if it is a layer with weights.

    A module that is called again (``name#2``) goes as at its first call.
    """
    leads = rule_of(op).leads
    first = op.name.partition("#")[0] if leads else op.name
    ways = None
    for pattern, row in placement.layers.items():
        if pattern in (op.name, first) or (leads and fnmatch.fnmatchcase(op.name, pattern)):
            ways = row
    return ways


def _place(op: Op, placement: Placement, names: _Names) -> Placed:
    sources = tuple(names.layouts[name] for name in op.inputs)
    has_grads = tuple(names.grads[name] for name in op.inputs)
    named = named_ways(op, placement)
    ways, lines = [], []
    for axis in range(len(placement.mesh.axes)):
        offered = tuple(source[axis] for source in sources)
        way = named[axis] if named else _following(op, offered, axis, placement, names.readers)
        ways.append(way)
        lines.append(line_of(op, way, offered, axis))
    needs, grads = (_columns(lines, attribute, len(sources)) for attribute in ("needs", "grads"))
    return Placed(
        op=op,
        ways=tuple(ways),
        needs=needs,
        grads=grads,
        output=tuple(line.output for line in lines),
        parameters=tuple(_parameter(name, shape, lines) for name, shape in op.parameters),
        halos=tuple(line.halo for line in lines if line.halo is not None),
        own_bias_axes=tuple(axis for axis, line in enumerate(lines) if line.own_bias),
        sync_axes=tuple(axis for axis, line in enumerate(lines) if line.sync),
        moves=tuple(route(source, need) for source, need in zip(sources, needs, strict=True)),
        back_moves=tuple(
            _back(grad, source, has_grad=has) for grad, source, has in zip(grads, sources, has_grads, strict=True)
        ),
        input_grads=has_grads,
        shares=tuple(_earlier_maker(names.made, key, op.name) for key in zip(op.inputs, needs, grads, strict=True)),
    )


def _columns(lines: Sequence[Line], attribute: str, num_inputs: int) -> tuple[Layout, ...]:
    """Layouts of the inputs from the lines of the axes."""
    return tuple(tuple(getattr(line, attribute)[place] for line in lines) for place in range(num_inputs))


def _earlier_maker(made: dict[tuple[str, Layout, Layout], str], key: tuple[str, Layout, Layout], name: str) -> str:
    earlier = made.get(key, "")
    made.setdefault(key, name)
    return earlier


def _parameter(name: str, shape: tuple[int, ...], lines: Sequence[Line]) -> Parameter:
    cuts = [line.cuts.get(name) for line in lines]
    sums = tuple(axis for axis, line in enumerate(lines) if line.sums and cuts[axis] is None)
    return Parameter(name, shape, tuple(cut or WHOLE for cut in cuts), sums)


# --- layers that nobody named -------------------------------------------------------------------------------


def _readers(ops: Sequence[Op]) -> dict[str, tuple[Op, ...]]:
    readers: dict[str, tuple[Op, ...]] = {}
    for op in ops:
        for name in dict.fromkeys(op.inputs):
            readers[name] = (*readers.get(name, ()), op)
    return readers


def _following(
    op: Op,
    offered: tuple[Part, ...],
    axis: int,
    placement: Placement,
    readers: Mapping[str, tuple[Op, ...]],
) -> str:
    """As the inputs lie; addends are summed into what the next layer with weights needs."""
    if all(part != PARTIAL for part in offered):
        return following_way(op, offered)
    ahead = _wanted(op, axis, placement, readers)
    return following_way(op, tuple(ahead if part == PARTIAL else part for part in offered))


def _wanted(op: Op, axis: int, placement: Placement, readers: Mapping[str, tuple[Op, ...]]) -> Part:
    """What the next named layer needs of the output of `op`, if nothing but followers lie between."""
    for reader in readers.get(op.name, ()):
        ways = named_ways(reader, placement)
        if ways is not None:
            return WANTED.get(ways[axis], WHOLE)
        if reader.kind != "flatten":
            return _wanted(reader, axis, placement, readers)
    return WHOLE
