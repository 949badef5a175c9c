"""Draws Gupta et al.'s experiment: test error over the epochs, a panel for each network."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windlass.bench.precision import PAPER_NETWORKS, RunResult, Way

# Okabe and Ito's colours, from many fraction bits to few.
COLOURS = ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#56B4E9")
LINES = {"stochastic": "-", "nearest": "--", "floor": ":"}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 90)


def draw_precision(results: Sequence[RunResult], path: Path, *, title: str) -> None:
    """Writes the picture: of each way the mean over its seeds, and a band from the least to the most."""
    from matplotlib.figure import Figure

    networks = [name for name in PAPER_NETWORKS if any(result.run.network == name for result in results)]
    ways = sorted({result.run.way for result in results}, key=lambda way: way.place)
    styles = {way: _style(way, ways) for way in ways}
    figure = Figure(figsize=(6.0 * len(networks), 5.2), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for panel, network in zip(panels, networks, strict=True):
        for way in ways:
            mine = [result for result in results if result.run.network == network and result.run.way == way]
            if mine:
                _draw(panel, mine, styles[way])
        _axes(panel, network)
    panels[0].set_ylabel("test error, %")
    lines, names = panels[0].get_legend_handles_labels()
    columns = 1 + len(COLOURS) // 2
    figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _style(way: Way, ways: Sequence[Way]) -> dict[str, Any]:
    if way.fl is None:
        return {"color": "#000000", "linewidth": 5, "alpha": 0.45, "label": str(way), "zorder": 1}
    fls = sorted({other.fl for other in ways if other.fl is not None}, reverse=True)
    colour = COLOURS[fls.index(way.fl) % len(COLOURS)]
    return {"color": colour, "linewidth": 1.5, "linestyle": LINES[way.rounding], "label": str(way)}


def _draw(panel: Any, mine: Sequence[RunResult], style: dict[str, Any]) -> None:
    num_epochs = min(len(result.points) for result in mine)
    epochs = range(1, num_epochs + 1)
    errors = [[result.points[epoch - 1].test_error for result in mine] for epoch in epochs]
    panel.plot(epochs, [statistics.fmean(each) for each in errors], **style)
    if len(mine) > 1:
        panel.fill_between(
            epochs, [min(each) for each in errors], [max(each) for each in errors], color=style["color"], alpha=0.13,
            linewidth=0,
        )  # fmt: skip


def _axes(panel: Any, network: str) -> None:
    """Errors on a logarithmic axis: 2 % and 90 % both have to be read."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    low = max((tick for tick in TICKS if tick <= low), default=low)
    panel.set_ylim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epoch")
    panel.grid(alpha=0.3)
    panel.set_title(f"{network}: {PAPER_NETWORKS[network].title}", fontsize=8)
