"""The placement that a run asks for: by name, or from a file, for its network, workers and batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from windlass.check.placement import check_placement
from windlass.config import TrainConfig, read_yaml
from windlass.errors import ConfigError
from windlass.parallel.apply import resolve
from windlass.parallel.trace import trace
from windlass.plan.handover import variable_batch
from windlass.plan.levers import PARALLEL
from windlass.plan.mesh import Mesh
from windlass.plan.pick import AUTO
from windlass.plan.placement import Placement, placement_from_mapping
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
    if config.parallel in PARALLEL:
        mesh = None if config.mesh == AUTO else Mesh.parse(config.mesh)
        found = resolve(config.parallel, traced, config.workers, mesh=mesh)
    else:
        where = f"placement {config.parallel}"
        found = placement_from_mapping(read_yaml(Path(config.parallel), "placement"), where=where)
        if found.mesh.size != config.workers or config.mesh not in (AUTO, str(found.mesh)):
            asked = f"{config.workers} workers" + ("" if config.mesh == AUTO else f" as {config.mesh}")
            raise ConfigError(f"{where}: mesh: {found.mesh} has {found.mesh.size} workers, the run {asked}")
    found = _with_head_batch(found, config)
    check_placement(traced.ops, found)
    return found


def _with_head_batch(placement: Placement, config: TrainConfig) -> Placement:
    if not config.head_batch or config.head_batch == config.batch:
        return placement
    given = placement.handover
    if given is None:
        raise ConfigError(f"head_batch: placement {config.parallel} has no handover, so no head to update by itself")
    handover = variable_batch(
        given.scheme,
        given.before,
        batch=config.batch,
        head_batch=config.head_batch,
        members=placement.mesh.shape[-1],
    )
    return replace(placement, handover=handover)
