"""Draws the cluster benchmark: predicted against measured time, one panel for each setting of the links."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from windlass.bench.allreduceplot import STYLES
from windlass.bench.cluster import ClusterResult, describe_links


def draw_cluster(results: Sequence[ClusterResult], path: Path, *, title: str) -> None:
    """Writes the picture; a point on the line is a prediction that came true, the band is 15 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 + 4.6 * len(results), 5.2), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(axes, results, strict=True):
        rows = [row for row in result.rows if row.predicted_s]
        times = [time for row in rows for time in (row.predicted_s, row.measured_s)]
        ends = [0.8 * min(times), 1.25 * max(times)]
        axis.plot(ends, ends, color="#999999", linewidth=1)
        axis.fill_between(ends, [end / 1.15 for end in ends], [1.15 * end for end in ends], color="#999999", alpha=0.2)
        for by in dict.fromkeys(row.by for row in rows):
            name, _, inner = by.partition(":")
            style = {key: value for key, value in STYLES.get(name, {}).items() if key in ("color", "marker")}
            if name == "hierarchical":  # the same shape, in the colour of what runs between hosts
                style["color"] = STYLES.get(inner, {}).get("color", "#F0E442")
            points = [(row.measured_s, row.predicted_s) for row in rows if row.by == by]
            axis.plot(*zip(*points, strict=True), label=by, linestyle="", markersize=6, **style)
        axis.set(xscale="log", yscale="log", xlabel="measured, s", xlim=ends, ylim=ends, aspect="equal")
        axis.set_title(describe_links(result.links), fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("predicted, s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
