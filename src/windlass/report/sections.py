"""The sections of a run's page as data: charts, bars and tables that the template knows how to print.

A section is made by a function from a run, None where the run has nothing for it; `SECTIONS` lists them in
the order of the page.  A new section is a function and a line in that table; a new column of numbers is a
line in `LAYER_COLUMNS` or `EPOCH_COLUMNS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from windlass.plan.graph import Layer
from windlass.report import units
from windlass.report.blocks import MANY_ROWS, Bars, Cell, Column, Part, Section, Table, section
from windlass.report.curves import Chart, Shape, buckets, chart, line_and_dots, mean, noise, smoothed, thinned
from windlass.report.figures import (
    Phase,
    best_epoch,
    epochs_done,
    flatten,
    images_per_s,
    median,
    phase_seconds,
    text_of,
    total,
    without_accuracy,
)
from windlass.report.precision import numbers
from windlass.report.run import Row, Run, finite

NUM_SLICES = 160
"""Most slices of the run in which the parts of a step are averaged."""


def learning(run: Run) -> Section | None:
    """Loss, accuracy, learning rate and throughput over the steps."""
    step = run.column("step")
    marks = [(float(row["step"]), "resumed") for row in run.resumes]
    marks += [(finite(row.get("step")) or 0.0, "lost a rank") for row in run.losses]
    speed = images_per_s(run)
    return section(
        "learning",
        "Learning",
        chart(
            "Loss",
            _train_and_test(run, "loss"),
            x_label="step",
            y_label="loss",
            marks=marks,
        ),
        chart(
            "Accuracy",
            [*_train_and_test(run, "accuracy"), *_ring_at_best(run)],
            x_label="step",
            y_label="accuracy",
            form="percent",
            log=False,
            marks=marks,
        ),
        chart(
            "Learning rate",
            [thinned(step, run.column("lr"), color="c3", label="learning rate")],
            x_label="step",
            y_label="learning rate",
            log=False,
            y_low=0.0,
            marks=marks,
        ),
        chart(
            "Throughput",
            [noise(step, speed, color="c6"), smoothed(step, speed, color="c6", label="images/s, smoothed")],
            x_label="step",
            y_label="images per second",
            form="count",
            log=False,
            y_low=0.0,
            marks=marks,
        ),
    )


def time(run: Run) -> Section | None:
    """Where a step's time went, on the whole and in the course of the run."""
    phases = phase_seconds(run)
    if not phases or not run.num_steps:
        return None
    parts = time_parts(phases)
    whole = sum(mean_s for _, mean_s in parts)
    means = units.aligned_milliseconds([*(mean_s for _, mean_s in parts), whole])
    medians = units.aligned_milliseconds([*map(median, phases.values()), median(run.column("seconds"))])
    rows = tuple(
        (
            Cell(text=phase.label),
            Cell(text=mean_text),
            Cell(text=median_text),
            Cell(text=units.percent(mean_s / whole if whole else None), share=mean_s / whole if whole else None),
        )
        for (phase, mean_s), mean_text, median_text in zip(parts, means, medians, strict=False)
    )
    columns = (
        Column(title="part"),
        Column(title="mean", is_number=True, about="mean over the recorded steps"),
        Column(title="median", is_number=True, about="median over the recorded steps"),
        Column(title="share", is_number=True, about="of the time in steps"),
    )
    totals = (
        Cell(text="whole step"),
        Cell(text=means[-1]),
        Cell(text=medians[-1]),
        Cell(text=units.percent(1.0 if whole else None)),
    )
    return section(
        "time",
        "Where a step’s time went",
        time_bars("Mean step", [("", parts)]),
        _time_course(run, phases),
        Table(title="Parts of a step", columns=columns, rows=rows, totals=totals, is_wide=False),
    )


def time_parts(phases: dict[Phase, Sequence[float]]) -> list[tuple[Phase, float]]:
    """Mean seconds of a step by phase."""
    return [(phase, total(values) / max(1, len(values))) for phase, values in phases.items()]


