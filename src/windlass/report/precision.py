"""The section about numbers of few bits: what rounding did, in words, over the epochs and layer by layer.

It is there for runs whose metrics have rows of kind ``precision`` (`windlass.runs.tally`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from windlass.plan.number import FLOAT32, Fixed
from windlass.plan.recipe import ROLES, spell_format
from windlass.report import units
from windlass.report.blocks import MANY_ROWS, Cell, Column, Remark, Section, Table, Words, section
from windlass.report.curves import Chart, Shape, chart, line_and_dots
from windlass.report.figures import look_up
from windlass.report.precision_words import HIGH_SATURATION, epoch_of, latest, recipe_of, recovered, saturating, stalled
from windlass.report.run import Row, Run, finite
from windlass.runs.tally import (
    Tally,
    by_role,
    mean_error,
    mean_error_steps,
    read_tallies,
    role_order,
    saturated_share,
    zeroed_share,
)

COLORS = dict(zip(ROLES, ("c3", "c1", "c4", "c2", "c5"), strict=True))
"""A role's colour in every chart."""
MANY_LINES = 40
"""Of so many parameters each has a faint line of its own."""

Rows = Sequence[tuple[float, tuple[Tally, ...]]]
"""For every row its place on the axis of epochs, and its tallies."""
Marks = Sequence[tuple[float, str]]
Measure = Callable[[Sequence[Tally]], float]


def numbers(run: Run) -> Section | None:
    """What rounding did; None for a run that rounded nothing."""
    rows = [row for row in run.precisions if read_tallies(row)]
    if not rows:
        return None
    points = [(_epochs_done(run, row), read_tallies(row)) for row in rows]
    marks = [(_epochs_done(run, row), "resumed") for row in run.resumes]
    return section(
        "numbers",
        "Numbers",
        _in_words(rows, workers=look_up(run, "workers")),
        _zeroed(points, marks),
        _out_of_range(points, marks),
        _others_zeroed(points, marks),
        _errors(points, marks),
        _float_errors(points, marks),
        _table(rows),
    )


def _epochs_done(run: Run, row: Row) -> float:
    """How many epochs were done at a row, as far as can be told from the ends of epochs."""
    step = finite(row.get("step"))
    for ended in run.epochs:
        at, epoch = finite(ended.get("step")), finite(ended.get("epoch"))
        if step is not None and at and epoch is not None:
            return step * (epoch + 1) / at
    return float(epoch_of(row))


def _in_words(rows: Sequence[Row], *, workers: str) -> Words:
    """The recipe, and what is wrong with it or that nothing is."""
    remarks = [Remark(word="recipe", tone="plain", text=_recipe_text(rows, workers=workers))]
    for word, tone, texts in (
        ("stalled", "bad", stalled(rows)),
        ("had stalled", "fair", recovered(rows)),
        ("out of range", "fair", saturating(rows)),
    ):
        remarks += [Remark(word=word, tone=tone, text=text) for text in texts]
    if len(remarks) == 1:
        remarks.append(Remark(word="fine", tone="good", text=_fine_text(rows)))
    return Words(title="In words", remarks=tuple(remarks))


def _recipe_text(rows: Sequence[Row], *, workers: str) -> str:
    tallies = by_role(tally for _, tally in latest(rows).values())
    formats = (
        f"{role} {' or '.join(dict.fromkeys(spell_format(t.number) for t in tallies[role]))}"
        for role in sorted(tallies, key=role_order)
    )
    recipe = recipe_of(rows[-1])
    rounding = f", {recipe.rounding} rounding" if recipe else ""
    counted = " Counted on rank 0 alone." if workers not in ("", "1") else ""
    scaled = ""
    if recipe and recipe.error_scale != 1 and any(isinstance(t.number, Fixed) for t in tallies.get("errors", ())):
        scaled = f" Errors are those of the mean loss, for which error_scale shifts {spell_format(recipe.errors)}."
    return f"{rows[-1].get('recipe')}: {', '.join(formats)}{rounding}.{scaled}{counted}"


def _fine_text(rows: Sequence[Row]) -> str:
    tallies = [tally for _, tally in latest(rows).values()]
    lost = zeroed_share([tally for tally in tallies if tally.moved is not None])
    zeroed = f"{_share_text(lost)} of the updates rounded to zero, and " if math.isfinite(lost) else ""
    most = max(tallies, key=lambda tally: saturated_share([tally]))
    share = saturated_share([most])
    out = (
        f"at most {_share_text(share)} of a tensor’s numbers, the {most.role} of {most.layer}," if share else "nothing"
    )
    return (
        f"No weight has stalled, and no tensor had more than {100 * HIGH_SATURATION:g}% of its numbers out of range. "
        f"In epoch {epoch_of(rows[-1])}, {zeroed}{out} was out of range."
    )


def _share_text(share: float) -> str:
    """A share that is never written as none or all where it is neither.

    >>> _share_text(0.0), _share_text(3e-6), _share_text(0.1234), _share_text(0.999999)
    ('0%', 'under 0.01%', '12.34%', 'over 99.99%')
    """
    if not math.isfinite(share):
        return units.NOTHING
    if share in (0, 1):
        return f"{100 * share:.0f}%"
    return "under 0.01%" if share < 1e-4 else "over 99.99%" if share > 0.9999 else units.percent(share)


def _line(points: Rows, measure: Measure, *, role: str, layer: str | None = None) -> list[float]:
    """A measure of one role, or of one layer in it, in every row."""
    return [
        measure([tally for tally in tallies if tally.role == role and layer in (None, tally.layer)])
        for _, tallies in points
    ]


