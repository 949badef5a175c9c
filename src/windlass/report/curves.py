"""Curves as data: what a chart shows, on which axes, few enough points to draw, as SVG paths.

A chart is drawn in a square of `SIDE` × `SIDE` units which the page stretches to any width; strokes keep
their width and labels are text beside the square, so one drawing serves a phone, a wide screen and paper.
Colours are names of CSS custom properties, so it serves light and dark too.

Long runs are thinned.  Noise becomes an envelope (least and most of each bucket), so that no spike is lost; a
smoothed line is computed over all rows and then sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from windlass.report.units import significant

SIDE = 10_000
"""Side of the drawing, in integer units."""

NUM_POINTS = 400
"""Most points that a line is drawn with."""

Values = Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One thing in a chart.

    Attributes:
        color: CSS custom property, without its dashes.
        x, y: its points; it breaks where one is not finite.
        low: lower edge of an area; None for anything else.
        label: its name in the legend; a shape without one has no read-out.
        style: how it is drawn.
    """

    color: str
    x: Values
    y: Values
    low: Values | None = None
    label: str = ""
    style: Literal["line", "faint", "dots", "ring", "area", "envelope"] = "line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps values from `low` to `high`, or their logarithms, to 0 … 1; ticks are (position, text)."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """Where `value` lies, NaN where it cannot be shown."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """An event: a dotted vertical line at `x` (0 … 1) with a word beside it."""

    x: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure: shapes on two axes.  `form` says how a value of y is read out, `suffix` its unit."""

    title: str
    x: Axis
    y: Axis
    shapes: tuple[Shape, ...]
    marks: tuple[Mark, ...] = ()
    form: Literal["number", "percent", "count"] = "number"
    suffix: str = ""
    note: str = ""
    kind: str = "chart"

    def path(self, shape: Shape) -> str:
        """The `d` of the shape's SVG path."""
        x = [round(SIDE * p) if math.isfinite(p) else None for p in map(self.x.place, shape.x)]
        y = [_down(self.y.place(value)) for value in shape.y]
        low = [_down(self.y.place(value)) for value in shape.low] if shape.low is not None else None
        draw = _dots if shape.style in ("dots", "ring") else _area if low is not None else _line
        return "".join(draw(run) for run in _unbroken(x, y, low or y))

    def summary(self) -> str:
        """The chart in words, for those who cannot see it."""
        sentences = [f"{shape.label}: {_in_words(shape)}" for shape in self.shapes if shape.label]
        return f"{self.title}: {self.y.label} against {self.x.label}. " + "; ".join(sentences) + "."


def chart(
    title: str,
    shapes: Iterable[Shape],
    *,
    x_label: str,
    y_label: str,
    form: Literal["number", "percent", "count"] = "number",
    suffix: str = "",
    log: bool | None = None,
    y_low: float | None = None,
    y_high: float | None = None,
    marks: Iterable[tuple[float, str]] = (),
    note: str = "",
) -> Chart | None:
    """A chart whose axes fit its shapes; None where no shape has a point to show.

    Shapes are drawn in order, the last on top.  `form` and `suffix` say how values of y are written, `marks`
    are values of x with a word each, `note` is a sentence under the chart.  Without `log` the range decides
    whether y is logarithmic; without `y_low` and `y_high` the shapes decide where it ends.
    """
    shown = tuple(shape for shape in shapes if any(map(_drawable, shape.x, shape.y)))
    if not shown:
        return None
    all_y = [v for s in shown for values in (s.y, s.low or ()) for v in values if math.isfinite(v)]
    if log is None:
        log = min(all_y) > 0 and max(all_y) > 30 * min(all_y)
    all_x = [v for s in shown for v in s.x if math.isfinite(v)]
    x = linear_axis(x_label, 0.0, max(all_x), snug=True)
    low, high = min(all_y) if y_low is None else y_low, max(all_y) if y_high is None else y_high
    if log:
        y = log_axis(y_label + " (log scale)", low, high)
    else:
        y = linear_axis(y_label, low, high, percent=form == "percent")
    return Chart(
        title=title,
        x=x,
        y=y,
        shapes=shown,
        marks=tuple(_placed(marks, x)),
        form=form,
        suffix=suffix,
        note=note,
    )