def time_bars(title: str, rows: Sequence[tuple[str, list[tuple[Phase, float]]]]) -> Bars:
    """One bar for each of `rows`, all on the scale of the longest."""
    longest = max((sum(s for _, s in parts) for _, parts in rows), default=0.0) or 1.0
    bars = []
    for label, parts in rows:
        whole = sum(s for _, s in parts)
        pieces = tuple(
            Part(
                label=phase.label,
                color=phase.color,
                share=seconds / longest,
                text=f"{units.milliseconds(seconds)} ({units.percent(seconds / whole if whole else None)})",
            )
            for phase, seconds in parts
        )
        bars.append((label, pieces, units.milliseconds(whole)))
    return Bars(title=title, rows=tuple(bars))


def communication(run: Run) -> Section | None:
    """What the workers sent, as predicted and as counted, and how much of it was hidden."""
    exposed, hidden = run.column("communication_s"), run.column("hidden_s")
    if not run.num_steps or not any(math.isfinite(value) for value in hidden):
        return None
    predicted, counted = (total(run.column(name)) / run.num_steps for name in ("planned_bytes", "sent_bytes"))
    texts = {
        "exposed, of a mean step": units.milliseconds(total(exposed) / run.num_steps),
        "hidden behind the backward pass": units.milliseconds(total(hidden) / run.num_steps),
        "bytes a step sent by rank 0, predicted": f"{predicted:,.0f}",
        "bytes a step sent by rank 0, counted": f"{counted:,.0f}",
        "sums of the last start": str((run.end or {}).get("allreduce", units.NOTHING)),
    }
    return section("communication", "Communication", pairs("Allreduce", texts))


def progress(run: Run) -> Section | None:
    """A row for every epoch and every checkpoint."""
    return section("progress", "Epochs and checkpoints", _epochs(run), _checkpoints(run))


def network(run: Run) -> Section | None:
    """The network layer by layer: work and the four memories of training."""
    if run.graph is None:
        return None
    layers = run.graph.layers
    planned = run.plan.get("layers")
    algorithms = planned if isinstance(planned, dict) and planned else None
    sums = {column.title: sum(get(layer) for layer in layers) for column, get, _ in LAYER_COLUMNS}
    most = {column.title: max((get(layer) for layer in layers), default=0) for column, get, _ in LAYER_COLUMNS}

    def cells(layer: Layer) -> tuple[Cell, ...]:
        words = [layer.name, layer.kind, *([_algorithm(algorithms, layer)] if algorithms else [])]
        words += [", ".join(layer.inputs), " × ".join(map(str, layer.output_shape))]
        numbers = (
            _share_cell(get(layer), sums[column.title], most[column.title], text) for column, get, text in LAYER_COLUMNS
        )
        return (*(Cell(text=word) for word in words), *numbers)

    titles = ["layer", "kind", *(["convolution"] if algorithms else []), "inputs", "output shape"]
    totals = [Cell(text=f"{len(layers)} layers"), *(Cell(text="") for _ in titles[1:])]
    totals += [Cell(text=text(sums[c.title]), exact=f"{sums[c.title]:,}") for c, _, text in LAYER_COLUMNS]
    shape = " × ".join(map(str, run.graph.input_shape))
    table = Table(
        title=f"{run.graph.network}, input {shape}: {len(layers)} layers; MACs and bytes for the whole batch",
        columns=(*(Column(title=title) for title in titles), *(column for column, _, _ in LAYER_COLUMNS)),
        rows=tuple(map(cells, layers)),
        totals=tuple(totals),
        is_sortable=True,
        is_folded=len(layers) > MANY_ROWS,
    )
    return section("network", "Network", table)


LAYER_COLUMNS: tuple[tuple[Column, Callable[[Layer], int], Callable[[float | None], str]], ...] = (
    (Column(title="parameters", is_number=True), lambda layer: layer.num_parameters, units.count),
    (Column(title="forward MACs", is_number=True), lambda layer: layer.forward_macs, units.count),
    (Column(title="backward MACs", is_number=True), lambda layer: layer.backward_macs, units.count),
    (
        Column(title="D", is_number=True, about="bytes of activations kept for the backward pass"),
        lambda layer: layer.kept_bytes,
        units.num_bytes,
    ),
    (
        Column(title="W", is_number=True, about="bytes of parameters and buffers"),
        lambda layer: layer.weight_bytes,
        units.num_bytes,
    ),
    (
        Column(title="∇D", is_number=True, about="bytes of the derivative of the loss by the outputs"),
        lambda layer: layer.output_grad_bytes,
        units.num_bytes,
    ),
    (
        Column(title="∇W", is_number=True, about="bytes of the derivative of the loss by the parameters"),
        lambda layer: layer.weight_grad_bytes,
        units.num_bytes,
    ),
)
"""The numbers of a layer: heading, value, and how it is written."""


