"""Draws a schedule of a collective operation: a lane for each rank, time downwards, an arrow for each message.

A row is one unit of time, if every message takes one.  An arrow's colour says which chunk it carries, its width how
much of the buffer, its line and the sign at its head what is done with it: copied (dashed), added (⊕), or summed with
all others in the order of ranks (Σ).  Where all arrows of a row go the same way, ranks stand in a circle: an arrow
takes the shorter way round, out at one edge of the picture and in at the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.check.collective import starts
from windlass.errors import ConfigError
from windlass.plan.collective import SCHEDULES, Op, Receive, Schedule
from windlass.report.sheet import check_sheet, save_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RANKS, MOST_ROWS = 32, 150
"""More could not be read."""

# Okabe and Ito's colours, which colour-blind eyes tell apart, less yellow, which print does not show.
FEW = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#808080")
SEVERAL, INK = "#222222", "#333333"
"""The colours of a message of several chunks, and of signs."""
MEANINGS: dict[Op, str] = {"copy": "copied", "add": "added", "fold": "summed in the order of ranks"}

LANE, ROW, ROW_PER_LANE = 0.8, 0.5, 0.085
"""Inches: between lanes; between rows, and more for each lane that the row's longest arrow crosses."""
LEFT, RIGHT, TOP, BOTTOM = 0.75, 0.35, 1.15, 0.2
NODE = 0.085
LABELLED = 3
"""Up to so many messages of a rank in a row are labelled; one less where arrows go round."""
SHARES = (0.27, 0.21, 0.33, 0.15, 0.39, 0.45, 0.52, 0.6, 0.68)
"""Where along its arrow a label may stand, the best first."""
CROWD = 60
"""Of more arrows in a row that look the same from every rank, those of one rank are drawn and the others hinted at."""
LETTER, LINE = 0.068, 0.22
"""Inches: a letter of the legend, and a line of it."""
WIDTHS = {"op": 0.34, "chunk": 0.25, "several": 0.25, "faint": 0.25, "width": 0.27, "strip": 1.2}
"""Inches that a sign of the legend takes."""


@dataclass(frozen=True, slots=True)
class Arrow:
    """A message: its row, the lanes from which and to which it goes, and what it carries."""

    row: int
    source: int
    to: int
    chunks: tuple[int, ...]
    op: Op


def check_picture(schedule: Schedule, path: Path) -> None:
    """Refuses a picture that could not be written or read.

    Raises:
        ConfigError: an unknown kind of file, no such folder, or too many ranks or steps.
    """
    check_sheet(path)
    if schedule.size > MOST_RANKS:
        raise ConfigError(f"--plot {path}: a picture shows {MOST_RANKS} ranks at most, got {schedule.size}")
    num_rows = _num_rows(arrows(schedule))
    if num_rows > MOST_ROWS:
        raise ConfigError(f"--plot {path}: a picture shows {MOST_ROWS} rows of time at most, got {num_rows}")


def draw_schedule(schedule: Schedule, path: Path) -> None:
    """Writes the picture; the suffix of `path` (.png, .svg, .pdf) says in which format."""
    check_picture(schedule, path)

    sheet = _Sheet(schedule, arrows(schedule))
    save_sheet(path, sheet.width, sheet.height, sheet.draw)


def arrows(schedule: Schedule) -> list[Arrow]:
    """Every message of a schedule; the ranks of a host stand side by side."""
    lanes = {rank: lane for lane, rank in enumerate(lane_order(schedule))}
    found = []
    for rank, times in enumerate(starts(schedule)):
        for step, begun in zip(schedule.steps(rank), times, strict=True):
            for message, row in zip(step, begun, strict=True):
                if isinstance(message, Receive):
                    chunks = tuple(message.chunks)
                    found.append(Arrow(row, lanes[message.source], lanes[rank], chunks, message.op))
    return sorted(found, key=lambda arrow: (arrow.row, arrow.source))


def lane_order(schedule: Schedule) -> list[int]:
    """The ranks from left to right."""
    return [rank for host in schedule.setting.all_hosts for rank in host]


def is_turning(found: Sequence[Arrow], size: int) -> bool:
    """Whether the arrows of a row look the same from every rank, or go all as far, so that they may go round."""
    ways: list[list[int]] = [[] for _ in range(size)]
    for arrow in found:
        ways[arrow.source].append((arrow.to - arrow.source) % size)
    is_one_way = len(found) > 1 and len({way for mine in ways for way in mine}) == 1
    return size > 2 and (is_one_way or all(sorted(way) == sorted(ways[0]) for way in ways))


