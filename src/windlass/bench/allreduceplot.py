"""Draws the allreduce benchmark: time against size, one panel per number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windlass.bench.allreduce import BACKEND, CHOSEN, COPY, GLOO, AllreduceRow
from windlass.plan.pick import LIBRARY, SHARED
from windlass.plan.sizes import format_bytes

# Okabe and Ito's colours; markers and dashes say the same once more.
STYLES: dict[str, dict[str, Any]] = {
    CHOSEN: {"color": "#000000", "linewidth": 3.0, "alpha": 0.35},
    GLOO: {"color": "#999999", "marker": "s", "linestyle": "--"},
    BACKEND: {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    LIBRARY: {"color": "#000000", "marker": "o"},
    SHARED: {"color": "#D55E00", "marker": "*"},
    "direct": {"color": "#E69F00", "marker": "D", "linestyle": ":"},
    "ring": {"color": "#0072B2", "marker": "^"},
    "recursive-doubling": {"color": "#009E73", "marker": "P"},
    "rabenseifner": {"color": "#56B4E9", "marker": "v"},
    "binomial": {"color": "#CC79A7", "marker": "X", "linestyle": ":"},
    "pipelined-tree": {"color": "#CC79A7", "marker": "d"},
    "hierarchical": {"color": "#F0E442", "marker": "h"},
    "naive": {"color": "#999999", "marker": "x", "linestyle": ":"},
    COPY: {"color": "#999999", "linestyle": (0, (1, 3))},
}


def draw_allreduce(rows: Sequence[AllreduceRow], path: Path, *, title: str) -> None:
    """Writes the picture."""
    from matplotlib.figure import Figure

    numbers = sorted({row.ranks for row in rows})
    figure = Figure(figsize=(1.5 + 4.2 * len(numbers), 5.2), layout="constrained")
    axes = figure.subplots(1, len(numbers), sharey=True, squeeze=False)[0]
    for axis, ranks in zip(axes, numbers, strict=True):
        for by in dict.fromkeys(row.by for row in rows):
            points = sorted((row.num_bytes, row.seconds) for row in rows if row.by == by and row.ranks == ranks)
            if points:
                style = STYLES.get(by.partition(":")[0], {})
                axis.plot(*zip(*points, strict=True), label=by, markersize=5, **style)
        sizes = sorted({row.num_bytes for row in rows if row.ranks == ranks})
        axis.set(xscale="log", yscale="log", xlabel="buffer", title=f"{ranks} ranks")
        axis.set_xticks(sizes[::2], [format_bytes(size) for size in sizes[::2]], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds, slowest rank")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
