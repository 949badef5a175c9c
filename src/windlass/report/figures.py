"""The key figures of a run, each a row of `FIGURES`: how it is had, written, explained and compared."""

from __future__ import annotations

import json
import math
import statistics
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from windlass.report import units
from windlass.report.run import Row, Run, finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One key figure.

    Attributes:
        label: its name.
        value: the figure of a run, None where the run does not tell.
        text: the value as it is read.
        note: a few words that go with it.
        better: which of several is the best; empty where that says nothing.
    """

    label: str
    value: Callable[[Run], float | None]
    text: Callable[[float | None], str]
    note: Callable[[Run], str]
    better: Literal["", "higher", "lower"] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a step: `key` names the column ``<key>_s``."""

    key: str
    label: str
    color: str


PHASES = (
    Phase(key="data", label="waiting for data", color="c7"),
    Phase(key="forward", label="forward", color="c1"),
    Phase(key="backward", label="backward", color="c4"),
    Phase(key="communication", label="communication", color="c5"),
    Phase(key="update", label="update", color="c3"),
    Phase(key="other", label="other", color="c8"),
)
"""Where a step's time goes; communication is the part that nothing else hid."""


def total(values: Iterable[float]) -> float:
    """Sum of the finite values."""
    return math.fsum(value for value in values if math.isfinite(value))


def median(values: Iterable[float]) -> float | None:
    """Median of the finite values, None where there is none."""
    kept = [value for value in values if math.isfinite(value)]
    return statistics.median(kept) if kept else None


def images_per_s(run: Run) -> Sequence[float]:
    """Throughput of every step, NaN where it cannot be told."""
    pairs = zip(run.column("images"), run.column("seconds"), strict=True)
    return array("d", [images / seconds if seconds > 0 else math.nan for images, seconds in pairs])


def phase_seconds(run: Run) -> dict[Phase, Sequence[float]]:
    """Seconds of every step by recorded phase; *other* is what no phase accounts for."""
    named = {
        phase: run.column(f"{phase.key}_s")
        for phase in PHASES
        if phase.key != "other" and f"{phase.key}_s" in run.steps
    }
    if not named:
        return {}
    known = [total(parts) for parts in zip(*named.values(), strict=True)]
    rest = [max(0.0, whole - part) for whole, part in zip(run.column("seconds"), known, strict=True)]
    return {**named, PHASES[-1]: rest}


def training_seconds(run: Run, steps: Iterable[float]) -> list[float]:
    """Time spent in steps until each of `steps` was done.

    Where only some steps were recorded, each stands for those since the one recorded before it.
    """
    step, first = run.column("step"), run.column("step")[0] if run.num_steps else 0.0
    begin = max((s for row in run.resumes if (s := finite(row.get("step")) or 0.0) < first), default=0.0)
    spans = (b - a for a, b in pairwise([begin, *step]))
    pairs = zip(spans, run.column("seconds"), strict=True)
    elapsed = [0.0, *accumulate(n * seconds if math.isfinite(seconds) else 0.0 for n, seconds in pairs)]
    return [elapsed[bisect_right(step, at)] for at in steps]


def best_epoch(run: Run) -> Row | None:
    """The epoch row with the highest test accuracy, the first of equals."""
    rows = [row for row in run.epochs if finite(row.get("test_accuracy")) is not None]
    return max(rows, key=lambda row: float(row["test_accuracy"])) if rows else None


def without_accuracy(run: Run) -> bool:
    """Whether the run was tested and has no accuracy: its network learns without labels."""
    return best_epoch(run) is None and any(finite(row.get("test_loss")) is not None for row in run.epochs)


def epochs_done(row: Row) -> str:
    """The epoch of a row as a count of finished epochs."""
    epoch = finite(row.get("epoch"))
    return units.NOTHING if epoch is None else f"{epoch + 1:.0f}"


def seconds_to_accuracy(run: Run, target: float) -> float | None:
    """Time in steps until an epoch's test accuracy was at least `target`."""
    for row in run.epochs:
        accuracy, step = finite(row.get("test_accuracy")), finite(row.get("step"))
        if accuracy is not None and step is not None and accuracy >= target:
            return training_seconds(run, [step])[0]
    return None


def look_up(run: Run, key: str) -> str:
    """What the plan or the configuration says of `key`, however deep it lies; empty where neither does."""
    for source in (run.plan, run.config):
        flat = flatten(source)
        for tail in (key, f"{key}.name", f"{key}.source"):
            for path, text in flat.items():
                if (path == tail or path.endswith("." + tail)) and text not in ("", "null", "{}"):
                    return text
    return ""


def flatten(value: object, path: str = "") -> dict[str, str]:
    """Nested mappings as one mapping from dotted paths to text.

    >>> flatten({"data": {"name": "mnist", "size": [28, 28]}, "seed": 3})
    {'data.name': 'mnist', 'data.size': '[28, 28]', 'seed': '3'}
    """
    if isinstance(value, Mapping) and (value or not path):
        parts = [flatten(part, f"{path}.{key}" if path else str(key)) for key, part in value.items()]
        return {key: text for part in parts for key, text in part.items()}
    return {path: text_of(value)}


