"""What one worker of a placement holds and computes, known without the other workers and without the network's weights.

The worker's part of the network is made of tensors without elements, and captured as any network is
(`windlass.networks.capture`), with a transport that sends nothing but takes the buffers of the real one.  What moves
before a layer, and the fringes that it fetches, count as that layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from windlass.check.placement import check_placement
from windlass.networks.capture import capture
from windlass.parallel.placed import PlacedModule
from windlass.parallel.trace import Traced, trace
from windlass.parallel.transport import NullTransport
from windlass.plan.derive import derive
from windlass.plan.graph import Graph, Layer
from windlass.plan.layout import local_shape
from windlass.plan.placement import Placement

AFTER = "loss"
"""The layer that the moves of the outputs make up."""


def predict(
    module: nn.Module | Callable[[], nn.Module],
    placement: Placement,
    input_shape: tuple[int, ...],
    *,
    rank: int = 0,
    network: str = "",
    num_classes: int = 10,
) -> Graph:
    """The graph of one worker's part of a step: its layers' work and memories, and its peak.

    A hand-over in rounds is predicted as scheme (a): the whole batch at once, which is the most it can hold.

    Args:
        module: the network, or what builds it; the builder is called where tensors have no elements.
        placement: how it is divided.
        input_shape: of the whole batch, all workers' together.
        rank: which worker.
        network: what the graph's `network` will say.
        num_classes: of the labels.

    Raises:
        ConfigError: the network cannot be divided, or not so.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = module if isinstance(module, nn.Module) else module()
    traced = trace(built, input_shape)
    check_placement(traced.ops, placement, outputs=traced.outputs)
    derived = derive(traced.ops, placement, outputs=traced.outputs, own_loss=hasattr(built, "own_loss"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        placed = PlacedModule(built, traced, derived, NullTransport(placement.mesh, rank))
    shape = local_shape(input_shape, derived.input, placement.mesh, rank)
    graph = capture(placed, shape, name=network or type(built).__name__, num_classes=num_classes)
    return tidy(graph, traced)


def tidy(graph: Graph, traced: Traced) -> Graph:
    """The graph with the network's layers alone: what runs between them is the next one's."""
    kinds = {op.name: op.kind for op in traced.ops}
    owners: dict[str, str] = {}
    before: list[Layer] = []
    layers: list[Layer] = []
    for layer in graph.layers:
        before.append(layer)
        if layer.name in kinds:
            layers.append(_joined(before, layer.name, kinds[layer.name], owners))
            before = []
    if before:
        layers.append(_joined(before, AFTER, AFTER, owners))
    name, _, phase = graph.peak_at.rpartition(" ")
    return replace(graph, layers=tuple(layers), peak_at=f"{owners.get(name, name)} {phase}".strip())


def _joined(parts: list[Layer], name: str, kind: str, owners: dict[str, str]) -> Layer:
    """One layer of several; `owners` learns which."""
    inside = {part.name for part in parts}
    sources = (owners.get(source, source) for part in parts for source in part.inputs if source not in inside)
    owners.update(dict.fromkeys(inside, name))
    last = parts[-1]
    return replace(
        last, name=name, kind=kind, inputs=tuple(dict.fromkeys(sources)), **{key: _sum(parts, key) for key in SUMS}
    )


def _sum(parts: list[Layer], key: str) -> int:
    return sum(int(getattr(part, key)) for part in parts)


SUMS = ("num_parameters", "forward_macs", "backward_macs", "kept_bytes", "weight_bytes", "output_grad_bytes")
SUMS += ("weight_grad_bytes",)
