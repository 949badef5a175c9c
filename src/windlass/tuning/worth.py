"""Whether a run is long enough to win by measuring convolutions: a rule of thumb, applied before anything is timed."""

from __future__ import annotations

from windlass.plan.convolution import candidates
from windlass.plan.graph import Graph
from windlass.plan.shapes import graph_convolutions

TUNING_S = 120.0
"""What compiling and measuring a network's convolutions costs at most on a first run (docs/convolution.md)."""
MIN_CHANNELS = 32
"""Channels from which fast algorithms win in training."""
FLOPS = 2.0e11
"""What PyTorch's own convolutions do a second and thread, at best (docs/convolution.md)."""
SAVED = 0.4
"""The part of their time that a fast algorithm saves."""


def saved_s(graph: Graph, *, steps: int, threads: int, accuracy: str) -> float:
    """Seconds that fast algorithms will save in a run of so many steps, at least.

    Counted are layers of `MIN_CHANNELS` or more for which a Winograd or Fourier algorithm is accurate enough.
    """
    flops = 0.0
    for shape in graph_convolutions(graph).values():
        families = {algorithm.family for algorithm in candidates(shape, accuracy=accuracy)}
        if min(shape.in_channels, shape.out_channels) >= MIN_CHANNELS and families & {"winograd", "fft"}:
            flops += 3 * 2.0 * shape.macs  # forward and both gradients
    return SAVED * steps * flops / (FLOPS * threads)


def decide_tuning(graph: Graph, *, steps: int, threads: int, accuracy: str) -> tuple[str, str]:
    """``measure`` or ``off``, and why, for a run whose wish is ``auto``."""
    saved = saved_s(graph, steps=steps, threads=threads, accuracy=accuracy)
    if saved > TUNING_S:
        return "measure", f"fast algorithms will save about {saved:,.0f} s of this run, measuring costs {TUNING_S:.0f}"
    return "off", f"fast algorithms would save about {saved:,.0f} s of this run, measuring costs up to {TUNING_S:.0f}"
