"""Draws the benchmark of placements: time of a step with what of it is waiting, bytes sent, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from windlass.bench.parallel import DDP, ParallelRow

MIB = 1 << 20
# Okabe and Ito's colours.
COLOURS = {
    "data": "#0072B2", "model": "#D55E00", "hybrid": "#009E73", "hybrid:a": "#009E73", "hybrid:b": "#56B4E9",
    "hybrid:c": "#E69F00", "tiles": "#CC79A7", DDP: "#999999",
}  # fmt: skip
OTHER, WAITING = "#8C564B", "#222222"


def draw_parallel(rows: Sequence[ParallelRow], path: Path, *, title: str) -> None:
    """Writes the picture: a line of panels for each number of workers."""
    from matplotlib.figure import Figure

    numbers = sorted({row.workers for row in rows})
    figure = Figure(figsize=(12.5, 0.9 + 2.7 * len(numbers)), layout="constrained")
    panels = figure.subplots(len(numbers), 3, squeeze=False)
    for line, workers in zip(panels, numbers, strict=True):
        chosen = [row for row in rows if row.workers == workers]
        _draw_times(line[0], chosen)
        _draw_bytes(line[1], chosen)
        _draw_memory(line[2], chosen)
        line[0].set_title(f"{workers} workers: time of a step, hatched: exposed communication", fontsize=9)
        line[1].set_title("sent by a worker in a step, pale: fully connected layers", fontsize=9)
        line[2].set_title("most bytes of tensors on a worker; mark: predicted", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _names(axis: Any, rows: Sequence[ParallelRow]) -> None:
    axis.set_yticks(range(len(rows)), [row.way for row in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlim(left=0)


def _colours(rows: Sequence[ParallelRow]) -> list[str]:
    return [COLOURS.get(row.way, OTHER) for row in rows]


def _draw_times(axis: Any, rows: Sequence[ParallelRow]) -> None:
    errors = [[row.seconds - row.low_s for row in rows], [row.high_s - row.seconds for row in rows]]
    axis.barh(range(len(rows)), [row.seconds for row in rows], color=_colours(rows), xerr=errors, ecolor=WAITING)
    waits = [min(row.exposed_s or 0.0, row.seconds) for row in rows]
    begins = [row.seconds - wait for row, wait in zip(rows, waits, strict=True)]
    axis.barh(range(len(rows)), waits, left=begins, fill=False, hatch="////", edgecolor=WAITING, linewidth=0)
    axis.set_xlabel("seconds", fontsize=8)
    _names(axis, rows)


def _draw_bytes(axis: Any, rows: Sequence[ParallelRow]) -> None:
    for number, row in enumerate(rows):
        total = row.sent if row.sent is not None else row.wire
        if total is None:
            axis.text(0, number, " not counted", fontsize=8, va="center", color=WAITING)
            continue
        colour, head = COLOURS.get(row.way, OTHER), row.head_sent or 0
        axis.barh(number, (total - head) / MIB, color=colour)
        axis.barh(number, head / MIB, left=(total - head) / MIB, color=colour, alpha=0.45)
    axis.set_xlabel("MiB", fontsize=8)
    _names(axis, rows)


def _draw_memory(axis: Any, rows: Sequence[ParallelRow]) -> None:
    axis.barh(range(len(rows)), [row.peak / MIB for row in rows], color=_colours(rows))
    for number, row in enumerate(rows):
        if row.predicted_peak is not None:
            axis.plot([row.predicted_peak / MIB], [number], marker="|", markersize=14, color=WAITING)
    axis.set_xlabel("MiB", fontsize=8)
    _names(axis, rows)