def plan(run: Run) -> Section | None:
    """Every lever: its value and why it was chosen."""
    levers = run.plan.get("levers")
    rows = [_lever(str(name), lever) for name, lever in levers.items()] if isinstance(levers, dict) else []
    rest = {key: value for key, value in run.plan.items() if key not in ("levers", "layers")}
    columns = tuple(Column(title=title) for title in ("lever", "value", "reason"))
    return section(
        "plan",
        "Plan",
        Table(title="Levers", columns=columns, rows=tuple(rows)) if rows else None,
        pairs("In general", flatten(rest)) if rest else None,
    )


def setting(run: Run) -> Section | None:
    """The resolved configuration and the machine."""
    machine = {key: _machine_text(key, value) for key, value in run.machine.items()}
    return section(
        "setting",
        "Configuration and machine",
        pairs("Configuration", flatten(run.config)) if run.config else None,
        pairs("Machine", machine) if machine else None,
    )


def pairs(title: str, texts: dict[str, str]) -> Table:
    """A narrow table of names and texts."""
    return Table(
        title=title,
        columns=(Column(title="name"), Column(title="value")),
        rows=tuple((Cell(text=name), Cell(text=text)) for name, text in texts.items()),
        is_wide=False,
    )


SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    learning,
    numbers,
    time,
    communication,
    progress,
    network,
    plan,
    setting,
)
"""The page of one run, from top to bottom."""


def sections(run: Run) -> list[Section]:
    """Those of `SECTIONS` for which the run has something."""
    return [made for make in SECTIONS if (made := make(run)) is not None]


