"""A placement: what each axis of a mesh of workers does with each layer.

It is one object for data parallelism (every layer's batch is cut), model parallelism (every layer's neurons are
cut), Krizhevsky's hybrid ("One weird trick for parallelizing convolutional neural networks", 2014: the batch of
the convolutions, the neurons of the fully connected layers), Coates et al.'s spatial tiles (2013, section 4), and
any mixture.  What each layer then holds and sends follows: `windlass.plan.derive`.

As a file::

    mesh: node:2,device:2
    input: [batch, batch]
    layers:
      "features.*": [batch, batch]
      "classifier.*": [batch, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from windlass.errors import ConfigError, unknown
from windlass.plan.mesh import Mesh

WAYS: dict[str, str] = {
    "batch": "each member has a part of the samples and all weights",
    "out": "each member computes a part of the output channels or neurons, with their weights, from the whole input",
    "in": "each member computes addends of all outputs, from a part of the input channels, with their weights",
    "rows": "each member computes a part of the rows of the maps; neighbours exchange a fringe",
    "columns": "each member computes a part of the columns of the maps; neighbours exchange a fringe",
    "replicate": "every member computes the same",
}
"""What an axis can do with a layer."""

INPUT_WAYS: dict[str, str] = {
    "batch": "each member reads a part of the samples",
    "rows": "each member reads a part of the rows of every sample",
    "columns": "each member reads a part of the columns of every sample",
    "whole": "every member reads all samples",
}
"""How samples can arrive along an axis."""

SCHEMES: dict[str, str] = {
    "a": "every member gathers the whole batch, then computes",
    "b": "members send their part of the batch in turn, computation of one beside the sending of the next",
    "c": "in every round each member sends its share of a round's samples",
}
"""Krizhevsky 2014, section 4: how a batch passes from the data-parallel to the model-parallel part."""

Value: TypeAlias = object


@dataclass(frozen=True, slots=True)
class Op:
    """One node of a network as a placement sees it.

    Attributes:
        name: as `windlass.networks.capture` names it: ``features.0``, ``layer1.0.add``, ``add#2``.
        kind: as there: ``conv2d``, ``linear``, ``batch_norm``, ``relu``, ``flatten``, …; the user's own modules by
            their class's name.
        inputs: names of the ops that it reads, or `windlass.plan.graph.INPUT`.
        input_shapes, output_shape: of whole tensors, all workers' together.
        parameters: own names (``weight``) and whole shapes, at the first op that uses them.
        attributes: what else defines it, spatial ones as pairs: ``kernel_size``, ``stride``, ``padding``,
            ``dilation``; ``groups``, ``ceil_mode``, ``count_include_pad``, ``dim``, …
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_shape: tuple[int, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = ()
    attributes: tuple[tuple[str, Value], ...] = ()

    def attribute(self, name: str, default: Value = None) -> Value:
        """The value of an attribute."""
        return dict(self.attributes).get(name, default)


@dataclass(frozen=True, slots=True)
class Handover:
    """How the batch enters the model-parallel head.

    Attributes:
        scheme: one of `SCHEMES`.
        before: the head's first op; all that is computed from it is the head.
        rounds: of schemes b and c; 0 takes the number of members.
        update_every: the head's weights are updated after so many rounds; 0: once a step.
    """

    scheme: str
    before: str
    rounds: int = 0
    update_every: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """What each axis of a mesh does with each layer.

    Attributes:
        mesh: the workers.
        input: one of `INPUT_WAYS` per axis.  The loss lies along an axis as the input's batch does: each member
            has the logits of its samples where the batch is cut, and else every member has all logits.
        layers: one of `WAYS` per axis, by an op's name or a pattern (``features.*``); the last that matches holds.
            What is not named goes on as its inputs lie.
        handover: how the batch enters a model-parallel head; None, as the layers' needs say.
    """

    mesh: Mesh
    input: tuple[str, ...]
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    handover: Handover | None = None

    def to_mapping(self) -> dict[str, object]:
        """The placement as plain mappings and lists, as it stands in a file."""
        mapping: dict[str, object] = {
            "mesh": str(self.mesh),
            "input": list(self.input),
            "layers": {name: list(ways) for name, ways in self.layers.items()},
        }
        if self.handover is not None:
            given = {"scheme": self.handover.scheme, "before": self.handover.before}
            counts = {"rounds": self.handover.rounds, "update_every": self.handover.update_every}
            mapping["handover"] = given | {name: count for name, count in counts.items() if count}
        return mapping


# --- from a file --------------------------------------------------------------------------------------------


def placement_from_mapping(mapping: object, *, where: str = "placement") -> Placement:
    """Reads a placement back from `Placement.to_mapping`'s form; `where` names the file in errors.

    One way may be written without a list.  ``input`` may be left out: the batch is cut along every axis.

    Raises:
        ConfigError: names the entry and what is possible there.
    """
    table = _mapping(mapping, where, ("mesh", "input", "layers", "handover"))
    mesh = Mesh.parse(_text(table, "mesh", where))
    rows = _mapping(table.get("layers", {}), f"{where}: layers")
    layers = {name: _ways(row, WAYS, mesh, f"{where}: layers.{name}") for name, row in rows.items()}
    given = table.get("input", ["batch"] * len(mesh.axes))
    return Placement(
        mesh=mesh,
        input=_ways(given, INPUT_WAYS, mesh, f"{where}: input"),
        layers=layers,
        handover=_handover(table.get("handover"), f"{where}: handover"),
    )


def _ways(given: object, choices: Mapping[str, str], mesh: Mesh, where: str) -> tuple[str, ...]:
    ways = given if isinstance(given, list) else [given]
    for way in ways:
        if not isinstance(way, str) or way not in choices:
            raise ConfigError(f"{where}: {unknown('way', str(way), choices)}")
    if len(ways) != len(mesh.axes):
        raise ConfigError(f"{where}: the mesh {mesh} has {len(mesh.axes)} axes and needs as many ways, got {ways}")
    return tuple(ways)


def _handover(given: object, where: str) -> Handover | None:
    if given is None:
        return None
    table = _mapping(given, where, ("scheme", "before", "rounds", "update_every"))
    scheme = _text(table, "scheme", where)
    if scheme not in SCHEMES:
        raise ConfigError(f"{where}.scheme: {unknown('scheme', scheme, SCHEMES)}")
    return Handover(
        scheme, _text(table, "before", where), _count(table, "rounds", where), _count(table, "update_every", where)
    )


def _mapping(value: object, where: str, names: tuple[str, ...] = ()) -> dict[str, object]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{where}: needs a mapping of names to values, got {type(value).__name__}")
    for name in value if names else ():
        if name not in names:
            raise ConfigError(f"{where}: {unknown('entry', name, names)}")
    return value


def _text(table: Mapping[str, object], name: str, where: str) -> str:
    value = table.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name}: needs a text, got {value!r}")
    return value


def _count(table: Mapping[str, object], name: str, where: str) -> int:
    value = table.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{where}: {name}: needs a whole number of 0 or more, got {value!r}")
    return value