def linear_axis(
    label: str, low: float, high: float, *, percent: bool = False, snug: bool = False, num_ticks: int = 5
) -> Axis:
    """An axis with round ticks, from one tick to another; `snug` ends where the values end.

    >>> linear_axis("loss", 0.1, 2.3).ticks
    ((0.0, '0.0'), (0.2, '0.5'), (0.4, '1.0'), (0.6, '1.5'), (0.8, '2.0'), (1.0, '2.5'))
    """
    if percent:
        low, high = max(0.0, low), min(1.0, max(high, low))
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) * 0.1 or 0.0), high + (abs(high) * 0.1 or 1.0)
        if percent:
            low, high = max(0.0, low), min(1.0, high)
    step = _round_step((high - low) / num_ticks)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if snug:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        low, high = first * step, last * step
    scale, unit = (100.0, "%") if percent else _tick_unit(max(abs(low), abs(high)))
    decimals = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    ticks = tuple(
        (
            round((i * step - low) / (high - low), 6),
            f"{i * step * scale:,.{decimals}f}{unit}" if i or percent or not unit else "0",
        )
        for i in range(first, last + 1)
    )
    return Axis(label=label, low=low, high=high, ticks=ticks)


def log_axis(label: str, low: float, high: float) -> Axis:
    """A logarithmic axis from 1, 2 or 5 times a power of ten to another such; both ends positive.

    >>> log_axis("loss", 0.03, 2.3).ticks[:3]
    ((0.0, '0.02'), (0.165951, '0.05'), (0.291488, '0.1'))
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = sorted(m * 10.0**d for d in range(first, last + 1) for m in (1, 2, 5))
    low = max(s for s in steps if s <= low * (1 + 1e-9))
    high = min((s for s in steps if s >= high * (1 - 1e-9) and s > low), default=10.0 * low)
    axis = Axis(label=label, low=low, high=high, log=True)
    wanted = [s for s in steps if low <= s <= high]
    if len(wanted) > 9:
        decades = range(first, last + 1, 1 + (last - first) // 7)
        wanted = [10.0**d for d in decades if low <= 10.0**d <= high]
    return Axis(
        label=label,
        low=low,
        high=high,
        log=True,
        ticks=tuple((round(axis.place(s), 6), significant(s, digits=1)) for s in wanted),
    )


def buckets(num_rows: int, limit: int = NUM_POINTS) -> list[range]:
    """Cuts rows into at most `limit` consecutive ranges of nearly equal length.

    >>> buckets(5, 2)
    [range(0, 2), range(2, 5)]
    """
    parts = min(num_rows, limit)
    edges = [i * num_rows // parts for i in range(parts + 1)] if parts else [0]
    return [range(low, high) for low, high in pairwise(edges)]


def mean(values: Iterable[float]) -> float:
    """Mean of the finite values, NaN where there is none."""
    kept = [value for value in values if math.isfinite(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def noise(x: Values, y: Values, *, color: str) -> Shape:
    """Every step: as a faint line where they are few, as an envelope where they are many."""
    if len(y) <= 3 * NUM_POINTS:
        return Shape(color=color, x=x, y=y, style="faint")
    spans = buckets(len(y), min(NUM_POINTS, len(y) // 8))
    kept = [[y[i] for i in span if math.isfinite(y[i])] for span in spans]
    return Shape(
        color=color,
        x=[x[span[len(span) // 2]] for span in spans],
        y=[max(values, default=math.nan) for values in kept],
        low=[min(values, default=math.nan) for values in kept],
        style="envelope",
    )


def smoothed(x: Values, y: Values, *, color: str, label: str) -> Shape:
    """An exponential moving average over a twenty-fifth of the rows, 200 at most.

    Its start is free of bias: it divides by the weight gathered so far.
    """
    decay = 1 - 2 / (min(200.0, max(1.0, len(y) / 25)) + 1)
    gathered = weight = 0.0
    line: list[float] = []
    for value in y:
        if math.isfinite(value):
            gathered, weight = decay * gathered + (1 - decay) * value, decay * weight + (1 - decay)
        line.append(gathered / weight if math.isfinite(value) else math.nan)
    last = [span[-1] for span in buckets(len(y))]
    if len(y) > len(last):
        last.insert(0, 0)
    return Shape(color=color, x=[x[i] for i in last], y=[line[i] for i in last], label=label)


def thinned(x: Values, y: Values, *, color: str, label: str) -> Shape:
    """A line as it is; where it has many points, the least and the most of each bucket in their order."""
    if len(y) <= NUM_POINTS:
        kept = list(range(len(y)))
    else:
        ends = (
            {min(span, key=y.__getitem__), max(span, key=y.__getitem__)} for span in buckets(len(y), NUM_POINTS // 2)
        )
        kept = sorted({0, len(y) - 1}.union(*ends))
    return Shape(color=color, x=[x[i] for i in kept], y=[y[i] for i in kept], label=label)


def line_and_dots(x: Values, y: Values, *, color: str, label: str) -> list[Shape]:
    """A line through few points that stay visible; many points make a line alone."""
    line = thinned(x, y, color=color, label=label)
    return [line] if len(y) > 60 else [line, Shape(color=color, x=x, y=y, style="dots")]


Point = tuple[int, int, int]


def _down(position: float) -> int | None:
    """A place on the y axis in SVG's downward units; what lies far outside is held near the edge."""
    return round(SIDE * (1 - min(max(position, -1.0), 2.0))) if math.isfinite(position) else None


