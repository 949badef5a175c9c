"""How a tensor lies on a mesh of workers, and the steps that take it from one layout to another.

Theory of operation.  A layout says, for each axis of the mesh, what the workers along it hold of a tensor:

- `Split`: each a part of one dim;
- `WHOLE`: all the same;
- `PARTIAL`: each an addend of the whole.

Several axes may split one dim: the outer axis cuts first, the inner one cuts what the outer has left.  Cuts are
even in units (a flattened map's features stay together, a convolution's groups too) and the first parts are the
larger ones; parts may be empty.

A `Step` changes the layout along one axis; its messages stay within the groups of that axis, and what lies where
along the other axes does not change.  That holds only while no axis further in splits a dim that the step splits
or joins: its cuts would move.  `route` is the cheapest chain of such steps, by a search over the layouts between.

The parts are those of GSPMD (Xu et al. 2021) and of PyTorch's DTensor (Shard, Replicate, Partial), with units.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from windlass.plan.mesh import Mesh

DIMS: dict[str, int] = {"batch": 0, "channel": 1, "height": 2, "width": 3}
"""A dim's place in the shape; the features of a tensor (N, F) are its channels."""


@dataclass(frozen=True, slots=True)
class Split:
    """Each worker along the axis holds a part of `dim`, cut between units of `unit` elements."""

    dim: str
    unit: int = 1

    def __str__(self) -> str:
        return self.dim if self.unit == 1 else f"{self.dim} by {self.unit}"


WHOLE = "whole"
PARTIAL = "partial"

Part: TypeAlias = Split | str
Layout: TypeAlias = tuple[Part, ...]
Shape: TypeAlias = tuple[int, ...]
Box: TypeAlias = tuple[tuple[int, int], ...]
"""Start and stop per dim."""


