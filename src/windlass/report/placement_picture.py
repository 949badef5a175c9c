"""Draws a placement: a column for each layer, a row for each worker, and what each worker holds of each.

Blue is a layer's output, samples downwards and channels (neurons) to the right; orange its weights, inputs downwards
and outputs to the right.  A frame is the whole tensor, what is filled is the worker's own, hatched where it is an
addend of the whole.  Maps that are cut by rows or columns show these instead, one sheet behind the other for parts of
the batch.  Between two columns, arrows are the messages that the difference of layouts takes, all derived from the
placement, with the most bytes that one worker sends forward (→) and backward (←); below a column stands what the sum
of its weights' gradients takes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.errors import ConfigError
from windlass.plan.derive import Derived
from windlass.plan.graph import INPUT
from windlass.plan.layout import PARTIAL, Layout, Split, extents
from windlass.plan.mesh import Mesh
from windlass.report.placement_columns import Column, Move, columns_of, joined
from windlass.report.rounds_picture import RoundsPart
from windlass.report.sheet import check_sheet, save_sheet
from windlass.report.units import SPACE, num_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_WORKERS, MOST_COLUMNS, FEW_COLUMNS = 16, 40, 14
"""More could not be read; above the last, neighbours that are placed alike share a column."""
CROWD = 4
"""Messages among more members are drawn thin."""
ACTIVATIONS, WEIGHTS, ARROW, INK, PALE = "#0072B2", "#E69F00", "#444444", "#333333", "#F4F4F4"
LEFT, RIGHT, TOP, ROW, BOX = 1.15, 0.3, 1.3, 0.72, 0.44
"""Inches: beside and above the columns, from row to row, and a tensor's side."""
BETWEEN, GAP, ARROWS, SHEET = 0.12, 0.36, 0.5, 0.045
"""Inches: between output and weights; between columns; more for each move; between sheets."""
Share = tuple[float, float]
"""Where along a side what is held begins and ends."""
LETTER, LINE, WORDS = 0.0605, 0.15, 22
"""Inches: a letter, a line; letters in a line above messages."""


# --- the file -----------------------------------------------------------------------------------------------


def check_placement_picture(path: Path, *, workers: int) -> None:
    """Refuses a picture that could not be written or read.

    Raises:
        ConfigError: an unknown kind of file, no such folder, or too many workers.
    """
    check_sheet(path)
    if workers > MOST_WORKERS:
        raise ConfigError(f"--plot {path}: a picture shows {MOST_WORKERS} workers at most, got {workers}")


def draw_placement(derived: Derived, path: Path, *, title: str) -> None:
    """Writes the picture; the suffix of `path` (.png, .svg, .pdf) says in which format.

    Raises:
        ConfigError: it could not be written or read.
    """
    check_placement_picture(path, workers=derived.placement.mesh.size)
    columns = columns_of(derived)
    if len(columns) > FEW_COLUMNS:
        columns = joined(columns)
    if len(columns) > MOST_COLUMNS:
        raise ConfigError(f"--plot {path}: a picture shows {MOST_COLUMNS} layers at most, got {len(columns)}")
    sheet = _Sheet(columns, derived.placement.mesh, title)
    rounds = _rounds(derived)
    if rounds is None:
        save_sheet(path, sheet.width, sheet.height, sheet.draw)
        return

    def draw(axes: Axes) -> None:
        sheet.draw(axes)
        rounds.draw(axes, sheet.height + 0.1)

    sheet.width = max(sheet.width, rounds.width)
    save_sheet(path, sheet.width, sheet.height + 0.1 + rounds.height, draw)


