"""Draws how a batch passes into a model-parallel head: time to the right, a lane for each member.

In each lane the upper row is what the member computes, the middle one what comes to it from the others, the lower one
what comes back; colours say whose samples they are, heights how many.  What stands above each other happens at the
same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.plan.handover import Round, make_rounds
from windlass.plan.placement import SCHEMES, Handover
from windlass.report.sheet import check_sheet, save_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#808080")
"""Okabe and Ito's, which colour-blind eyes tell apart, less yellow; members share them from the ninth on."""
INK, TRUNK = "#333333", "#D9D9D9"
SLOT, BLOCK, TRACK, LANE, HEAD = 0.8, 0.74, 0.2, 0.82, 0.62
"""Inches: from time to time, a block's width, a track's height, from member to member, and above the first."""
TRACKS = ("computes", "gets samples", "gets gradients")
LETTER, LEGEND_WIDTH = 0.056, 8.3
"""Inches: a letter of the legend, and all of it."""
MOST_MEMBERS, MOST_ROUNDS = 16, 24


class RoundsPart:
    """A part of a sheet, in inches.

    Args:
        handover: its scheme.
        counts: samples of each member.
        left: where the first block begins.

    Attributes:
        rounds: what is drawn.
        width, height: what it takes.
    """

    def __init__(self, handover: Handover, counts: Sequence[int], *, left: float) -> None:
        self.handover, self.counts, self.left = handover, counts, left
        self.rounds = rounds_of(handover, counts)
        self.num_slots = len(self.rounds) + 4
        self.width = max(left + SLOT * self.num_slots + 0.3, LEGEND_WIDTH)
        self.height = HEAD + LANE * len(counts) + 0.42

    @property
    def fits(self) -> bool:
        """Whether it could be read."""
        return len(self.counts) <= MOST_MEMBERS and len(self.rounds) <= MOST_ROUNDS

    def draw(self, axes: Axes, top: float) -> None:
        """Everything, from `top` downwards."""
        words = f"scheme {self.handover.scheme}: {SCHEMES[self.handover.scheme]}"
        axes.text(0.12, top + 0.12, words, fontsize=9.5, weight="bold", va="center")
        axes.text(self.left, top + HEAD - 0.32, "time →", fontsize=7.5, color="#666666", va="center")
        for member in range(len(self.counts)):
            self._draw_lane(axes, member, top + HEAD + LANE * member)
        self._draw_legend(axes, top + HEAD + LANE * len(self.counts) + 0.12)

    def _draw_lane(self, axes: Axes, member: int, y: float) -> None:
        axes.text(0.12, y + 1.5 * TRACK, f"member {member}", fontsize=8.5, va="center")
        for line, text in enumerate(TRACKS):
            place = y + (TRACK + 0.04) * line + TRACK / 2
            axes.text(self.left - 0.1, place, text, fontsize=6.5, color="#666666", ha="right", va="center")
        middle, low = (y + (TRACK + 0.04) * line for line in (1, 2))
        self._draw_block(axes, 0, y, [(TRUNK, 1)], "forward")
        for number, turn in enumerate(self.rounds):
            sizes = [stop - start for start, stop in turn.spans]
            parts = [(COLOURS[other % len(COLOURS)], size) for other, size in enumerate(sizes)]
            coming = [part if other != member else ("white", part[1]) for other, part in enumerate(parts)]
            self._draw_block(axes, number + 1, middle, coming, "")
            self._draw_block(axes, number + 2, y, parts, "head", mark=turn.updates and self._is_variable)
            self._draw_block(axes, number + 3, low, self._returning(sizes, member), "", back=True)
        self._draw_block(axes, self.num_slots - 1, y, [(TRUNK, 1)], "backward")

    @property
    def _is_variable(self) -> bool:
        return sum(turn.updates for turn in self.rounds) > 1

    def _returning(self, sizes: Sequence[int], member: int) -> list[tuple[str, int]]:
        """The others' addends of the gradient of the member's own samples."""
        colour = COLOURS[member % len(COLOURS)]
        return [(colour, sizes[member]), ("white", sum(sizes) - sizes[member])] if sizes[member] else [("white", 1)]

    def _draw_block(
        self, axes: Axes, slot: int, y: float, parts: Sequence[tuple[str, int]], text: str, *,
        back: bool = False, mark: bool = False,
    ) -> None:  # fmt: skip
        """A frame filled from above with coloured parts; nothing where nothing is."""
        from matplotlib.patches import Rectangle

        total = sum(size for _, size in parts)
        if not any(colour != "white" and size for colour, size in parts):
            return
        x, at = self.left + SLOT * slot, y
        for colour, size in parts:
            height = TRACK * size / total
            style: dict[str, Any] = (
                {"hatch": "////", "facecolor": "white", "edgecolor": colour} if back else {"facecolor": colour}
            )
            if colour != "white" and size:
                axes.add_patch(Rectangle((x, at), BLOCK, height, lw=0.0 if not back else 0.5, zorder=2, **style))
            at += height
        axes.add_patch(Rectangle((x, y), BLOCK, TRACK, fill=False, edgecolor=INK, lw=0.6, zorder=3))
        if text:
            box = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
            style = {"ha": "center", "va": "center", "zorder": 4, "bbox": None if parts[0][0] == TRUNK else box}
            axes.text(x + BLOCK / 2, y + TRACK / 2, text, fontsize=6.5, color=INK, **style)
        if mark:
            axes.plot([x + BLOCK + 0.05], [y + TRACK / 2], marker="D", markersize=4, color=INK, zorder=5)

    def _draw_legend(self, axes: Axes, y: float) -> None:
        from matplotlib.patches import Rectangle

        entries = [(TRUNK, "", "own samples, in the data-parallel part"), (COLOURS[0], "", "samples of member 0, …"),
                   (COLOURS[0], "////", "others' addends of their gradient")]  # fmt: skip
        x = 0.12
        for colour, hatch, text in entries:
            face = "white" if hatch else colour
            axes.add_patch(Rectangle((x, y - 0.06), 0.12, 0.12, facecolor=face, edgecolor=colour, hatch=hatch, lw=0.6))
            axes.text(x + 0.18, y, text, fontsize=7.5, va="center")
            x += 0.35 + LETTER * len(text)
        if self._is_variable:
            axes.plot([x + 0.06], [y], marker="D", markersize=4, color=INK)
            axes.text(x + 0.18, y, "the head's weights are updated", fontsize=7.5, va="center")


def draw_rounds(handover: Handover, counts: Sequence[int], path: Path) -> None:
    """Writes a picture of the rounds alone.

    Args:
        handover: its scheme.
        counts: samples of each member.
        path: its suffix (.png, .svg, .pdf) says in which format.

    Raises:
        ConfigError: it could not be written.
    """
    check_sheet(path)
    part = RoundsPart(handover, counts, left=1.7)
    save_sheet(path, part.width, part.height + 0.2, lambda axes: part.draw(axes, 0.15))


def rounds_of(handover: Handover, counts: Sequence[int]) -> tuple[Round, ...]:
    """The rounds; scheme a is one of everything.

    >>> [round.spans for round in rounds_of(Handover("a", "fc6"), [2, 2])]
    [((0, 2), (0, 2))]
    """
    if handover.scheme != "a":
        return make_rounds(handover, counts)
    return (Round(tuple((0, count) for count in counts), updates=True, share=sum(counts)),)
