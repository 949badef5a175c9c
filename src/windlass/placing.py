"""The placement that a run asks for: by name, or from a file, for its network, workers and batches."""

from __future__ import annotations

from dataclasses import replace

from windlass.check.placement import check_placement
from windlass.config import TrainConfig
from windlass.errors import ConfigError
from windlass.parallel.find import named_placement
from windlass.parallel.trace import Traced, trace
from windlass.plan.derive import derive
from windlass.plan.handover import variable_batch
from windlass.plan.head import handover_axis
from windlass.plan.mesh import Mesh
from windlass.plan.pick import AUTO
from windlass.plan.placement import Placement
from windlass.prepare import Prepared


def global_shape(prepared: Prepared) -> tuple[int, int, int, int]:
    """The shape of a step's images, all workers' together."""
    channels, rows, columns = prepared.graph.input_shape[1:]
    return prepared.job.config.batch, channels, rows, columns


def find_placement(prepared: Prepared) -> Placement:
    """The placement that the configuration asks for, checked against the network.

    Raises:
        ConfigError: it cannot be; the place is named.
    """
    config = prepared.job.config
    traced = trace(prepared.module, global_shape(prepared))
    mesh = None if config.mesh == AUTO else Mesh.parse(config.mesh)
    found = named_placement(config.parallel, traced.ops, workers=config.workers, mesh=mesh)
    where = f"placement {config.parallel}"
    check_placement(traced.ops, found, workers=config.workers, outputs=traced.outputs, where=where)
    if not config.head_batch or config.head_batch == config.batch:
        return found
    members = found.mesh.extent(_handover_axis(found, traced, config))
    found = _with_head_batch(found, config, members)
    check_placement(traced.ops, found, outputs=traced.outputs, where=where)
    return found


def _handover_axis(placement: Placement, traced: Traced, config: TrainConfig) -> int:
    """The axis over which the batch is handed over to the head."""
    if placement.handover is None:
        raise ConfigError(f"head_batch: placement {config.parallel} has no handover, so no head to update by itself")
    derived = derive(traced.ops, placement, outputs=traced.outputs)
    first = derived.placed(placement.handover.before)
    axis = handover_axis(derived.layout_of(first.op.inputs[0]), first.needs[0])
    return len(placement.mesh.axes) - 1 if axis is None else axis


def _with_head_batch(placement: Placement, config: TrainConfig, members: int) -> Placement:
    given = placement.handover
    assert given is not None
    handover = variable_batch(
        given.scheme, given.before, batch=config.batch, head_batch=config.head_batch, members=members
    )
    return replace(placement, handover=handover)
