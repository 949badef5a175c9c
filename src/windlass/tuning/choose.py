"""Chooses a plan for a network: every lever at a value, each with its reason.

These values follow rules of thumb from a few measurements (docs/log.md).  Convolutions are then tuned on the
machine at hand, where that is asked for (`tuning.network`).
"""

from __future__ import annotations

from windlass.plan.graph import Graph
from windlass.plan.levers import LEVERS
from windlass.plan.plan import Choice, LayerChoice, Plan

CHANNELS_LAST_FROM = 64
"""Input channels from which a convolution counts as one that gains from channels_last: a rule of thumb."""


def choose_plan(graph: Graph, *, workers: int, batch: int) -> Plan:
    """The plan that the trainer uses for `graph` on `workers` ranks with this global batch."""
    chosen = {
        "convolution": Choice("torch", "PyTorch's own (oneDNN); tune: model or measure chooses for each layer"),
        "number_format": Choice("float32", "the one number format there is so far"),
        "layout": _layout(graph),
        "parallel": Choice("data", f"{workers} worker(s), each its shard of every batch of {batch}"),
        "allreduce": Choice("auto", "by size: what windlass tune cluster has measured, else rules of thumb"),
        "fixed_order": Choice(False, "the schedules' own orders are faster"),
        "bucket_bytes": Choice(LEVERS["bucket_bytes"].default, "large enough to hide a message's latency"),
        "overlap": _overlap(graph, workers),
    }
    convolutions = [layer for layer in graph.layers if layer.kind.startswith("conv")]
    return Plan(
        network=graph.network,
        graph=graph.digest(),
        input_shape=graph.input_shape[1:],
        workers=workers,
        batch=batch,
        levers=chosen,
        layers=tuple(LayerChoice(layer.name, layer.kind, "torch") for layer in convolutions),
    )


def _layout(graph: Graph) -> Choice:
    """Weighs multiply-adds: oneDNN's blocked kernels read channels_last without a reorder."""
    convolutions = [layer for layer in graph.layers if layer.kind == "conv2d"]
    macs = sum(layer.forward_macs for layer in convolutions)
    wide = sum(layer.forward_macs for layer in convolutions if _in_channels(graph, layer.inputs) >= CHANNELS_LAST_FROM)
    if macs and wide > macs / 2:
        return Choice(
            "channels_last",
            f"{100 * wide // macs} % of the multiply-adds are in convolutions of {CHANNELS_LAST_FROM} channels or more",
        )
    return Choice("contiguous", "most multiply-adds are in convolutions of few channels, which need no reorder")


def _in_channels(graph: Graph, inputs: tuple[str, ...]) -> int:
    shapes = {layer.name: layer.output_shape for layer in graph.layers}
    shape = shapes.get(inputs[0], graph.input_shape) if inputs else graph.input_shape
    return shape[1] if len(shape) > 1 else 1


def _overlap(graph: Graph, workers: int) -> Choice:
    bucket_bytes = int(LEVERS["bucket_bytes"].default)
    gradient_bytes = graph.memories()["∇W"]
    if workers == 1:
        return Choice(False, "one worker sends nothing")
    if gradient_bytes <= bucket_bytes:
        return Choice(False, f"all {gradient_bytes} bytes of gradients fit one bucket")
    return Choice(True, f"{gradient_bytes} bytes of gradients leave in buckets while the backward pass goes on")
