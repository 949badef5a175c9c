"""A run as its folder tells it: configuration, plan, graph, machine and the rows of its metrics.

A report is read most eagerly after a crash, so reading forgives: what is missing or half-written is named in
`Run.problems` and the rest is shown.  Only a folder that is no run at all is refused.

Step rows are kept as columns of doubles (`array`, eight bytes a value), so a million steps fit in memory.  A
run that was resumed may have taken some steps twice; the last time counts, as it does for the weights.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from windlass.errors import DataError
from windlass.plan.graph import Graph, Layer

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that one run folder holds.

    Attributes:
        folder: where it was read.
        name: the folder's name.
        config: the resolved configuration.
        plan: the plan with its levers, `{}` where there is none.
        graph: the captured network, None where there is none.
        machine: what it ran on.
        steps: columns of equal length by name; ``step`` and ``seconds`` are always there; NaN where a row
            lacks a value or the value itself was not finite.
        epochs, checkpoints, resumes: rows of those kinds, in order.
        losses: rows of ranks that died while the others went on.
        precisions: what rounding did, an epoch each (`windlass.runs.tally`); none where nothing was rounded.
        end: the row that closes the run; None where it still runs or was killed.
        problems: one sentence for each thing that a reader should know before trusting the page.
    """

    folder: Path
    name: str
    config: Row
    plan: Row
    graph: Graph | None
    machine: Row
    steps: Mapping[str, Sequence[float]]
    epochs: tuple[Row, ...]
    checkpoints: tuple[Row, ...]
    resumes: tuple[Row, ...]
    end: Row | None
    problems: tuple[str, ...]
    losses: tuple[Row, ...] = ()
    precisions: tuple[Row, ...] = ()

    @property
    def num_steps(self) -> int:
        """Steps whose rows were read."""
        return len(self.steps["step"])

    @property
    def status(self) -> str:
        """How it ended, in the trainer's word; ``unfinished`` where no row says so."""
        return str(self.end.get("status", "unfinished")) if self.end else "unfinished"

    def column(self, name: str) -> Sequence[float]:
        """The step rows' values of `name`; NaN in every row where none has it."""
        return self.steps.get(name) or array("d", [math.nan]) * self.num_steps


