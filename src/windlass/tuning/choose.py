"""Chooses a plan for a network: every lever at a value, each with its reason.

These values follow rules of thumb from a few measurements (docs/log.md).  Convolutions are then tuned on the
machine at hand, where that is asked for (`tuning.network`).
"""

from __future__ import annotations

from collections.abc import Mapping

from windlass.plan.graph import Graph
from windlass.plan.levers import LEVERS, Value
from windlass.plan.plan import Choice, LayerChoice, Plan
from windlass.plan.recipe import ROLES, parse_recipe, spell_format

CHANNELS_LAST_FROM = 64
"""Input channels from which a convolution counts as one that gains from channels_last: a rule of thumb."""

MIB = 1 << 20

PARALLEL_REASONS = {
    "data": "{workers} worker(s), each its shard of every batch of {batch}",
    "model": "asked for: {workers} worker(s), each its channels of every layer",
    "hybrid": "asked for: {workers} worker(s), each its shard of the batch, and of the head its neurons",
    "tiles": "asked for: {workers} worker(s), each its rows of every image",
}
"""Why the lever ``parallel`` stands where it does."""


def choose_plan(
    graph: Graph, *, workers: int, batch: int, asked: Mapping[str, Value] | None = None, plain: Graph | None = None
) -> Plan:
    """The plan that the trainer uses for `graph` on `workers` ranks with this global batch.

    Args:
        graph: a step of the network on one worker, micro-batches and recomputed blocks as asked for.
        workers: how many share the batch.
        batch: samples of a step over all of them.
        asked: levers that are set by hand.
        plain: a step without micro-batches and without recomputing, where one of them is asked for.
    """
    asked = asked or {}
    parallel = str(asked.get("parallel", LEVERS["parallel"].default))
    reason = PARALLEL_REASONS.get(parallel.partition(":")[0], "asked for: the file's placement")
    chosen = {
        "convolution": Choice("torch", "PyTorch's own (oneDNN); tune: model or measure chooses for each layer"),
        "number_format": _number_format(str(asked.get("number_format", "float32"))),
        "layout": _layout(graph),
        "parallel": Choice(parallel, reason.format(workers=workers, batch=batch)),
        "mesh": Choice(asked.get("mesh", LEVERS["mesh"].default), "the workers' order is the placement's"),
        "accumulate": _accumulate(graph, plain, int(asked.get("accumulate", 1))),
        "recompute": _recompute(graph, plain, str(asked.get("recompute", "none"))),
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


def _number_format(text: str) -> Choice:
    """The recipe that is asked for, and what it keeps in how many bits."""
    recipe = parse_recipe(text)
    if recipe.is_plain:
        return Choice(text, "32 bits everywhere; fixed16, float16 and bfloat16 halve what training keeps")
    kept = ", ".join(f"{role} {spell_format(getattr(recipe, role))}" for role in ROLES)
    return Choice(text, f"asked for: {kept}, {recipe.rounding} rounding; sums are made in float32")


def _accumulate(graph: Graph, plain: Graph | None, parts: int) -> Choice:
    if parts == 1 or plain is None:
        return Choice(parts, "a worker's share of the batch fits in one piece")
    return Choice(parts, f"asked for: {parts} micro-batches of {graph.input_shape[0]} samples: {_kept(graph, plain)}")


def _recompute(graph: Graph, plain: Graph | None, value: str) -> Choice:
    if value == "none" or plain is None:
        return Choice(value, "every activation is kept: no layer is computed twice")
    macs = graph.forward_macs + graph.backward_macs
    more = 100 * graph.recomputed_macs / max(macs, 1)
    return Choice(value, f"asked for: {_kept(graph, plain)}, for {more:.0f} % more multiply-adds")


def _kept(graph: Graph, plain: Graph) -> str:
    """What one step keeps and needs, and what it would without."""
    kept, kept_plain = (f"{found.memories()['D'] / MIB:.1f}" for found in (graph, plain))
    peak, peak_plain = (f"{found.peak_bytes / MIB:.1f}" for found in (graph, plain))
    return f"D {kept} MiB instead of {kept_plain}, peak {peak} MiB instead of {peak_plain}"


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