def _rounds(derived: Derived) -> RoundsPart | None:
    """How the batch is handed over, if it is, along the axis on which samples become neurons."""
    placement = derived.placement
    if placement.handover is None:
        return None
    head = derived.placed(placement.handover.before)
    source, batch = derived.layout_of(head.op.inputs[0]), head.op.input_shapes[0][0]
    axes = [axis for axis, (ours, need) in enumerate(zip(source, head.needs[0], strict=True)) if ours != need]
    if len(axes) != 1:
        return None
    spans = [extents((batch,), source, placement.mesh, rank)[0] for rank in placement.mesh.group(0, axes[0])]
    rounds = RoundsPart(placement.handover, [stop - start for start, stop in spans], left=LEFT + 0.55)
    return rounds if rounds.fits else None


class _Sheet:
    """Where everything is, in inches from the top left."""

    def __init__(self, columns: Sequence[Column], mesh: Mesh, title: str) -> None:
        self.columns, self.mesh, self.title = columns, mesh, title
        self.gaps = [_gap(column) for column in columns]
        self.widths = [_width(column) for column in columns]
        self.lefts, x = [], LEFT
        for gap, width in zip(self.gaps, self.widths, strict=True):
            x += gap
            self.lefts.append(x)
            x += width
        self.width = max(x + RIGHT, 6.2)
        self.top = TOP + 0.8 * LINE * max(len(_lines(column)) for column in columns)
        self.bottom = self.top + ROW * mesh.size
        self.height = self.bottom + 0.95

    def y(self, rank: float) -> float:
        """Where a worker's row begins."""
        return self.top + ROW * rank

    def draw(self, axes: Axes) -> None:
        """Everything, from the back to the front."""
        axes.text(0.12, 0.3, self.title, fontsize=11, weight="bold")
        words = f"mesh {self.mesh}: {self.mesh.size} worker{'s' if self.mesh.size > 1 else ''}"
        axes.text(0.12, 0.53, words, fontsize=8.5, color="#444444")
        for rank in range(self.mesh.size):
            self._draw_worker(axes, rank)
        for number, column in enumerate(self.columns):
            self._draw_head(axes, number, column)
            self._draw_gap(axes, number, column)
            for rank in range(self.mesh.size):
                self._draw_cell(axes, number, column, rank)
        self._draw_legend(axes)

    def _draw_worker(self, axes: Axes, rank: int) -> None:
        from matplotlib.patches import Rectangle

        if rank % 2 == 0:
            size = (self.width, self.y(rank) - 0.5 * (ROW - BOX))
            axes.add_patch(Rectangle((0, size[1]), size[0], ROW, color=PALE, lw=0, zorder=0))
        middle = self.y(rank) + BOX / 2
        axes.text(0.12, middle - 0.07, f"worker {rank}", fontsize=8.5, va="center")
        places = zip(self.mesh.names, self.mesh.coordinates(rank), strict=True)
        words = ", ".join(f"{name} {place}" for name, place in places) if len(self.mesh.axes) > 1 else ""
        axes.text(0.12, middle + 0.1, words, fontsize=6.5, color="#666666", va="center")

    def _draw_head(self, axes: Axes, number: int, column: Column) -> None:
        middle = self.lefts[number] + self.widths[number] / 2
        shape = "×".join(map(str, column.shape[1:]))
        for line, text in enumerate((*_names(column), shape)):
            style: dict[str, Any] = {"fontsize": 7, "color": "#555555"} if line else {"fontsize": 7.5, "weight": "bold"}
            axes.text(middle, self.top - 0.47 + 0.13 * line, text, ha="center", va="center", **style)
        if column.gradient_bytes:
            words = f"sum of ∇W\n{_size(column.gradient_bytes)}"
            axes.text(middle, self.bottom - 0.06, words, fontsize=6.5, color="#8A5A00", ha="center", va="top")

    # --- between columns ---

    def _draw_gap(self, axes: Axes, number: int, column: Column) -> None:
        sending = [move for move in column.moves if move.kind != "slice"]
        right, left = self.lefts[number] - 0.08, self.lefts[number] - self.gaps[number] + 0.08
        for place, move in enumerate(sending):
            part = (right - left) / len(sending)
            self._draw_messages(axes, move, left + place * part, left + (place + 1) * part)
        if not sending and number:
            for rank in range(self.mesh.size):
                _arrow(axes, (left, self.y(rank) + BOX / 2), (right, self.y(rank) + BOX / 2), faint=True)
        lines = _lines(column)
        for line, text in enumerate(lines):
            style: dict[str, Any] = {"weight": "bold"} if text[0] in "→←" else {}
            y = self.top - 0.62 - LINE * 0.8 * (len(lines) - 1 - line)
            axes.text((left + right) / 2, y, text, fontsize=6.5, color=ARROW, ha="center", va="center", **style)

    def _draw_messages(self, axes: Axes, move: Move, left: float, right: float) -> None:
        for rank in range(self.mesh.size):
            group = self.mesh.group(rank, move.axis)
            for other in group:
                near = abs(group.index(other) - group.index(rank)) == 1
                if other == rank or move.kind != "fringe" or near:
                    begin, end = (left, self.y(rank) + BOX / 2), (right, self.y(other) + BOX / 2)
                    _arrow(axes, begin, end, faint=other == rank, crowded=len(group) > CROWD)

    # --- a cell ---

    def _draw_cell(self, axes: Axes, number: int, column: Column, rank: int) -> None:
        x, y = self.lefts[number], self.y(rank)
        box = extents(column.shape, column.layout, self.mesh, rank)
        down, across = plane(column.layout, len(column.shape))
        mine = (_share(box[across], column.shape[across]), _share(box[down], column.shape[down]))
        sheets = _sheets(column.layout, self.mesh) if down else 1
        place = box[0][0] * sheets // max(1, column.shape[0]) if down else 0
        for sheet in reversed(range(sheets)):
            corner = (x + SHEET * sheet, y - SHEET * sheet)
            held = mine if sheet == place else None
            _draw_tensor(axes, corner, held, ACTIVATIONS, is_addend=PARTIAL in column.layout)
        if column.weight is not None:
            shape, cuts = column.weight.shape, column.weight.extents(self.mesh, rank)
            down, across = (0, 1) if column.kind == "locallyconnected2d" else (min(1, len(shape) - 1), 0)
            corner = (x + self.widths[number] - BOX, y)
            mine = (_share(cuts[across], shape[across]), _share(cuts[down], shape[down]))
            _draw_tensor(axes, corner, mine, WEIGHTS)

    def _draw_legend(self, axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        x, y = 0.12, self.height - 0.3
        spatial = any(plane(column.layout, len(column.shape))[0] for column in self.columns)
        downwards = "samples ↓ channels →" + (" or rows ↓ columns →" if spatial else "")
        entries = [(ACTIVATIONS, "", f"output: {downwards}"), (WEIGHTS, "", "weights: inputs ↓ outputs →")]
        if any(PARTIAL in column.layout for column in self.columns):
            entries.append((ACTIVATIONS, "////", "an addend of the output"))
        entries.append(("", "", "bytes: the most that one worker sends in a step"))
        for colour, hatch, text in entries:
            needed = 0.2 + LETTER * len(text) + 0.15
            if x > 0.12 and x + needed > self.width:
                x, y = 0.12, y + LINE
            if colour:
                face = "white" if hatch else colour
                axes.add_patch(
                    Rectangle((x, y - 0.06), 0.12, 0.12, facecolor=face, edgecolor=colour, hatch=hatch, lw=0.6)
                )
            axes.text(x + (0.18 if colour else 0), y, text, fontsize=7.5, va="center")
            x += needed


def _names(column: Column) -> tuple[str, str]:
    """The first layer, and what and how many there are."""
    if len(column.names) == 1:
        return column.names[0], column.kind
    return f"{column.names[0]}, …", f"{len(column.names)} × {column.kind}"


def _width(column: Column) -> float:
    own = BOX + (BETWEEN + BOX if column.weight is not None else 0) + SHEET
    words = (*_names(column), "×".join(map(str, column.shape[1:])))
    return max(own, LETTER * max(map(len, words)))


def _gap(column: Column) -> float:
    if column.names == (INPUT,):
        return 0.0
    sending = sum(move.kind != "slice" for move in column.moves)
    lines = _lines(column)
    words = LETTER * 0.85 * max((len(line) for line in lines), default=0)
    return max(GAP + ARROWS * sending, words if lines else 0.0)


def _labels(moves: Sequence[Move], sent: int, sign: str) -> list[str]:
    """Lines about the moves one way, with their bytes first."""
    if not moves:
        return []
    words = [line for move in moves for line in textwrap.wrap(_bound(move.words), WORDS)]
    return [f"{sign} {_size(sent)}" if sent else f"{sign} no bytes", *words]


def _bound(words: str) -> str:
    """Lines do not end within these phrases."""
    for phrase in (" by ", " over ", " for ", " of "):
        words = words.replace(phrase, f"{phrase[:-1]}{SPACE}")
    return words.replace("each its ", f"each{SPACE}its{SPACE}")


def _lines(column: Column) -> list[str]:
    """What stands above the messages before a column."""
    forward = _labels(column.moves, column.forward_bytes, "→")
    return [*forward, *_labels(column.back_moves, column.backward_bytes, "←")]


def _size(size: int) -> str:
    return num_bytes(size).replace(SPACE, " ")


def plane(layout: Layout, num_dims: int) -> tuple[int, int]:
    """Which dims of an output are drawn downwards and to the right.

    >>> plane((Split("batch"),), 4), plane((Split("height"),), 4), plane((Split("batch"), Split("channel")), 2)
    ((0, 1), (2, 3), (0, 1))
    """
    dims = {part.dim for part in layout if isinstance(part, Split)}
    if num_dims < 4 or not dims & {"height", "width"}:
        return 0, 1
    return (2, 1) if "channel" in dims else (2, 3)


def _sheets(layout: Layout, mesh: Mesh) -> int:
    """Parts of the batch, of maps that are cut by rows or columns."""
    pairs = zip(layout, mesh.shape, strict=True)
    return math.prod(extent for part, extent in pairs if isinstance(part, Split) and part.dim == "batch")


def _share(span: tuple[int, int], length: int) -> Share:
    return span[0] / max(1, length), span[1] / max(1, length)


def _draw_tensor(
    axes: Axes, corner: tuple[float, float], held: tuple[Share, Share] | None, colour: str, *, is_addend: bool = False
) -> None:
    """A frame, and what is held of it."""
    from matplotlib.patches import Rectangle

    x, y = corner
    axes.add_patch(Rectangle((x, y), BOX, BOX, facecolor="white", edgecolor="#999999", lw=0.6, zorder=3))
    if held is None or any(start == stop for start, stop in held):
        return
    across, down = held
    place = (x + BOX * across[0], y + BOX * down[0])
    size = (BOX * (across[1] - across[0]), BOX * (down[1] - down[0]))
    style: dict[str, Any] = {"facecolor": colour, "edgecolor": colour}
    if is_addend:
        style = {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
    axes.add_patch(Rectangle(place, *size, lw=0.6, zorder=4, **style))


def _arrow(
    axes: Axes, begin: tuple[float, float], end: tuple[float, float], *, faint: bool, crowded: bool = False
) -> None:
    from matplotlib.patches import FancyArrowPatch

    patch = FancyArrowPatch(
        begin, end, arrowstyle="-|>,head_length=0.3,head_width=0.12", mutation_scale=9, shrinkA=0, shrinkB=0,
        linewidth=0.6 if faint or crowded else 0.9, alpha=0.4 if crowded else None,
        color="#BBBBBB" if faint else ARROW, zorder=2,
    )  # fmt: skip
    axes.add_artist(patch)  # not add_patch, which measures it, slowly
