"""Refuses a placement that cannot work on the network it is given for, naming layer, axis and sizes.

Sizes need not divide evenly, and a worker may be left without rows or neurons; only samples must be enough for one
each, for whoever has none would wait at every layer.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Sequence

from windlass.errors import ConfigError, unknown
from windlass.plan.derive import Derived, derive, named_ways
from windlass.plan.graph import INPUT
from windlass.plan.handover import make_rounds
from windlass.plan.head import crossing_into, handover_axis, head_of
from windlass.plan.layout import Split, bounds
from windlass.plan.placement import INPUT_WAYS, SCHEMES, WAYS, Handover, Op, Placement
from windlass.plan.rules import refusal, rule_of


def check_placement(
    ops: Sequence[Op],
    placement: Placement,
    *,
    workers: int | None = None,
    outputs: Sequence[str] = (),
    where: str = "placement",
) -> None:
    """Raises ConfigError unless the network can be trained under the placement.

    Args:
        ops: the network, with the whole batch in its shapes.
        placement: perhaps written by hand.
        workers: how many there are; None: as many as the mesh has.
        outputs: the ops that give the logits; none: those that nobody reads.
        where: names the placement in errors, e.g. its file.
    """
    if workers is not None and placement.mesh.size != workers:
        size = placement.mesh.size
        raise ConfigError(f"{where}: mesh: {placement.mesh} has {size} workers, but the run has {workers}")
    _check_input(ops, placement, where)
    _check_names(ops, placement, where)
    for op in ops:
        _check_ways(op, placement, where)
    ends = outputs or _unread(ops)
    derived = derive(ops, placement, outputs=ends)
    _check_windows(derived, where)
    if placement.handover is not None:
        _check_handover(derived, placement.handover, f"{where}: handover")


def _unread(ops: Sequence[Op]) -> list[str]:
    read = {name for op in ops for name in op.inputs}
    return [op.name for op in ops if op.name not in read]


def _axis(placement: Placement, axis: int) -> str:
    """An axis as errors name it.

    >>> from windlass.plan.mesh import Mesh
    >>> _axis(Placement(Mesh.parse("node:2,device:4"), ("batch", "batch")), 1)
    'axis device of 4'
    """
    name, extent = placement.mesh.axes[axis]
    return f"axis {name} of {extent}"


# --- the input ----------------------------------------------------------------------------------------------


def _check_input(ops: Sequence[Op], placement: Placement, where: str) -> None:
    _check_number(placement.input, placement, f"{where}: input")
    shape = next(shape for op in ops for name, shape in zip(op.inputs, op.input_shapes, strict=True) if name == INPUT)
    for axis, way in enumerate(placement.input):
        place = f"{where}: input: {_axis(placement, axis)}"
        if way not in INPUT_WAYS:
            raise ConfigError(f"{place}: {unknown('way', way, INPUT_WAYS)}")
        if way in ("rows", "columns") and len(shape) != 4:
            raise ConfigError(f"{place}: only images of (batch, channels, height, width) have {way}, got {shape}")
        if way in ("rows", "columns") and way in placement.input[:axis]:
            raise ConfigError(f"{place}: {way} are cut along one axis only, and another cuts them already")
    parts = math.prod(
        extent for extent, way in zip(placement.mesh.shape, placement.input, strict=True) if way == "batch"
    )
    if shape[0] < parts:
        raise ConfigError(
            f"{where}: input: the batch is cut into {parts} parts on the mesh {placement.mesh}, and has only "
            f"{shape[0]} samples"
        )


def _check_number(ways: Sequence[str], placement: Placement, where: str) -> None:
    if len(ways) != len(placement.mesh.axes):
        raise ConfigError(
            f"{where}: the mesh {placement.mesh} has {len(placement.mesh.axes)} axes and needs as many ways, got "
            f"{len(ways)}: {', '.join(ways)}"
        )


# --- layers -------------------------------------------------------------------------------------------------


def _check_names(ops: Sequence[Op], placement: Placement, where: str) -> None:
    names = [op.name for op in ops]
    leading = [op.name for op in ops if rule_of(op).leads]
    for pattern in placement.layers:
        if pattern in names or any(fnmatch.fnmatchcase(name, pattern) for name in leading):
            continue
        if any(letter in pattern for letter in "*?["):
            raise ConfigError(f"{where}: layers.{pattern}: no layer with weights of this name: {', '.join(leading)}")
        raise ConfigError(f"{where}: layers: {unknown('layer', pattern, names)}")


def _check_ways(op: Op, placement: Placement, where: str) -> None:
    ways = named_ways(op, placement)
    if ways is None:
        return
    place = f"{where}: layers.{op.name}"
    _check_number(ways, placement, place)
    for axis, way in enumerate(ways):
        if way not in WAYS:
            raise ConfigError(f"{place}: {_axis(placement, axis)}: {unknown('way', way, WAYS)}")
        why = refusal(op, way)
        if why is not None:
            sizes = f"{_times(op.input_shapes[0])} to {_times(op.output_shape)}"
            raise ConfigError(f"{place}: {_axis(placement, axis)}: {op.kind} ({sizes}) cannot be {way}: {why}")
    _check_called_again(op, ways, placement, place)


def _check_called_again(op: Op, ways: tuple[str, ...], placement: Placement, place: str) -> None:
    """A module has its weights in one place however often it is called."""
    first = op.name.partition("#")[0]
    others = placement.layers.get(first)
    if rule_of(op).leads and first != op.name and others is not None and tuple(others) != tuple(ways):
        raise ConfigError(f"{place}: it is {first} called again, and that is {', '.join(others)}")


def _check_windows(derived: Derived, where: str) -> None:
    """A fringe comes from neighbours along one axis."""
    for placed in derived.ops:
        dims = [halo.dim for halo in placed.halos]
        if len(set(dims)) < len(dims):
            axes = " and ".join(_axis(derived.placement, halo.axis) for halo in placed.halos)
            raise ConfigError(
                f"{where}: layers.{placed.op.name}: {axes} both cut the {dims[0]} of {_times(placed.op.output_shape)}; "
                "rows can be cut along one axis, columns along one"
            )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


# --- the handover -------------------------------------------------------------------------------------------


def _check_handover(derived: Derived, handover: Handover, where: str) -> None:
    ops = [placed.op for placed in derived.ops]
    if handover.scheme not in SCHEMES:
        raise ConfigError(f"{where}.scheme: {unknown('scheme', handover.scheme, SCHEMES)}")
    if handover.before not in {op.name for op in ops}:
        raise ConfigError(f"{where}.before: {unknown('layer', handover.before, [op.name for op in ops])}")
    if handover.scheme == "a":
        _check_scheme_a(handover, where)
        return
    head = head_of(ops, handover.before)
    crossing = crossing_into(ops, head)
    if len(crossing) != 1:
        edges = ", ".join(f"{source} into {reader}" for source, reader in crossing)
        raise ConfigError(
            f"{where}.before: scheme {handover.scheme} hands one tensor over to {handover.before} and what follows, "
            f"but {len(crossing)} cross: {edges}; take scheme a"
        )
    first = derived.placed(handover.before)
    source = derived.layout_of(crossing[0][0])
    axis = handover_axis(source, first.needs[0])
    if axis is None:
        before, after = (_spelt(layout) for layout in (source, first.needs[0]))
        raise ConfigError(
            f"{where}.before: {crossing[0][0]} lies as ({before}) and {handover.before} needs ({after}) on the mesh "
            f"{derived.placement.mesh}; a handover needs one axis that cuts samples before it and none after"
        )
    _check_head(derived, head, axis, where)
    _check_rounds(derived, handover, axis, where)


def _spelt(layout: Sequence[object]) -> str:
    return ", ".join(map(str, layout))


def _check_scheme_a(handover: Handover, where: str) -> None:
    if handover.rounds or handover.update_every:
        raise ConfigError(
            f"{where}: scheme a hands everything over at once: it has no rounds ({handover.rounds}) and no updates "
            f"between them ({handover.update_every}); take scheme b or c"
        )


def _check_head(derived: Derived, head: frozenset[str], axis: int, where: str) -> None:
    """Along the axis all members compute on the same samples, a round at a time."""
    for placed in derived.ops:
        if placed.op.name not in head:
            continue
        layouts = (*placed.needs, placed.output)
        if any(layout[axis] == Split("batch") for layout in layouts):
            raise ConfigError(
                f"{where}: {placed.op.name} in the head cuts samples along {_axis(derived.placement, axis)} again"
            )
        if placed.op.kind == "batch_norm":
            raise ConfigError(
                f"{where}: {placed.op.name} in the head normalises over the batch, of which a round has only a part; "
                "take scheme a"
            )


def _check_rounds(derived: Derived, handover: Handover, axis: int, where: str) -> None:
    members = derived.placement.mesh.extent(axis)
    others = [extent for at, extent in enumerate(derived.placement.mesh.shape) if at != axis]
    cut = [part == Split("batch") for at, part in enumerate(derived.input) if at != axis]
    lines = math.prod(extent for extent, is_cut in zip(others, cut, strict=True) if is_cut)
    batch = derived.placed(handover.before).op.input_shapes[0][0]
    counts = [stop - start for start, stop in itertools.pairwise(bounds(batch // lines, members))]
    try:
        rounds = make_rounds(handover, counts)
    except ConfigError as error:
        raise ConfigError(f"{where.removesuffix('handover')}{error}") from None
    if not all(turn.size for turn in rounds):
        raise ConfigError(
            f"{where}.rounds: {len(rounds)} rounds along {_axis(derived.placement, axis)}, but a member has only "
            f"{max(counts)} of the {batch} samples to send: give a larger batch or fewer rounds"
        )
    if handover.update_every > len(rounds):
        raise ConfigError(
            f"{where}.update_every: an update after every {handover.update_every} rounds, but there are "
            f"{len(rounds)} rounds"
        )
