"""Divides a network over workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed
from torch import nn

from windlass.check.placement import check_placement
from windlass.parallel.find import named_placement
from windlass.parallel.placed import PlacedModule
from windlass.parallel.trace import Traced, trace
from windlass.parallel.transport import TorchTransport, Transport
from windlass.plan.derive import derive
from windlass.plan.mesh import Mesh
from windlass.plan.placement import Placement, placement_from_mapping

dist: Any = torch.distributed


def apply(
    model: nn.Module,
    placement: str | Placement | Mapping[str, object],
    *,
    input_shape: tuple[int, ...],
    mesh: Mesh | None = None,
    transport: Transport | None = None,
    group: Any = None,
) -> PlacedModule:
    """This worker's part of `model` under a placement.

    All workers must call it with equal models (the same seed) and the same placement.

    Args:
        model: a network from images to logits; it is left as it is and can be let go.
        placement: a `Placement`, its mapping, a name (``data``, ``model``, ``hybrid``, ``hybrid:b``, ``tiles``, …) or a
            YAML file's.
        input_shape: of the whole batch, all workers' together; later batches may have another size.
        mesh: the workers, for a placement by name; None: all along one axis.
        transport: the way to the others; None: ``torch.distributed``.
        group: the process group whose ranks are the mesh's, where no transport is given; None: the default group.

    Raises:
        ConfigError: the network cannot be divided, or not so; layer, axis and sizes are named.
    """
    traced = trace(model, input_shape)
    size = transport.mesh.size if transport is not None else dist.get_world_size(group)
    found = resolve(placement, traced, size, mesh=mesh)
    check_placement(traced.ops, found)
    derived = derive(traced.ops, found, outputs=traced.outputs, own_loss=hasattr(model, "own_loss"))
    return PlacedModule(model, traced, derived, transport or TorchTransport(found.mesh, group))


def resolve(
    placement: str | Placement | Mapping[str, object], traced: Traced, workers: int, *, mesh: Mesh | None = None
) -> Placement:
    """The placement that is meant, for so many workers."""
    if isinstance(placement, str):
        return named_placement(placement, traced.ops, workers=workers, mesh=mesh)
    return placement if isinstance(placement, Placement) else placement_from_mapping(placement)