def text_of(value: object) -> str:
    """A value of a configuration in one line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def differences(sources: Sequence[Row]) -> list[tuple[str, tuple[str, ...]]]:
    """The dotted paths whose texts are not the same in all of `sources`, with the text of each."""
    flat = [flatten(source) for source in sources]
    paths = dict.fromkeys(path for mapping in flat for path in mapping)
    rows = [(path, tuple(mapping.get(path, units.NOTHING) for mapping in flat)) for path in paths]
    return [(path, texts) for path, texts in rows if len(set(texts)) > 1]


def best_of(values: Sequence[float | None], better: str) -> frozenset[int]:
    """Indices of the best values; none where there is nothing to choose between."""
    known = [value for value in values if value is not None]
    if not better or len(set(known)) < 2:
        return frozenset()
    best = max(known) if better == "higher" else min(known)
    return frozenset(i for i, value in enumerate(values) if value == best)


def _best_accuracy(run: Run) -> float | None:
    row = best_epoch(run)
    return finite(row["test_accuracy"]) if row else None


def _best_note(run: Run) -> str:
    row = best_epoch(run)
    return f"after {epochs_done(row)} of {epochs_done(run.epochs[-1])} epochs" if row else "no test was run"


def _final(run: Run, column: str, epoch_key: str) -> float | None:
    """The last epoch's figure, or the last step's where no epoch was finished."""
    if run.epochs:
        return finite(run.epochs[-1].get(epoch_key))
    return finite(run.column(column)[-1]) if run.num_steps else None


def _final_loss_note(run: Run) -> str:
    if not run.epochs:
        return "at the last step" if run.num_steps else ""
    test = finite(run.epochs[-1].get("test_loss"))
    return "in the last epoch" if test is None else f"test {units.number(test)}"


def _throughput_note(run: Run) -> str:
    speeds = sorted(speed for speed in images_per_s(run) if math.isfinite(speed))
    if len(speeds) < 20:
        return "median of the steps"
    low, high = speeds[len(speeds) // 20], speeds[-1 - len(speeds) // 20]
    return f"90% of steps: {units.count(round(low))} to {units.count(round(high))}"


def _total_seconds(run: Run) -> float | None:
    """What the closing row says; without one, what the steps took."""
    closing = finite(run.end.get("seconds")) if run.end else None
    return _in_steps(run) if closing is None and run.num_steps else closing


def _in_steps(run: Run) -> float:
    return training_seconds(run, [math.inf])[0]


def _work_note(run: Run) -> str:
    last = int(run.column("step")[-1]) if run.num_steps else 0
    return f"{_plural(last, 'step')}, {_plural(len(run.epochs), 'epoch')}"


def _data_share(run: Run) -> float | None:
    seconds = total(run.column("seconds"))
    return total(run.column("data_s")) / seconds if seconds > 0 and "data_s" in run.steps else None


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _of_graph(value: Callable[[Any], float]) -> Callable[[Run], float | None]:
    return lambda run: value(run.graph) if run.graph else None


def _graph_note(text: Callable[[Any], str]) -> Callable[[Run], str]:
    return lambda run: text(run.graph) if run.graph else ""


def _batch(graph: Any) -> int:
    return max(1, graph.input_shape[0]) if graph.input_shape else 1


FIGURES = (
    Figure(
        label="Best test accuracy",
        value=_best_accuracy,
        text=units.percent,
        note=_best_note,
        better="higher",
    ),
    Figure(
        label="Final training loss",
        value=lambda run: _final(run, "loss", "train_loss"),
        text=units.number,
        note=_final_loss_note,
        better="lower",
    ),
    Figure(
        label="Images per second",
        value=lambda run: median(images_per_s(run)),
        text=lambda value: units.count(value if value is None or value < 100 else round(value)),
        note=_throughput_note,
        better="higher",
    ),
    Figure(
        label="Total time",
        value=_total_seconds,
        text=units.duration,
        note=_work_note,
    ),
    Figure(
        label="Waiting for data",
        value=_data_share,
        text=units.percent,
        note=lambda run: f"of {units.duration(_in_steps(run))} in steps",
        better="lower",
    ),
    Figure(
        label="Parameters",
        value=_of_graph(lambda graph: graph.num_parameters),
        text=units.count,
        note=_graph_note(lambda graph: f"{units.num_bytes(graph.memories()['W'])} with buffers"),
    ),
    Figure(
        label="MACs per image",
        value=_of_graph(lambda graph: graph.forward_macs / _batch(graph)),
        text=units.count,
        note=_graph_note(lambda graph: f"forward; backward {units.count(graph.backward_macs / _batch(graph))}"),
    ),
    Figure(
        label="Peak memory, predicted",
        value=_of_graph(lambda graph: graph.peak_bytes),
        text=units.num_bytes,
        note=_graph_note(lambda graph: f"at {graph.peak_at}"),
    ),
)
"""In the order of the page."""


def figures_of(run: Run) -> tuple[Figure, ...]:
    """Those that mean something for this run."""
    return tuple(figure for figure in FIGURES if figure.value is not _best_accuracy or not without_accuracy(run))
