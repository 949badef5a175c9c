"""Whether a placement fits the memory that a worker has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from windlass.errors import ConfigError
from windlass.parallel.memory import predict
from windlass.plan.derive import Derived
from windlass.plan.graph import Graph
from windlass.plan.layout import local_shape

if TYPE_CHECKING:
    from torch import nn

MOST_NAMED = 8
"""Of more workers, those that need most are named."""


def check_memory(needed: Sequence[int], limit_bytes: int, *, placement: str) -> None:
    """Refuses a placement under which some worker needs more than it has.

    Args:
        needed: predicted bytes of every worker, by rank.
        limit_bytes: what each of them has.
        placement: its name, for the error.

    Raises:
        ConfigError: with the numbers.

    >>> check_memory([5 << 20, 3 << 20], 4 << 20, placement="data")
    Traceback (most recent call last):
    ...
    windlass.errors.ConfigError: placement data does not fit 4.0 MiB a worker: worker 0 needs 5.0 MiB, worker 1 3.0 MiB
    """
    if max(needed) <= limit_bytes:
        return
    order = sorted(range(len(needed)), key=lambda rank: (-needed[rank], rank))
    numbers = [f"worker {rank} {_size(needed[rank])}" for rank in order[:MOST_NAMED]]
    numbers[0] = f"worker {order[0]} needs {_size(needed[order[0]])}"
    more = [f"{len(order) - MOST_NAMED} more"] if len(order) > MOST_NAMED else []
    listed = ", ".join([*numbers, *more])
    raise ConfigError(f"placement {placement} does not fit {_size(limit_bytes)} a worker: {listed}")


def predict_all(
    module: nn.Module, derived: Derived, input_shape: tuple[int, ...], *, network: str = "", num_classes: int = 10,
    keep_gradients: bool = True,
) -> list[Graph]:  # fmt: skip
    """What every worker computes and holds; workers whose parts have the same shapes are predicted once.

    Args:
        module: the whole network.
        derived: of its placement.
        input_shape: of the whole batch.
        network: its name.
        num_classes: of the labels.
        keep_gradients: see `windlass.parallel.memory.predict`.
    """
    found: dict[object, Graph] = {}
    graphs = []
    for rank in range(derived.placement.mesh.size):
        key = part_shapes(derived, rank)
        if key not in found:
            found[key] = predict(
                module, derived.placement, input_shape, rank=rank, network=network, num_classes=num_classes,
                keep_gradients=keep_gradients,
            )  # fmt: skip
        graphs.append(found[key])
    return graphs


def training_bytes(graph: Graph, derived: Derived, rank: int, *, optimizer_copies: int) -> int:
    """Predicted most bytes of tensors on one worker in training.

    The step's peak, the worker's own flat gradients, the sums of those that are summed, and the optimizer's state.

    Args:
        graph: what `predict_all` says of the worker, gradients not kept where buckets are sent during the backward
            pass.
        derived: of the placement.
        rank: the worker.
        optimizer_copies: tensors that the optimizer keeps for each parameter.
    """
    mesh = derived.placement.mesh
    summed = [
        4 * math.prod(parameter.local_shape(mesh, rank))
        for placed in derived.ops
        for parameter in placed.parameters
        if parameter.sum_axes
    ]
    return graph.peak_bytes + (1 + optimizer_copies) * graph.memories()["∇W"] + sum(summed)


def part_shapes(derived: Derived, rank: int) -> object:
    """The shapes of all that a worker holds and sends: equal for workers that need the same memory."""
    mesh = derived.placement.mesh
    parts = [
        (
            local_shape(placed.op.output_shape, placed.output, mesh, rank),
            tuple(parameter.local_shape(mesh, rank) for parameter in placed.parameters),
        )
        for placed in derived.ops
    ]
    return tuple(parts), derived.traffic(rank)


def _size(num_bytes: int) -> str:
    """A size for a person, in powers of 1024."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
