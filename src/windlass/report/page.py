"""The report: one self-contained HTML file about a run, or about several compared.

Nothing is fetched: style and script are in the file, fonts are the reader's, and the page's own policy
forbids the rest.  Every text is escaped by the template.  The same runs give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from windlass.errors import ConfigError, WriteError
from windlass.report import units
from windlass.report.blocks import Bars, Cell, Column, Section, Table, section
from windlass.report.curves import Shape, chart, line_and_dots, smoothed
from windlass.report.figures import (
    FIGURES,
    best_epoch,
    best_of,
    differences,
    figures_of,
    images_per_s,
    look_up,
    phase_seconds,
    seconds_to_accuracy,
    training_seconds,
)
from windlass.report.run import Run, load_run
from windlass.report.sections import (
    epoch_points,
    one_per_run,
    sections,
    time_bars,
    time_parts,
)

NUM_COLORS = 8
"""Colours in the style; more runs than that share them."""

TONES = {"done": "good", "stopped": "fair", "unfinished": "fair"}
"""How a status looks; any other is bad."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One run as the template prints it: heading, key figures and sections; `key` begins its links."""

    key: str
    title: str
    subtitle: tuple[str, ...]
    status: str
    tone: str
    message: str
    problems: tuple[str, ...]
    tiles: tuple[tuple[str, str, str], ...]
    sections: tuple[Section, ...]


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes the report about one run folder, or about several side by side, and returns `out`.

    The file appears whole or not at all.

    Raises:
        ConfigError: no folder was given.
        DataError: a folder is no run.
        WriteError: `out` cannot be written.
    """
    if not folders:
        raise ConfigError("a report needs at least one run folder, got none")
    content = render([load_run(folder) for folder in folders]).encode("utf-8", "replace")
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        scratch.write_bytes(content)
        os.replace(scratch, out)  # noqa: PTH105  # patched in tests, and says "atomic" to those who know it
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise WriteError(f"cannot write {out}: {error.strerror}") from error
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    runs = _told_apart(runs)
    leaves = [_leaf(run, f"run{i + 1}-" if len(runs) > 1 else "") for i, run in enumerate(runs)]
    title = leaves[0].title if len(leaves) == 1 else f"{len(leaves)} runs compared"
    compared = compare(runs) if len(runs) > 1 else []
    return environment.get_template("page.html.j2").render(title=title, leaves=leaves, compared=compared)


def compare(runs: Sequence[Run]) -> list[Section]:
    """The sections that set several runs side by side."""
    made = [_figures_compared(runs), _curves_compared(runs), _times_compared(runs), _settings_compared(runs)]
    return [part for part in made if part is not None]


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs whose folders have the same name are named by the whole path."""
    names = [run.name for run in runs]
    return [replace(run, name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def _leaf(run: Run, key: str) -> Leaf:
    workers = look_up(run, "workers")
    batch = look_up(run, "batch") or look_up(run, "batch_size")
    subtitle = (
        run.graph.network if run.graph else look_up(run, "network"),
        look_up(run, "data") or look_up(run, "dataset"),
        workers and f"{workers} worker{'' if workers == '1' else 's'}",
        batch and f"batch {batch}",
        str(run.machine.get("started", "")),
    )
    return Leaf(
        key=key,
        title=run.name,
        subtitle=tuple(filter(None, subtitle)),
        status=run.status,
        tone=TONES.get(run.status, "bad"),
        message=str(run.end.get("message") or "") if run.end else "",
        problems=run.problems,
        tiles=tuple((figure.label, figure.text(figure.value(run)), figure.note(run)) for figure in figures_of(run)),
        sections=tuple(sections(run)),
    )


def _figures_compared(runs: Sequence[Run]) -> Section | None:
    rows = [(Cell(text="Status"), *(Cell(text=run.status) for run in runs))]
    measured = [(f.label, [f.value(run) for run in runs], f.text, f.better) for f in FIGURES]
    tops = [float(row["test_accuracy"]) for row in map(best_epoch, runs) if row is not None]
    if len(tops) == len(runs):
        label = f"Time in steps to {units.percent(min(tops))} test accuracy"
        times = [seconds_to_accuracy(run, min(tops)) for run in runs]
        measured.insert(1, (label, times, units.duration, "lower"))
    for label, values, text, better in measured:
        best = best_of(values, better)
        cells = (Cell(text=text(value), best=i in best) for i, value in enumerate(values))
        rows.append((Cell(text=label), *cells))
    table = Table(title="Key figures", columns=one_per_run(run.name for run in runs), rows=tuple(rows))
    return section("figures", "Key figures", table)


def _curves_compared(runs: Sequence[Run]) -> Section | None:
    """Loss, accuracy and throughput, a line for each run."""
    losses, speeds = [], []
    by_epoch: list[Shape] = []
    by_time: list[Shape] = []
    for i, run in enumerate(runs):
        color, step = f"c{i % NUM_COLORS + 1}", run.column("step")
        losses.append(smoothed(step, run.column("loss"), color=color, label=run.name))
        speeds.append(smoothed(step, images_per_s(run), color=color, label=run.name))
        at, accuracy = epoch_points(run, "test_accuracy")
        counts = [float(n) for n in range(1, len(at) + 1)]
        by_epoch += line_and_dots(counts, accuracy, color=color, label=run.name)
        by_time += line_and_dots(training_seconds(run, at), accuracy, color=color, label=run.name)
    return section(
        "curves",
        "Curves",
        chart(
            "Test accuracy by epoch",
            by_epoch,
            x_label="epochs",
            form="percent",
            log=False,
            y_label="test accuracy",
        ),
        chart(
            "Test accuracy by time",
            by_time,
            x_label="seconds in steps",
            form="percent",
            log=False,
            y_label="test accuracy",
        ),
        chart("Training loss, smoothed", losses, x_label="step", y_label="loss"),
        chart(
            "Throughput, smoothed",
            speeds,
            x_label="step",
            y_label="images per second",
            form="count",
            log=False,
            y_low=0.0,
        ),
    )


def _times_compared(runs: Sequence[Run]) -> Section | None:
    rows = [(run.name, time_parts(phases)) for run in runs if (phases := phase_seconds(run))]
    bars: Bars | None = time_bars("Mean step of each run, on one scale", rows) if rows else None
    return section("time", "Where a step’s time went", bars)


def _settings_compared(runs: Sequence[Run]) -> Section | None:
    """What is not the same in all runs: configuration, plan, machine."""
    tables = []
    for title, sources in (
        ("Configuration", [run.config for run in runs]),
        ("Plan", [run.plan for run in runs]),
        ("Machine", [run.machine for run in runs]),
    ):
        found = differences(sources)
        columns = (Column(title="name"), *(Column(title=run.name) for run in runs))
        rows = tuple((Cell(text=path), *(Cell(text=text) for text in texts)) for path, texts in found)
        if rows:
            tables.append(
                Table(
                    title=f"{title}: {len(rows)} difference{'' if len(rows) == 1 else 's'}",
                    columns=columns,
                    rows=rows,
                )
            )
    return section("differences", "What differs", *tables)