def _unbroken(x: list[int | None], y: list[int | None], low: list[int | None]) -> Iterable[list[Point]]:
    """Cuts (x, y, low) into runs of points that can all be drawn."""
    run: list[Point] = []
    for a, b, c in zip(x, y, low, strict=True):
        if a is not None and b is not None and c is not None:
            run.append((a, b, c))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _line(points: list[Point]) -> str:
    if len(points) == 1:
        return _dots(points)
    return "M" + "L".join(f"{x} {y}" for x, y, _ in points)


def _area(points: list[Point]) -> str:
    edge = [f"{x} {y}" for x, y, _ in points] + [f"{x} {low}" for x, _, low in reversed(points)]
    return "M" + "L".join(edge) + "Z"


def _dots(points: list[Point]) -> str:
    """Strokes of no length: their round caps stay circles however the drawing is stretched."""
    return "".join(f"M{x} {y}h0" for x, y, _ in points)


def _placed(marks: Iterable[tuple[float, str]], axis: Axis) -> Iterable[Mark]:
    """Marks that lie on the axis; one that follows closely on another's word goes without."""
    free = -1.0
    for at, text in sorted(marks):
        x = axis.place(at)
        if 0 <= x <= 1:
            yield Mark(x=x, text=text if x >= free else "")
            free = x + 0.2 if x >= free else free


def _drawable(x: float, y: float) -> bool:
    return math.isfinite(x) and math.isfinite(y)


def _in_words(shape: Shape) -> str:
    """First, last, least and most of a shape, as thick as it is."""
    low = shape.low if shape.low is not None else [0.0] * len(shape.y)
    values = [y - z for y, z in zip(shape.y, low, strict=True) if math.isfinite(y - z)]
    return (
        f"from {significant(values[0])} to {significant(values[-1])}, "
        f"least {significant(min(values))}, most {significant(max(values))}"
    )


def _round_step(step: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _tick_unit(most: float) -> tuple[float, str]:
    """Scale and letter that keep tick texts short."""
    for least, scale, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if most >= least:
            return 1 / scale, letter
    return 1.0, ""