def _zeroed(points: Rows, marks: Marks) -> Chart | None:
    """Updates that were lost: of all parameters, of each one, and of the one that lost most at the end."""
    x = [at for at, _ in points]
    color = COLORS["updates"]
    names = list(dict.fromkeys(t.layer for _, tallies in points for t in tallies if t.role == "updates"))
    lines = {name: _line(points, zeroed_share, role="updates", layer=name) for name in names}
    shapes: list[Shape] = []
    if len(names) > 1:
        if len(names) <= MANY_LINES:
            shapes += [Shape(color=color, x=x, y=y, style="faint") for y in lines.values()]
        worst = max(names, key=lambda name: _last(lines[name]))
        shapes += line_and_dots(x, lines[worst], color="c8", label=f"{worst}, most at the end")
    whole = _line(points, zeroed_share, role="updates")
    shapes += line_and_dots(x, whole, color=color, label="all parameters")
    return _shares("Updates rounded to zero", shapes, marks, of="the updates that were not zero")


def _others_zeroed(points: Rows, marks: Marks) -> Chart | None:
    """Numbers of the other roles that were rounded to zero."""
    others = [(at, tuple(tally for tally in tallies if tally.role != "updates")) for at, tallies in points]
    shapes, _ = _role_lines(others, zeroed_share)
    return _shares("Other numbers rounded to zero", shapes, marks)


def _last(values: Sequence[float]) -> float:
    """The last finite value; less than any share where there is none."""
    return next((value for value in reversed(values) if math.isfinite(value)), -1.0)


def _role_lines(points: Rows, measure: Measure) -> tuple[list[Shape], float]:
    """A line for every role, and the most of them all."""
    x = [at for at, _ in points]
    roles = sorted(
        {tally.role for _, tallies in points for tally in tallies}, key=lambda role: (role_order(role), role)
    )
    lines = {role: _line(points, measure, role=role) for role in roles}
    shapes = [s for role, y in lines.items() for s in line_and_dots(x, y, color=COLORS.get(role, "c8"), label=role)]
    return shapes, max((value for y in lines.values() for value in y if math.isfinite(value)), default=0.0)


def _out_of_range(points: Rows, marks: Marks) -> Chart | None:
    """Numbers out of range; the axis reaches at least what is worth a sentence, so that little looks little."""
    shapes, most = _role_lines(points, saturated_share)
    return _shares("Numbers out of range", shapes, marks, y_high=max(most, HIGH_SATURATION))


def _shares(
    title: str, shapes: list[Shape], marks: Marks, *, of: str = "the numbers of a role", y_high: float | None = None
) -> Chart | None:
    """Shares by epoch, from 0 on."""
    return chart(
        title,
        shapes,
        x_label="epoch",
        y_label=f"share of {of}",
        form="percent",
        log=False,
        y_low=0.0,
        y_high=y_high,
        marks=marks,
    )


def _errors(points: Rows, marks: Marks) -> Chart | None:
    """The mean error in fixed point, in steps."""
    shapes, _ = _role_lines(points, mean_error_steps)
    return chart(
        "Mean rounding error",
        shapes,
        x_label="epoch",
        y_label="steps of the format",
        log=False,
        y_low=0.0,
        marks=marks,
    )


def _float_errors(points: Rows, marks: Marks) -> Chart | None:
    """The mean error in short floating point, which has no one step."""
    shapes, _ = _role_lines(points, _float_error)
    return chart(
        "Mean rounding error in floating point",
        shapes,
        x_label="epoch",
        y_label="mean absolute error",
        marks=marks,
    )


def _float_error(tallies: Sequence[Tally]) -> float:
    return mean_error([t for t in tallies if not isinstance(t.number, Fixed) and t.number != FLOAT32])


def _table(rows: Sequence[Row]) -> Table:
    """Every role and layer as of the last row that has it."""
    last = sorted(latest(rows).values(), key=lambda item: role_order(item[1].role))
    return Table(
        title=f"Layers in epoch {epoch_of(rows[-1])}",
        columns=COLUMNS,
        rows=tuple(_cells(tally) for _, tally in last),
        is_sortable=True,
        is_folded=len(last) > MANY_ROWS,
    )


COLUMNS = (
    Column(title="layer"),
    Column(title="role"),
    Column(title="format"),
    Column(title="numbers", is_number=True, about="rounded since the row before"),
    Column(title="out of range", is_number=True),
    Column(title="rounded to zero", is_number=True, about="of all numbers; of updates, of those that were not zero"),
    Column(title="mean error in steps", is_number=True, about="stochastic 1/3 and nearest 1/4, if evenly spread"),
    Column(title="mean error", is_number=True),
    Column(title="moved", is_number=True, about="updates that were not zero after rounding"),
)


def _cells(tally: Tally) -> tuple[Cell, ...]:
    number = tally.number
    steps, error = mean_error_steps([tally]), mean_error([tally])
    return (
        Cell(text=tally.layer),
        Cell(text=tally.role),
        Cell(text=spell_format(number), exact=f"{number.lowest:.6g} to {number.highest:.6g}"),
        Cell(text=units.count(tally.elements), exact=f"{tally.elements:,.0f}"),
        _share_cell(saturated_share([tally]), tally.saturated),
        _share_cell(zeroed_share([tally]), tally.zeroed),
        Cell(text=units.fixed(steps) if math.isfinite(steps) else units.NOTHING),
        Cell(text=units.significant(error) if math.isfinite(error) else units.NOTHING),
        Cell(text=units.count(tally.moved), exact="" if tally.moved is None else f"{tally.moved:,.0f}"),
    )


def _share_cell(share: float, count: float) -> Cell:
    """A share with the count behind it."""
    if not math.isfinite(share):
        return Cell(text=units.NOTHING)
    return Cell(text=_share_text(share), exact=f"{count:,.0f}", share=share)
