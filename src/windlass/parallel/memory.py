"""What one worker of a placement holds and computes, known without the other workers and without the network's weights.

The worker's part of the network is made of tensors without elements, and captured as any network is
(`windlass.networks.capture`), with a transport that sends nothing but takes the buffers of the real one.  What moves
before a layer, and the fringes that it fetches, count as that layer's.

Where the batch is handed over in rounds (`windlass.parallel.rounds`), the peak is that of the step in rounds; the head
keeps one round's activations at a time, so its layers' memories are those of the largest round.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from windlass.check.placement import check_placement
from windlass.networks.capture import capture
from windlass.networks.recorder import OperationObserver, Recorder
from windlass.parallel.placed import PlacedModule
from windlass.parallel.rounds import Rounds
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
    keep_gradients: bool = True,
) -> Graph:
    """The graph of one worker's part of a step: its layers' work and memories, and its peak.

    Args:
        module: the network, or what builds it; the builder is called where tensors have no elements.
        placement: how it is divided.
        input_shape: of the whole batch, all workers' together.
        rank: which worker.
        network: what the graph's `network` will say.
        num_classes: of the labels.
        keep_gradients: False: gradients of weights go as soon as they are there, into buckets; not so in rounds,
            where they add up.

    Raises:
        ConfigError: the network cannot be divided, or not so.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        built = module if isinstance(module, nn.Module) else module()
    traced = trace(built, input_shape)
    check_placement(traced.ops, placement, outputs=traced.outputs)
    derived = derive(traced.ops, placement, outputs=traced.outputs, own_loss=hasattr(built, "own_loss"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        placed = PlacedModule(built, traced, derived, NullTransport(placement.mesh, rank))
    shape = local_shape(input_shape, derived.input, placement.mesh, rank)
    name = network or type(built).__name__
    graph = capture(placed, shape, name=name, num_classes=num_classes, keep_gradients=keep_gradients)
    graph = tidy(graph, traced)
    handover = placement.handover
    if handover is None or handover.scheme == "a":
        return graph
    with mode:
        return in_rounds(graph, placed, input_shape)


def in_rounds(graph: Graph, placed: PlacedModule, input_shape: tuple[int, ...]) -> Graph:
    """The graph of a step in rounds, from that of a step at once; `placed` is of tensors without elements."""
    handover = placed.derived.placement.handover
    assert handover is not None
    _, head = placed.trunk_and_head(handover.before)
    sizes: list[int] = []

    def sum_loss(number: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        if placed.derived.outputs[number].name in head:
            sizes.append(placed.batch)
        return functional.cross_entropy(logits, labels, reduction="sum"), 0.0

    rounds = Rounds(placed.train(), handover, sum_loss)
    images = placed.local_images(torch.empty(input_shape)).clone()
    labels = placed.local_labels(torch.empty(input_shape[0], dtype=torch.int64)).clone()
    recorder = Recorder(placed, {})
    for tensor in (*placed.parameters(), *placed.buffers(), images, labels):
        recorder.live.hold(tensor, during="start")
    with OperationObserver(recorder), _adding_in_place(placed):
        rounds.step(images, labels, seed=0, batch=input_shape[0])
    share = max(sizes) / input_shape[0]
    layers = tuple(_shrunk(layer, share) if layer.name in head else layer for layer in graph.layers)
    return replace(graph, layers=layers, peak_bytes=recorder.live.peak, peak_at=f"{handover.before} rounds")


@contextlib.contextmanager
def _adding_in_place(module: nn.Module) -> Iterator[None]:
    """Has gradients of later rounds go as soon as they are there, as if added to the first ones in place.

    Autograd does so, but not with tensors without elements: of these it makes a new sum.
    """
    first: dict[Tensor, Tensor | None] = {}

    def keep(parameter: Tensor) -> None:
        first.setdefault(parameter, parameter.grad)
        parameter.grad = None

    parameters: list[Any] = list(module.parameters())
    handles = [parameter.register_post_accumulate_grad_hook(keep) for parameter in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shrunk(layer: Layer, share: float) -> Layer:
    return replace(
        layer,
        kept_bytes=round(layer.kept_bytes * share),
        output_grad_bytes=round(layer.output_grad_bytes * share),
    )


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
        last,
        name=name,
        kind=kind,
        inputs=tuple(dict.fromkeys(sources)),
        num_parameters=sum(part.num_parameters for part in parts),
        forward_macs=sum(part.forward_macs for part in parts),
        backward_macs=sum(part.backward_macs for part in parts),
        kept_bytes=sum(part.kept_bytes for part in parts),
        weight_bytes=sum(part.weight_bytes for part in parts),
        output_grad_bytes=sum(part.output_grad_bytes for part in parts),
        weight_grad_bytes=sum(part.weight_grad_bytes for part in parts),
    )