def _num_rows(found: Sequence[Arrow]) -> int:
    return 1 + max((arrow.row for arrow in found), default=-1)


class _Sheet:
    """Where everything is, in inches from the top left."""

    def __init__(self, schedule: Schedule, found: Sequence[Arrow]) -> None:
        self.schedule, self.lanes = schedule, lane_order(schedule)
        self.is_paired = schedule.collective == "alltoall"
        self.num_colours = schedule.size if self.is_paired else schedule.num_chunks
        self.rows: list[list[Arrow]] = [[] for _ in range(_num_rows(found))]
        for arrow in found:
            self.rows[arrow.row].append(arrow)
        identity = self.lanes == sorted(self.lanes) and schedule.algorithm != "hierarchical"
        self.is_round = [identity and is_turning(row, schedule.size) for row in self.rows]
        self.top = TOP + (0.25 if len(schedule.setting.hosts) > 1 else 0)
        self.lines = [self.top]
        for number, row in enumerate(self.rows):
            longest = max((abs(self.way(arrow)) for arrow in row), default=1)
            self.lines.append(self.lines[number] + ROW + ROW_PER_LANE * longest)
        shares = {len(arrow.chunks) for arrow in found}
        self.thick = {n: 1.5 if len(shares) == 1 else 0.9 + 2.3 * n / schedule.num_chunks for n in shares}
        self.ops = [op for op in MEANINGS if any(arrow.op == op for arrow in found)]
        self.has_several = any(len(arrow.chunks) > 1 for arrow in found)
        self.is_crowded = [turns and len(row) > CROWD for turns, row in zip(self.is_round, self.rows, strict=True)]
        self.width = max(LEFT + LANE * (schedule.size - 1) + LANE / 2 + RIGHT, 4.6)
        self.legend = list(self._legend())
        self.height = self.lines[-1] + 0.3 + LINE * (1 + max((y for _, y, *_ in self.legend), default=0)) + BOTTOM

    def x(self, lane: float) -> float:
        """Where a lane is."""
        return LEFT + LANE * lane

    def way(self, arrow: Arrow) -> int:
        """How many lanes to the right an arrow goes; round the edge, if that is shorter."""
        size, way = self.schedule.size, arrow.to - arrow.source
        if self.is_round[arrow.row] and 2 * abs(way) > size:
            return way - size if way > 0 else way + size
        return way

    def colour(self, chunks: Sequence[int]) -> str:
        """A message's colour."""
        if len(chunks) > 1 or self.num_colours == 1:
            return SEVERAL
        return self.chunk_colour(chunks[0] % self.schedule.size if self.is_paired else chunks[0])

    def chunk_colour(self, chunk: int) -> str:
        """A chunk's colour, or that of a block's destination."""
        if self.num_colours <= len(FEW):
            return FEW[chunk]
        from matplotlib import colormaps
        from matplotlib.colors import to_hex

        red, green, blue, _ = colormaps["turbo"](0.03 + 0.94 * chunk / (self.num_colours - 1))
        return str(to_hex((0.8 * red, 0.8 * green, 0.8 * blue)))

    def label(self, chunks: Sequence[int]) -> str:
        """A message's chunks, in few letters."""
        if self.is_paired and len(chunks) == 1:
            return f"{chunks[0] // self.schedule.size}→{chunks[0] % self.schedule.size}"
        return runs(chunks) if not self.is_paired else f"{len(chunks)} blocks"

    # --- drawing ---

    def draw(self, axes: Axes) -> None:
        """Everything, from the back to the front."""
        self._draw_head(axes)
        for lane in range(self.schedule.size):
            axes.plot([self.x(lane)] * 2, [self.top - 0.12, self.lines[-1] + 0.12], color="#BBBBBB", lw=0.8, zorder=1)
        for number, row in enumerate(self.rows):
            middle = (self.lines[number] + self.lines[number + 1]) / 2
            axes.text(0.2, middle, str(number), fontsize=8, color="#666666", ha="center", va="center")
            self._draw_row(axes, row)
        self._draw_nodes(axes)
        self._draw_legend(axes)

    def _draw_head(self, axes: Axes) -> None:
        schedule = self.schedule
        ranks = "1 rank" if schedule.size == 1 else f"{schedule.size} ranks"
        axes.text(0.12, 0.3, f"{schedule.collective}: {schedule.algorithm}, {ranks}", fontsize=11, weight="bold")
        axes.text(0.12, 0.52, SCHEDULES[schedule.collective][schedule.algorithm].meaning, fontsize=8.5, color="#444444")
        if self.rows:
            axes.text(0.2, self.top - 0.2, "time", fontsize=8, color="#666666", ha="center")
        else:
            axes.text(LEFT + 0.4, self.top + 0.05, "nothing is sent", fontsize=8, color="#666666")
        for lane, rank in enumerate(self.lanes):
            name = f"rank {rank}" if lane == 0 or schedule.size <= 12 else str(rank)
            axes.text(self.x(lane), self.top - 0.2, name, fontsize=8.5, ha="center")
        if len(schedule.setting.hosts) > 1:
            self._draw_hosts(axes)

    def _draw_hosts(self, axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        lane = 0
        for number, host in enumerate(self.schedule.setting.hosts):
            left, right = self.x(lane) - 0.42 * LANE, self.x(lane + len(host) - 1) + 0.42 * LANE
            top, bottom = self.top - 0.62, self.lines[-1] + 0.2
            axes.add_patch(Rectangle((left, top), right - left, bottom - top, color="#F1F1EC", lw=0, zorder=0))
            axes.text((left + right) / 2, top + 0.18, f"host {number}", fontsize=8, color="#666666", ha="center")
            lane += len(host)

    def _draw_row(self, axes: Axes, row: Sequence[Arrow]) -> None:
        from matplotlib.patches import Rectangle

        size = self.schedule.size
        left = self.x(-0.5)
        edges = Rectangle((left, 0), self.x(size - 0.5) - left, self.height, transform=axes.transData)
        crowd = max((sum(arrow.source == lane for arrow in row) for lane in range(size)), default=0)
        labels: list[tuple[float, float, float]] = []
        for arrow in row:
            to = arrow.source + self.way(arrow)
            for turn in [0] if 0 <= to < size else [0, size if to < 0 else -size]:
                self._draw_arrow(axes, arrow, arrow.source + turn, to + turn, edges)
            if self.schedule.num_chunks > 1 and crowd <= LABELLED - self.is_round[arrow.row]:
                self._draw_label(axes, arrow, to, labels)

    def _draw_arrow(self, axes: Axes, arrow: Arrow, source: float, to: float, edges: Any) -> None:
        from matplotlib.patches import FancyArrowPatch

        begin, end = self.lines[arrow.row], self.lines[arrow.row + 1]
        is_faint = self.is_crowded[arrow.row] and arrow.source != self.schedule.size // 2
        patch = FancyArrowPatch(
            (self.x(source), begin), (self.x(to), end),
            arrowstyle="-|>,head_length=0.42,head_width=0.17", mutation_scale=11,
            shrinkA=72 * NODE * 0.5, shrinkB=72 * NODE, linewidth=self.thick[len(arrow.chunks)],
            linestyle=(0, (3.0, 1.5)) if arrow.op == "copy" else "-", color=self.colour(arrow.chunks),
            joinstyle="miter", alpha=0.07 if is_faint else None, zorder=2 if is_faint else 3,
        )  # fmt: skip
        axes.add_artist(patch)  # not add_patch, which measures it, slowly
        patch.set_clip_path(edges)

    def _draw_label(self, axes: Axes, arrow: Arrow, to: int, others: list[tuple[float, float, float]]) -> None:
        """Writes an arrow's chunks on it, where they cover no other label of the row, if there is such a place."""
        begin, end, text = self.lines[arrow.row], self.lines[arrow.row + 1], self.label(arrow.chunks)
        half = (0.06 * len(text) + 0.05) / 2
        places = [
            (self.x(arrow.source + share * (to - arrow.source)), begin + share * (end - begin), half)
            for share in SHARES
            if -0.4 < arrow.source + share * (to - arrow.source) < self.schedule.size - 0.6
        ]
        place = min(places, key=lambda place: sum(_overlap(place, other) for other in others))
        others.append(place)
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
        axes.text(*place[:2], text, fontsize=7, color=self.colour(arrow.chunks), ha="center", va="center", bbox=box,
                  zorder=4)  # fmt: skip

    def _draw_nodes(self, axes: Axes) -> None:
        """A sign where something arrives, a dot where something leaves."""
        arriving: dict[tuple[int, int], set[Op]] = {}
        leaving = set[tuple[int, int]]()
        for row in self.rows:
            for arrow in row:
                arriving.setdefault((arrow.row + 1, arrow.to), set()).add(arrow.op)
                leaving.add((arrow.row, arrow.source))
        signs: dict[Op, list[tuple[float, float]]] = {"copy": [], "add": [], "fold": []}
        for line, lane in sorted(leaving | arriving.keys()):
            ops = arriving.get((line, lane), set())
            sign: Op = next((op for op in ("fold", "add") if op in ops), "copy")
            signs[sign].append((self.x(lane), self.lines[line]))
        for op, places in signs.items():
            _draw_signs(axes, places, op)

    # --- the legend ---

    def _legend(self) -> Iterator[tuple[float, int, str, Any, str]]:
        """Places (inches, line), kinds, what they show, and texts, line after line within the picture's width."""
        entries: list[tuple[str, Any, str]] = [("op", op, MEANINGS[op]) for op in self.ops]
        what = "to rank" if self.is_paired else "chunk"
        if 1 < self.num_colours <= len(FEW):
            entries += [("chunk", chunk, f"{what} {chunk}") for chunk in range(self.num_colours)]
        elif self.num_colours > 1:
            entries.append(("strip", self.num_colours, f"{what} 0 to {self.num_colours - 1}"))
        if self.has_several:
            entries.append(("several", 0, "several chunks"))
        if len(self.thick) > 1:
            entries.append(("width", 0, "width: share of the buffer"))
        if any(self.is_crowded):
            entries.append(("faint", 0, "faint: the same from other ranks"))
        x, line = 0.12, 0
        for kind, shown, text in entries:
            needed = WIDTHS[kind] + 0.06 + LETTER * len(text)
            if x > 0.12 and x + needed > self.width:
                x, line = 0.12, line + 1
            yield x, line, kind, shown, text
            x += needed + 0.14

    def _draw_legend(self, axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        for x, line, kind, shown, text in self.legend:
            y = self.lines[-1] + 0.42 + LINE * line
            if kind == "op":
                style: Any = (0, (3.0, 1.5)) if shown == "copy" else "-"
                axes.plot([x, x + 0.22], [y, y], color=SEVERAL, lw=1.4, linestyle=style)
                _draw_signs(axes, [(x + 0.25, y)], shown)
            elif kind == "strip":
                for chunk in range(shown):
                    corner = (x + WIDTHS[kind] * chunk / shown, y - 0.05)
                    part = WIDTHS[kind] / shown
                    axes.add_patch(Rectangle(corner, part, 0.1, color=self.chunk_colour(chunk), lw=0))
            elif kind == "width":
                axes.plot([x, x + 0.12], [y, y], color=SEVERAL, lw=1.0)
                axes.plot([x + 0.15, x + 0.27], [y, y], color=SEVERAL, lw=3.0)
            else:
                colour = self.chunk_colour(shown) if kind == "chunk" else SEVERAL
                axes.plot([x, x + 0.25], [y, y], color=colour, lw=2.4, alpha=0.15 if kind == "faint" else None)
            axes.text(x + WIDTHS[kind] + 0.06, y, text, fontsize=8, va="center")


def _overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """How much two labels cover each other: middles and half widths, in inches; a label is 0.14 high."""
    wide = one[2] + other[2] - abs(one[0] - other[0])
    high = 0.14 - abs(one[1] - other[1])
    return max(wide, 0.0) * max(high, 0.0)


def _draw_signs(axes: Axes, places: Sequence[tuple[float, float]], op: Op) -> None:
    """A dot for what is copied or begins, a circled sign for what is added."""
    if not places:
        return
    xs, ys = zip(*places, strict=True)
    points = 72 * 2 * NODE
    style: dict[str, Any] = {"linestyle": "none", "markeredgecolor": INK, "markeredgewidth": 0.9}
    if op == "copy":
        axes.plot(xs, ys, marker="o", markersize=0.45 * points, markerfacecolor=INK, zorder=5, **style)
        return
    axes.plot(xs, ys, marker="o", markersize=points, markerfacecolor="white", zorder=5, **style)
    if op == "add":
        axes.plot(xs, ys, marker="+", markersize=0.55 * points, zorder=6, **style)
    else:
        axes.plot(xs, ys, marker=r"$\Sigma$", markersize=0.55 * points, markerfacecolor=INK, zorder=6,
                  **(style | {"markeredgewidth": 0.2}))  # fmt: skip


def runs(chunks: Sequence[int]) -> str:
    """Chunk numbers, neighbours joined; many are cut short.

    >>> runs([3]), runs([0, 1, 2, 5]), runs([5, 6, 0])
    ('3', '0–2, 5', '5–6, 0')
    """
    parts: list[list[int]] = []
    for chunk in chunks:
        if parts and chunk == parts[-1][1] + 1:
            parts[-1][1] = chunk
        else:
            parts.append([chunk, chunk])
    words = [str(first) if first == last else f"{first}–{last}" for first, last in parts]
    return ", ".join(words) if len(words) <= 3 else f"{', '.join(words[:2])}, … ({len(chunks)})"