def load_run(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        DataError: it has no `config.yaml` or no `metrics.jsonl`, or one of them cannot be opened.
    """
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} is no run folder: it lacks {' and '.join(missing)}")
    problems: list[str] = []
    metrics = _read_metrics(folder / METRICS, problems)
    graph_row = _read_mapping(folder / "graph.json", json.loads, problems)
    return Run(
        folder=folder,
        name=folder.resolve().name,
        config=_read_mapping(folder / CONFIG, yaml.safe_load, problems),
        plan=_read_mapping(folder / "plan.yaml", yaml.safe_load, problems),
        graph=_graph(graph_row, problems) if graph_row else None,
        machine=_read_mapping(folder / "machine.json", json.loads, problems),
        steps=metrics.steps,
        epochs=tuple(metrics.epochs),
        checkpoints=tuple(metrics.checkpoints),
        resumes=tuple(metrics.resumes),
        losses=tuple(metrics.losses),
        precisions=tuple(metrics.precisions),
        end=metrics.end,
        problems=(*problems, *_remarks(metrics)),
    )


def finite(value: object) -> float | None:
    """`value` as a float where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


@dataclass(slots=True)
class _Metrics:
    """Gathers the rows of `metrics.jsonl` in the order in which they were written."""

    steps: dict[str, array[float]] = field(default_factory=lambda: {"step": array("d"), "seconds": array("d")})
    epochs: list[Row] = field(default_factory=list)
    checkpoints: list[Row] = field(default_factory=list)
    resumes: list[Row] = field(default_factory=list)
    losses: list[Row] = field(default_factory=list)
    precisions: list[Row] = field(default_factory=list)
    end: Row | None = None

    def add(self, row: Row) -> None:
        """Takes one row; a kind that is not known here is left out."""
        match row.get("kind"):
            case "step":
                self._add_step(row)
            case "epoch":
                self.epochs.append(row)
            case "checkpoint":
                self.checkpoints.append(row)
            case "resume":
                self._rewind(_step_of(row))
                self.resumes.append(row)
            case "lost":
                self.losses.append(row)
            case "precision":
                self.precisions.append(row)
            case "end":
                self.end = row

    def _add_step(self, row: Row) -> None:
        step, num_rows = _step_of(row), len(self.steps["step"])
        if num_rows and step <= self.steps["step"][-1]:
            self._rewind(step - 1)
            num_rows = len(self.steps["step"])
        for name, value in row.items():
            if isinstance(value, int | float) or value is None:
                if name not in self.steps:
                    self.steps[name] = array("d", [math.nan]) * num_rows
                number = finite(value)
                self.steps[name].append(math.nan if number is None else number)
        for column in self.steps.values():
            if len(column) == num_rows:
                column.append(math.nan)

    def _rewind(self, step: float) -> None:
        """Forgets what came after `step`: it is about to be done again."""
        keep = bisect_right(self.steps["step"], step)
        for column in self.steps.values():
            del column[keep:]
        self.epochs = [row for row in self.epochs if (finite(row.get("step")) or 0) <= step]
        self.checkpoints = [row for row in self.checkpoints if (finite(row.get("step")) or 0) <= step]
        self.precisions = [row for row in self.precisions if (finite(row.get("step")) or 0) <= step]
        self.end = None


def _row(line: str) -> Row:
    """The mapping on one line; ValueError where there is none."""
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no mapping")
    return row


def _step_of(row: Row) -> float:
    """The row's step; ValueError where it has none."""
    step = finite(row.get("step"))
    if step is None:
        raise ValueError("a row without a step")
    return step


def _read_metrics(path: Path, problems: list[str]) -> _Metrics:
    """All rows that can be read; lines that cannot are counted, a half-written last one by itself."""
    metrics = _Metrics()
    bad: list[int] = []
    number = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        metrics.add(_row(line))
                except (ValueError, RecursionError):
                    bad.append(number)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if bad and bad[-1] == number:
        problems.append(f"The last line of {METRICS} (line {bad.pop()}) is half-written and was skipped.")
    if bad:
        lines_were = "line was" if len(bad) == 1 else "lines were"
        problems.append(f"{len(bad)} unreadable {lines_were} skipped in {METRICS}, the first at line {bad[0]}.")
    return metrics


def _read_mapping(path: Path, parse: Callable[[str], Any], problems: list[str]) -> Row:
    """The mapping that a file holds; empty, with a problem noted, where it cannot be had."""
    try:
        content = parse(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        problems.append(f"There is no {path.name}.")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} holds no mapping.")
        return {}
    return {str(key): value for key, value in content.items()}


_COUNTS = (
    "num_parameters",
    "forward_macs",
    "backward_macs",
    "kept_bytes",
    "weight_bytes",
    "output_grad_bytes",
    "weight_grad_bytes",
)


def _graph(row: Row, problems: list[str]) -> Graph | None:
    """The graph that `dataclasses.asdict` and JSON made a mapping of."""
    try:
        return Graph(
            network=str(row["network"]),
            input_shape=tuple(map(int, row["input_shape"])),
            layers=tuple(map(_layer, row["layers"])),
            input_bytes=int(row["input_bytes"]),
            peak_bytes=int(row["peak_bytes"]),
            peak_at=str(row["peak_at"]),
        )
    except KeyError as error:
        problems.append(f"graph.json lacks {error}; the network is not shown.")
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        problems.append(f"graph.json holds no graph ({error}); the network is not shown.")
    return None


def _layer(row: Row) -> Layer:
    counts = {name: int(row[name]) for name in _COUNTS}
    return Layer(
        name=str(row["name"]),
        kind=str(row["kind"]),
        inputs=tuple(map(str, row["inputs"])),
        output_shape=tuple(map(int, row["output_shape"])),
        attributes=tuple((str(key), value) for key, value in row.get("attributes") or ()),
        **counts,
    )


def _remarks(metrics: _Metrics) -> Iterable[str]:
    """What the rows themselves give to worry about."""
    if metrics.end is None:
        yield "No row closes the run: it still runs, or it was killed."
    if not metrics.steps["step"]:
        yield "No step was recorded."
    losses = metrics.steps.get("loss", array("d"))
    first = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if first is not None:
        yield f"The loss is missing or not finite from step {metrics.steps['step'][first]:,.0f}."