def bounds(length: int, parts: int, unit: int = 1) -> tuple[int, ...]:
    """The parts + 1 offsets that cut `length` evenly between units, the first parts larger, the last unit ragged.

    >>> bounds(10, 3), bounds(10, 3, unit=4), bounds(1, 3)
    ((0, 4, 7, 10), (0, 4, 8, 10), (0, 1, 1, 1))
    """
    each, larger = divmod(-(-length // unit), parts)
    return tuple(min(length, unit * (each * part + min(part, larger))) for part in range(parts + 1))


def extents(shape: Shape, layout: Layout, mesh: Mesh, rank: int) -> Box:
    """Start and stop, per dim, of the part that `rank` holds of a tensor of `shape`."""
    box = [(0, length) for length in shape]
    for part, place, extent in zip(layout, mesh.coordinates(rank), mesh.shape, strict=True):
        if isinstance(part, Split):
            start, stop = box[DIMS[part.dim]]
            cuts = bounds(stop - start, extent, part.unit)
            box[DIMS[part.dim]] = (start + cuts[place], start + cuts[place + 1])
    return tuple(box)


def box_shape(box: Box) -> Shape:
    """The shape of what lies between starts and stops."""
    return tuple(stop - start for start, stop in box)


def local_shape(shape: Shape, layout: Layout, mesh: Mesh, rank: int) -> Shape:
    """The shape of the part that `rank` holds."""
    return box_shape(extents(shape, layout, mesh, rank))


def gradient_of(layout: Layout) -> Layout:
    """In what layout the producer of a tensor wants its gradient: every addend's gradient is the whole one."""
    return tuple(WHOLE if part == PARTIAL else part for part in layout)


# --- steps --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a layout along one axis of the mesh.

    Attributes:
        kind: ``gather`` (Split → WHOLE), ``slice`` (WHOLE → Split: no message), ``swap`` (Split → Split of another
            dim or unit), ``reduce`` (PARTIAL → WHOLE), ``scatter`` (PARTIAL → Split).
        axis: the axis's number.
        source, target: the part before and after.
    """

    kind: str
    axis: int
    source: Part
    target: Part

    def words(self, mesh: Mesh) -> str:
        """The step for a person.

        >>> Step("gather", 1, Split("batch"), WHOLE).words(Mesh.parse("data:2,model:2"))
        'gather batch over model'
        """
        name = mesh.names[self.axis]
        return STEP_WORDS[self.kind].format(source=self.source, target=self.target, axis=name)


STEP_WORDS = {
    "gather": "gather {source} over {axis}",
    "slice": "keep own {target} of {axis}",
    "swap": "swap {source} for {target} over {axis}",
    "reduce": "sum over {axis}",
    "scatter": "sum over {axis}, each its {target}",
}
"""How each kind of step reads."""


def step_between(axis: int, source: Part, target: Part) -> Step:
    """The step that changes `axis` from one part to another."""
    splits = (isinstance(source, Split), isinstance(target, Split))
    if source == PARTIAL:
        return Step("scatter" if splits[1] else "reduce", axis, source, target)
    return Step({(True, False): "gather", (False, True): "slice", (True, True): "swap"}[splits], axis, source, target)


NOMINAL_EXTENT = 4
COSTS = {"gather": 3 * 4, "slice": 0, "swap": 3, "reduce": 6, "scatter": 3}
"""Quarters of the block held before the step that each member receives, four members to an axis.

`route` knows neither extents nor lengths, and needs them for an order of preference only.
"""


@lru_cache(maxsize=4096)
def route(source: Layout, target: Layout) -> tuple[Step, ...]:
    """The steps from `source` to `target`, the cheapest that keep every cut in its place.

    >>> [step.kind for step in route((Split("batch"), PARTIAL), (Split("batch"), Split("channel")))]
    ['scatter']
    >>> [step.kind for step in route((Split("batch"), Split("batch")), (WHOLE, Split("batch")))]
    ['gather', 'gather', 'slice']
    """
    choices = tuple(tuple(dict.fromkeys((ours, theirs, WHOLE))) for ours, theirs in zip(source, target, strict=True))
    order = itertools.count()
    queue: list[tuple[int, int, int, Layout, tuple[Step, ...]]] = [(0, 0, 0, source, ())]
    done: set[Layout] = set()
    while queue:
        cost, length, _, at, steps = heapq.heappop(queue)
        if at == target:
            return steps
        if at in done:
            continue
        done.add(at)
        for step in _possible(at, choices):
            there = (*at[: step.axis], step.target, *at[step.axis + 1 :])
            heapq.heappush(queue, (cost + _cost(at, step), length + 1, next(order), there, (*steps, step)))
    raise AssertionError(f"no way from {source} to {target}: a whole is never made partial")


def _possible(at: Layout, choices: tuple[tuple[Part, ...], ...]) -> Iterator[Step]:
    for axis, part in enumerate(at):
        inner = {other.dim for other in at[axis + 1 :] if isinstance(other, Split)}
        for other in choices[axis]:
            touched = {end.dim for end in (part, other) if isinstance(end, Split)}
            if other not in (part, PARTIAL) and not touched & inner:
                yield step_between(axis, part, other)


def _cost(at: Layout, step: Step) -> int:
    """Elements received, a whole tensor having NOMINAL_EXTENT ** (axes + 1)."""
    splits = sum(isinstance(part, Split) for part in at)
    return COSTS[step.kind] * int(NOMINAL_EXTENT ** (len(at) - splits))


# --- messages -----------------------------------------------------------------------------------------------


def reduce_pieces(num_elements: int, parts: int) -> tuple[int, ...]:
    """Offsets of the even flat pieces by which a ``reduce`` goes: a scatter of addends, then a gather of sums."""
    return bounds(num_elements, parts)


def after(layout: Layout, step: Step) -> Layout:
    """The layout after the step."""
    return (*layout[: step.axis], step.target, *layout[step.axis + 1 :])


def message_boxes(
    shape: Shape, layout: Layout, step: Step, mesh: Mesh, rank: int
) -> tuple[tuple[Box, ...], tuple[Box, ...]]:
    """What goes to and comes from each member of the group along the step's axis, the rank's own entry included.

    Boxes to send are relative to the rank's block before the step, boxes received to its block after it.  A
    ``slice`` sends nothing but has its own entry; a ``reduce`` goes by `reduce_pieces` and has no boxes.

    Args:
        shape: of the whole tensor.
        layout: before the step.
        step: one of `route`'s.
        mesh: the workers.
        rank: whose messages.
    """
    assert step.kind != "reduce", "a reduce goes by flat pieces"
    later = after(layout, step)
    before_here, after_here = extents(shape, layout, mesh, rank), extents(shape, later, mesh, rank)
    send, receive = [], []
    for member in mesh.group(rank, step.axis):
        silent = step.kind == "slice" and member != rank
        before_there, after_there = extents(shape, layout, mesh, member), extents(shape, later, mesh, member)
        send.append(_overlap(before_here, after_there, empty=silent))
        receive.append(_overlap(after_here, before_there, empty=silent))
    return tuple(send), tuple(receive)


def _overlap(block: Box, other: Box, *, empty: bool) -> Box:
    """Where `other` lies in `block`, relative to `block`'s start."""
    box = []
    for (start, stop), (first, last) in zip(block, other, strict=True):
        low = min(max(start, first), stop)
        high = low if empty else max(low, min(stop, last))
        box.append((low - start, high - start))
    return tuple(box)


def message_shapes(
    shape: Shape, layout: Layout, step: Step, mesh: Mesh, rank: int
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Shapes of what goes to and comes from each member of the group, the rank's own entry included.

    For a ``reduce`` they are those of the first round, flat; the second round has them the other way around.
    """
    if step.kind == "reduce":
        extent, place = mesh.extent(step.axis), mesh.coordinates(rank)[step.axis]
        cuts = reduce_pieces(math.prod(local_shape(shape, layout, mesh, rank)), extent)
        own = cuts[place + 1] - cuts[place]
        return tuple((stop - start,) for start, stop in itertools.pairwise(cuts)), ((own,),) * extent
    send, receive = message_boxes(shape, layout, step, mesh, rank)
    return tuple(map(box_shape, send)), tuple(map(box_shape, receive))


def elements_of_reduce(num_elements: int, parts: int, place: int) -> int:
    """Elements that a member sends to others in both rounds of a reduce; it receives as many.

    >>> elements_of_reduce(10, 2, 0)
    10
    """
    cuts = reduce_pieces(num_elements, parts)
    own = cuts[place + 1] - cuts[place]
    return num_elements - own + own * (parts - 1)


def bytes_of_steps(
    shape: Shape, source: Layout, steps: tuple[Step, ...], mesh: Mesh, rank: int, itemsize: int = 4
) -> tuple[int, int]:
    """Bytes that `rank` sends to others and receives from them in the steps, one after the other."""
    sent = received = 0
    at = source
    for step in steps:
        place = mesh.coordinates(rank)[step.axis]
        send, receive = message_shapes(shape, at, step, mesh, rank)
        outgoing = sum(math.prod(piece) for member, piece in enumerate(send) if member != place)
        incoming = sum(math.prod(piece) for member, piece in enumerate(receive) if member != place)
        both_rounds = step.kind == "reduce"
        sent += outgoing + incoming * both_rounds
        received += incoming + outgoing * both_rounds
        at = after(at, step)
    return sent * itemsize, received * itemsize
