"""Draws a network's graph: boxes for layers, from top to bottom in the order in which they can run.

The layout is layered (after Sugiyama, Tagawa and Toda 1981): a layer's rank is the longest path to it from
the input; an edge over several ranks keeps a free lane on each of them, so it runs beside boxes, not through;
ranks are ordered by the barycentre of their neighbours and then pulled straight.  A long graph is folded into
columns where only one edge crosses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from windlass.errors import ConfigError
from windlass.plan.graph import INPUT, Graph, Layer

SUFFIXES = (".png", ".svg", ".pdf")

COLOURS: dict[str, str] = {
    "conv2d": "#9ecae1",
    "conv1d": "#9ecae1",
    "conv3d": "#9ecae1",
    "PartialConv2d": "#9ecae1",
    "linear": "#fdae6b",
    "RadialBasisOutput": "#fdae6b",
    "batch_norm": "#d9d9ef",
    "local_response_norm": "#d9d9ef",
    "layer_norm": "#d9d9ef",
    "group_norm": "#d9d9ef",
    "max_pool2d": "#a1d99b",
    "avg_pool2d": "#a1d99b",
    "adaptive_avg_pool2d": "#a1d99b",
    "Subsampling": "#a1d99b",
    "relu": "#fff2ae",
    "tanh": "#fff2ae",
    "sigmoid": "#fff2ae",
    "Squash": "#fff2ae",
    "dropout": "#f2e3cf",
    "add": "#f4a6a6",
    "cat": "#f4a6a6",
    INPUT: "#ffffff",
}
"""Fill of a box by its kind; other kinds are grey."""

BOX_WIDTH, BOX_HEIGHT = 2.1, 0.62
RANK_STEP, SLOT_STEP, COLUMN_GAP = 0.92, 2.35, 0.9
LANE_SHARE = 0.35
"""Width of an edge's lane as a share of a box's."""
FOLD_AFTER = 20
"""Ranks in a column, about; a column goes on until one edge alone crosses its end."""


@dataclass(slots=True)
class Slot:
    """A box, or the lane of an edge that passes a rank."""

    layer: Layer | None
    rank: int
    x: float = 0.0
    y: float = 0.0
    above: list[Slot] = field(default_factory=list)
    below: list[Slot] = field(default_factory=list)

    @property
    def half_width(self) -> float:
        """Half of the room it needs beside its neighbours."""
        return SLOT_STEP / 2 * (1.0 if self.layer is not None else LANE_SHARE)


def draw_graph(graph: Graph, path: Path) -> None:
    """Write a picture of `graph` to `path`; its suffix (.png, .svg, .pdf) says in which format.

    A box shows a layer's name, its kind with the shape of its output (without the batch), and its parameters.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"a graph is drawn as {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}: {path}")
    ranks = layout(graph)
    columns = _fold(ranks)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slots = [slot for rank in ranks for slot in rank]
    left = min(slot.x - slot.half_width for slot in slots) - 0.2
    right = max(slot.x + slot.half_width for slot in slots) + 0.2
    bottom, top = min(slot.y for slot in slots) - 0.7, 1.4
    figure = Figure(figsize=(max(right - left, 5.0), top - bottom), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(left, left + max(right - left, 5.0))
    axes.set_ylim(bottom, top)
    axes.axis("off")
    _draw_title(axes, graph, left + 0.2)
    for slot in slots:
        for target in slot.below:
            folded = columns[slot.rank] != columns[target.rank]
            column = [s for s in slots if columns[s.rank] == columns[target.rank]]
            gap = min(s.x - s.half_width for s in column) - COLUMN_GAP / 2 if folded else None
            _draw_edge(axes, slot, target, gap=gap)
    for slot in slots:
        if slot.layer is not None:
            _draw_box(axes, slot)
    figure.savefig(path, format=path.suffix.lower()[1:])


def layout(graph: Graph) -> list[list[Slot]]:
    """Ranks from the input down, each from left to right, with the place of every slot."""
    ranks = _ranked(graph)
    _order(ranks)
    for rank in ranks:
        _spread(rank, [0.0] * len(rank))
    for sweep in range(12):
        for rank in ranks if sweep % 2 == 0 else reversed(ranks):
            _spread(rank, [_wish(slot, downward=sweep % 2 == 0) for slot in rank])
    columns = _fold(ranks)
    _place_columns(ranks, columns)
    return ranks


def _ranked(graph: Graph) -> list[list[Slot]]:
    source = Layer(
        name=INPUT,
        kind=INPUT,
        inputs=(),
        output_shape=graph.input_shape,
        num_parameters=0,
        forward_macs=0,
        backward_macs=0,
        kept_bytes=0,
        weight_bytes=0,
        output_grad_bytes=0,
        weight_grad_bytes=0,
    )
    boxes = {INPUT: Slot(source, 0)}
    for layer in graph.layers:
        rank = 1 + max((boxes[name].rank for name in layer.inputs), default=0)
        boxes[layer.name] = Slot(layer, rank)
    ranks: list[list[Slot]] = [[] for _ in range(1 + max(box.rank for box in boxes.values()))]
    for box in boxes.values():
        ranks[box.rank].append(box)
    for box in boxes.values():
        for name in box.layer.inputs if box.layer is not None else ():
            _connect(boxes[name], box, ranks)
    return ranks


def _connect(source: Slot, target: Slot, ranks: list[list[Slot]]) -> None:
    """Link two boxes by way of one lane on each rank between; edges from one source share their lanes."""
    at = source
    for rank in range(source.rank + 1, target.rank):
        lane = next((slot for slot in at.below if slot.layer is None), None)
        if lane is None:
            lane = Slot(None, rank)
            ranks[rank].append(lane)
            at.below.append(lane)
            lane.above.append(at)
        at = lane
    at.below.append(target)
    target.above.append(at)


def _order(ranks: list[list[Slot]]) -> None:
    """Barycentre sweeps: each slot towards the mean place of its neighbours in the rank before."""
    for sweep in range(8):
        downward = sweep % 2 == 0
        for rank in ranks[1:] if downward else ranks[-2::-1]:
            other = ranks[rank[0].rank - 1] if downward else ranks[rank[0].rank + 1]
            place = {id(slot): index / max(1, len(other) - 1) for index, slot in enumerate(other)}
            keys = {
                id(slot): _mean([place[id(n)] for n in (slot.above if downward else slot.below)], 0.5) for slot in rank
            }
            rank.sort(key=lambda slot, keys=keys: keys[id(slot)])  # type: ignore[misc]


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _wish(slot: Slot, *, downward: bool) -> float:
    """Where a slot would stand straight under (over) its neighbours."""
    neighbours = slot.above if downward else slot.below
    return _mean([n.x for n in neighbours], slot.x)


def _spread(rank: list[Slot], wishes: list[float]) -> None:
    """Nearest places to the wishes without overlap: left to right, then shifted back to their common mean."""
    edge = float("-inf")
    for slot, wish in zip(rank, wishes, strict=True):
        slot.x = max(wish, edge + slot.half_width)
        edge = slot.x + slot.half_width
    shift = _mean([wish - slot.x for slot, wish in zip(rank, wishes, strict=True)], 0.0)
    for slot in rank:
        slot.x += shift


def _fold(ranks: list[list[Slot]]) -> list[int]:
    """The column of each rank: a new one begins after `FOLD_AFTER` ranks, where a single edge crosses."""
    columns, column, length = [], 0, 0
    for index, rank in enumerate(ranks):
        single = index > 0 and sum(len(slot.below) for slot in ranks[index - 1]) == 1 and len(rank) == 1
        remaining = len(ranks) - index
        if length >= FOLD_AFTER and single and remaining > FOLD_AFTER // 4:
            column, length = column + 1, 0
        columns.append(column)
        length += 1
    return columns


def _place_columns(ranks: list[list[Slot]], columns: list[int]) -> None:
    offset = 0.0
    for column in range(columns[-1] + 1):
        members = [rank for rank, place in zip(ranks, columns, strict=True) if place == column]
        left = min(slot.x - slot.half_width for rank in members for slot in rank)
        right = max(slot.x + slot.half_width for rank in members for slot in rank)
        for row, rank in enumerate(members):
            for slot in rank:
                slot.x += offset - left
                slot.y = -row * RANK_STEP
        offset += right - left + COLUMN_GAP


def _draw_title(axes: Any, graph: Graph, x: float) -> None:
    shape = "×".join(str(side) for side in graph.input_shape)
    axes.text(x, 1.05, graph.network, fontsize=15, fontweight="bold", va="center")
    facts = (
        f"input {shape} · {graph.num_parameters:,} parameters · "
        f"{_short(graph.forward_macs)} forward MACs · peak {graph.peak_bytes / 2**20:,.1f} MiB"
    )
    axes.text(x, 0.68, facts, fontsize=8, va="center", color="#444444")


def _draw_box(axes: Any, slot: Slot) -> None:
    from matplotlib.patches import FancyBboxPatch

    layer = slot.layer
    if layer is None:
        return
    axes.add_patch(
        FancyBboxPatch(
            (slot.x - BOX_WIDTH / 2, slot.y - BOX_HEIGHT / 2),
            BOX_WIDTH,
            BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=COLOURS.get(layer.kind, "#eeeeee"),
            edgecolor="#555555",
            linewidth=0.8,
        )
    )
    name = layer.name if len(layer.name) <= 26 else "…" + layer.name[-25:]
    shape = "×".join(str(side) for side in layer.output_shape[1:])
    lines = [f"{layer.kind}  {shape}" if layer.kind != layer.name else shape]
    if layer.num_parameters:
        lines.append(f"{layer.num_parameters:,} parameters")
    step = 0.185
    start = slot.y + step * len(lines) / 2
    axes.text(slot.x, start, name, fontsize=8, fontweight="bold", ha="center", va="center")
    for index, line in enumerate(lines, start=1):
        axes.text(slot.x, start - step * index, line, fontsize=7, ha="center", va="center", color="#222222")


def _draw_edge(axes: Any, source: Slot, target: Slot, *, gap: float | None) -> None:
    """A curve that leaves downwards and arrives from above; by way of a gap between columns."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    start, end = (source.x, source.y - BOX_HEIGHT / 2), (target.x, target.y + BOX_HEIGHT / 2)
    if gap is not None:
        low, high = start[1] - 0.25, end[1] + 0.25
        points = [start, (start[0], low), (gap, low), (gap, high), (end[0], high), end]
        codes = [Curve.MOVETO] + [Curve.LINETO] * 5
    else:
        middle = (start[1] + end[1]) / 2
        points = [start, (start[0], middle), (end[0], middle), end]
        codes = [Curve.MOVETO] + [Curve.CURVE4] * 3
    if target.layer is None:  # straight down its lane, beside the boxes of its rank
        points.append((target.x, target.y - BOX_HEIGHT / 2))
        codes.append(Curve.LINETO)
    axes.add_patch(
        FancyArrowPatch(
            path=Curve(points, codes),
            arrowstyle="-|>" if target.layer is not None else "-",
            mutation_scale=8,
            color="#666666",
            linewidth=1.0,
            shrinkA=0,
            shrinkB=0,
            zorder=0,
        )
    )


def _short(number: int) -> str:
    """A count in three digits.

    >>> _short(714_188_480)
    '714 M'
    """
    for factor, unit in ((10**12, " T"), (10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)
