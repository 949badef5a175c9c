"""Placements by name: data, model and hybrid parallelism, and spatial tiles, for any network.

Each is a function from a network and a number of workers to a placement on one axis of the same name; `by_name` adds
outer axes, along which the batch is cut for all layers (the three tiers of Coates et al. 2013: kernels within a
device, one layer cut within a node, the batch cut between nodes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from windlass.errors import ConfigError, unknown
from windlass.plan.mesh import Mesh
from windlass.plan.placement import SCHEMES, Handover, Op, Placement
from windlass.plan.rules import refusal, rule_of


def data(ops: Sequence[Op], workers: int) -> Placement:
    """Every worker has all weights and a part of the samples."""
    return Placement(Mesh((("data", workers),)), ("batch",), {op.name: ("batch",) for op in _leading(ops)})


def model(ops: Sequence[Op], workers: int) -> Placement:
    """Every worker has all samples and a part of each layer's neurons."""
    layers = {op.name: (_cut_or_same(op, "out"),) for op in _leading(ops)}
    return Placement(Mesh((("model", workers),)), ("whole",), layers)


def hybrid(ops: Sequence[Op], workers: int, scheme: str = "a") -> Placement:
    """The batch is cut in the convolutions, neurons in the fully connected layers (Krizhevsky 2014, section 4).

    Raises:
        ConfigError: there is no such scheme, or the network has no fully connected layer.
    """
    if scheme not in SCHEMES:
        raise ConfigError(unknown("scheme of hybrid parallelism", scheme, SCHEMES))
    head = next((op.name for op in ops if op.kind == "linear"), None)
    if head is None:
        raise ConfigError("hybrid parallelism divides fully connected layers, and this network has none: use data")
    layers = {op.name: ("out" if op.kind == "linear" else "batch",) for op in _leading(ops)}
    return Placement(Mesh((("hybrid", workers),)), ("batch",), layers, Handover(scheme, head))


def tiles(ops: Sequence[Op], workers: int) -> Placement:
    """Every worker has a band of rows of all maps and, where no rows are left, a part of the neurons.

    Coates et al. 2013, section 4.  Maps with fewer rows than workers count as without rows.
    """
    layers = {op.name: (_tiled(op, workers),) for op in _leading(ops)}
    return Placement(Mesh((("tiles", workers),)), ("rows",), layers)


BUILDERS: dict[str, Callable[[Sequence[Op], int], Placement]] = {
    "data": data,
    "model": model,
    "hybrid": hybrid,
    "hybrid:a": lambda ops, workers: hybrid(ops, workers, "a"),
    "hybrid:b": lambda ops, workers: hybrid(ops, workers, "b"),
    "hybrid:c": lambda ops, workers: hybrid(ops, workers, "c"),
    "tiles": tiles,
}
"""The placements that have a name."""


def by_name(text: str, ops: Sequence[Op], workers: int, *, mesh: Mesh | None = None) -> Placement:
    """The placement of this name.

    Args:
        text: one of `BUILDERS`.
        ops: the network.
        workers: how many.
        mesh: for axes of one's own: along all but the last the batch is cut, the last is as `text` says.

    Raises:
        ConfigError: there is no such placement, or the mesh has another number of workers.
    """
    if text not in BUILDERS:
        raise ConfigError(unknown("placement", text, BUILDERS))
    if mesh is None:
        return BUILDERS[text](ops, workers)
    if mesh.size != workers:
        raise ConfigError(f"the mesh {mesh} has {mesh.size} workers, the run {workers}")
    inner = BUILDERS[text](ops, mesh.shape[-1])
    outer = ("batch",) * (len(mesh.axes) - 1)
    layers = {name: (*outer, *ways) for name, ways in inner.layers.items()}
    return replace(inner, mesh=mesh, input=(*outer, *inner.input), layers=layers)


def _leading(ops: Sequence[Op]) -> list[Op]:
    """The layers that a placement names; the others go on as their inputs lie."""
    return [op for op in ops if rule_of(op).leads]


def _cut_or_same(op: Op, way: str) -> str:
    return way if refusal(op, way) is None else "replicate"


def _tiled(op: Op, workers: int) -> str:
    has_rows = len(op.output_shape) == 4 and op.output_shape[2] >= workers
    return "rows" if has_rows and refusal(op, "rows") is None else _cut_or_same(op, "out")