def epoch_points(run: Run, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of `key` at the ends of the epochs."""
    known = [(finite(row.get("step")), finite(row.get(key))) for row in run.epochs]
    kept = [(step, value) for step, value in known if step is not None and value is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _train_and_test(run: Run, key: str) -> list[Shape]:
    """Training by step, light and smoothed, and the test by epoch."""
    step, train = run.column("step"), run.column(key)
    return [
        noise(step, train, color="c1"),
        smoothed(step, train, color="c1", label="training, smoothed"),
        *line_and_dots(*epoch_points(run, f"test_{key}"), color="c2", label="test"),
    ]


def _ring_at_best(run: Run) -> list[Shape]:
    row = best_epoch(run)
    step = finite(row.get("step")) if row else None
    if row is None or step is None:
        return []
    return [Shape(color="c2", x=[step], y=[float(row["test_accuracy"])], style="ring")]


def _time_course(run: Run, phases: dict[Phase, Sequence[float]]) -> Chart | None:
    """The phases stacked, each the mean of a slice of the run, in milliseconds."""
    spans = buckets(run.num_steps, NUM_SLICES)
    step = run.column("step")
    x = [step[span[len(span) // 2]] for span in spans]
    floor = [0.0] * len(spans)
    shapes = []
    for phase, values in phases.items():
        means = [1000 * mean(values[i] for i in span) for span in spans]
        top = [low + (value if math.isfinite(value) else 0.0) for low, value in zip(floor, means, strict=True)]
        shapes.append(Shape(color=phase.color, x=x, y=top, low=floor, label=phase.label, style="area"))
        floor = top
    typical, tallest = median(floor) or 0.0, max(floor)
    high = 2 * typical if tallest > 2.5 * typical > 0 else tallest
    at = x[floor.index(tallest)]
    cut = f"Cut off: {units.milliseconds(tallest / 1000)} near step {at:,.0f}." if tallest > high else ""
    return chart(
        "In the course of the run",
        shapes,
        x_label="step",
        y_label="milliseconds per step",
        suffix=f"{units.SPACE}ms",
        log=False,
        y_low=0.0,
        y_high=high,
        note=cut,
    )


def _epochs(run: Run) -> Table | None:
    if not run.epochs:
        return None
    best = best_epoch(run)
    shown = [spec for spec in EPOCH_COLUMNS if any(finite(row.get(spec[1])) is not None for row in run.epochs)]

    def cell(row: Row, key: str, text: Callable[[float | None], str]) -> Cell:
        value = finite(row.get(key))
        exact = "" if value is None else units.significant(value, digits=8)
        return Cell(text=text(value), exact=exact, best=row is best and key == "test_accuracy")

    rows = tuple((Cell(text=epochs_done(row)), *(cell(row, k, text) for _, k, text in shown)) for row in run.epochs)
    columns = (Column(title="epochs done"), *(Column(title=title, is_number=True) for title, _, _ in shown))
    return Table(title="Epochs", columns=columns, rows=rows, is_sortable=True, is_folded=len(rows) > MANY_ROWS)


EPOCH_COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("step", "step", units.count),
    ("training loss", "train_loss", units.fixed),
    ("test loss", "test_loss", units.fixed),
    ("training accuracy", "train_accuracy", units.percent),
    ("test accuracy", "test_accuracy", units.percent),
    ("images/s", "images_per_s", units.count),
    ("time", "seconds", units.duration),
    ("waiting for data", "data_share", units.percent),
)
"""The numbers of an epoch: heading, key, and how it is written."""


def _checkpoints(run: Run) -> Table | None:
    """Checkpoints and resumptions in the order of their steps."""
    name, text = ("test_loss", units.fixed) if without_accuracy(run) else ("test_accuracy", units.percent)
    tested = dict(zip(*epoch_points(run, name), strict=True))
    kept_best = max((i for i, row in enumerate(run.checkpoints) if row.get("best") is True), default=-1)
    events: list[tuple[float, tuple[Cell, ...]]] = []
    for i, row in enumerate(run.checkpoints):
        step = finite(row.get("step"))
        cells = (
            Cell(text=str(row.get("name", units.NOTHING))),
            Cell(text=units.NOTHING if step is None else f"{step:,.0f}"),
            Cell(text=text(tested.get(step) if step is not None else None), best=i == kept_best),
            Cell(text="best" if i == kept_best else ""),
        )
        events.append((step or 0.0, cells))
    for row in run.resumes:
        workers = finite(row.get("workers"))
        note = "" if workers is None else f"with {workers:.0f} worker{'' if workers == 1 else 's'}"
        step = float(row["step"])
        events.append((step, (Cell(text="resumed"), Cell(text=f"{step:,.0f}"), Cell(text=""), Cell(text=note))))
    for row in run.losses:
        step = finite(row.get("step")) or 0.0
        note = str(row.get("message", units.NOTHING))
        events.append((step, (Cell(text="lost a rank"), Cell(text=f"{step:,.0f}"), Cell(text=""), Cell(text=note))))
    if not events:
        return None
    columns = (
        Column(title="checkpoint"),
        Column(title="step", is_number=True),
        Column(title=name.replace("_", " "), is_number=True),
        Column(title="note"),
    )
    rows = tuple(cells for _, cells in sorted(events, key=lambda event: event[0]))
    return Table(title="Checkpoints", columns=columns, rows=rows, is_wide=False, is_folded=len(rows) > MANY_ROWS)


def _algorithm(planned: Row, layer: Layer) -> str:
    """How the plan computes a layer's convolution; a dash for a layer that is none."""
    entry = planned.get(layer.name)
    return str(entry.get("convolution") or units.NOTHING) if isinstance(entry, dict) else units.NOTHING


def _share_cell(value: int, whole: int, most: int, text: Callable[[float | None], str]) -> Cell:
    """A number with its exact value, its share of the whole, and a bar against the column's most."""
    if not value:
        return Cell(text="0", share=0.0)
    share = f", {100 * value / whole:.1f}% of all" if whole else ""
    return Cell(text=text(value), exact=f"{value:,}{share}", share=value / most if most else 0.0)


def _lever(name: str, lever: Any) -> tuple[Cell, ...]:
    if isinstance(lever, dict):
        return tuple(Cell(text=text) for text in (name, text_of(lever.get("value")), str(lever.get("reason") or "")))
    return tuple(Cell(text=text) for text in (name, text_of(lever), ""))


def _machine_text(key: str, value: Any) -> str:
    number = finite(value)
    return units.num_bytes(number) if number is not None and key.endswith("bytes") else text_of(value)


def one_per_run(labels: Iterable[str]) -> tuple[Column, ...]:
    """A column for the name of a row and one for each run."""
    return (Column(title=""), *(Column(title=label, is_number=True) for label in labels))
