"""What the chooser chose for a whole network: a table for a person, a mapping for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from windlass.tuning.cost import Machine
from windlass.tuning.results import ConvCase, DirectionTuning, LayerTuning, Settings

TITLES = (
    "layer",
    "convolution",
    "direction",
    "algorithm",
    "ms",
    "predicted",
    "PyTorch",
    "predicted",
    "speed-up",
    "why",
)
"""The table's columns; the two times marked *predicted* are the cost model's."""
LEFT = frozenset({0, 1, 2, 3, 9})
"""Columns of words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionPlan:
    """The convolutions of one network with their algorithms.

    Attributes:
        layers: one row for each, in the order in which they run; those left alone say why.
        settings: how they were chosen.
        machine: the peaks that the predictions rest on; None where nothing was predicted.
        advice: what would help and is the user's to decide.
    """

    layers: tuple[LayerTuning, ...]
    settings: Settings = field(default_factory=Settings)
    machine: Machine | None = None
    advice: tuple[str, ...] = ()

    def seconds(self, *, torch: bool = False) -> float:
        """Seconds of all convolutions in one step, as chosen or by PyTorch alone."""
        return sum(layer.seconds(torch=torch) for layer in self.layers)

    @property
    def num_changed(self) -> int:
        """Layers with another algorithm than PyTorch's in some direction."""
        return sum(str(layer.choice) != "torch" for layer in self.layers)

    def summary(self) -> str:
        """One line: how many change and what is won."""
        known = "measured" if self.settings.tune == "measure" else "predicted"
        line = f"{self.num_changed} of {len(self.layers)} convolutions by another algorithm than PyTorch's"
        if not self.num_changed:
            return line
        ours, torchs = self.seconds(), self.seconds(torch=True)
        return f"{line}: {1e3 * ours:.1f} ms a step where PyTorch's take {1e3 * torchs:.1f} ms, {known}"

    def __str__(self) -> str:
        """The table, its sums and the advice."""
        rows = [row for layer in self.layers for row in _rows(layer)]
        return "\n".join([*table(TITLES, rows, left=LEFT), self.summary(), *self.advice])

    def to_mapping(self) -> dict[str, object]:
        """For JSON: seconds of everything predicted and measured."""
        machine = self.machine
        return {
            "tune": self.settings.tune,
            "accuracy": self.settings.accuracy,
            "workspace_mb": self.settings.workspace_mb,
            "threads": machine.threads if machine else None,
            "peak_flops": machine.peak_flops if machine else None,
            "bytes_per_s": machine.bytes_per_s if machine else None,
            "seconds": self.seconds(),
            "torch_seconds": self.seconds(torch=True),
            "advice": list(self.advice),
            "layers": [layer.to_mapping() for layer in self.layers],
        }


def _rows(layer: LayerTuning) -> list[tuple[str, ...]]:
    what = ", ".join(_calls(layer.cases))
    if not layer.directions:
        return [(layer.name, what, "", "torch", "", "", "", "", "", layer.reason)]
    rows = []
    for number, row in enumerate(layer.directions):
        head = (layer.name, what) if number == 0 else ("", "")
        rows.append((*head, row.direction, _algorithm(layer, row), *_figures(row), row.reason))
    return rows


def _calls(cases: Sequence[ConvCase]) -> list[str]:
    counts: dict[str, int] = {}
    for case in cases:
        counts[str(case.shape)] = counts.get(str(case.shape), 0) + 1
    return [text if count == 1 else f"{count} times {text}" for text, count in counts.items()]


def _algorithm(layer: LayerTuning, row: DirectionTuning) -> str:
    fused = layer.activation and row.direction == "forward"
    return f"{row.algorithm} + {layer.activation}" if fused else row.algorithm


def _figures(row: DirectionTuning) -> tuple[str, ...]:
    """Milliseconds as measured and predicted, of the choice and of PyTorch's, and the speed-up."""
    known = row.seconds
    ours, torchs = known.get(row.algorithm), known.get("torch")
    speedup = f"{torchs / ours:.2f}" if ours and torchs else ""
    return (
        _ms(row.measured.get(row.algorithm)),
        _ms(row.predicted.get(row.algorithm)),
        _ms(row.measured.get("torch")),
        _ms(row.predicted.get("torch")),
        speedup,
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: frozenset[int]) -> list[str]:
    r"""Lines of aligned columns, words to the left and numbers to the right, a rule under the titles.

    >>> print("\n".join(table(("name", "n"), [("a", "10"), ("bcdef", "2")], left=frozenset({0}))))
    name    n
    -----  --
    a      10
    bcdef   2
    """
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    lines = [titles, ["-" * width for width in widths], *rows]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
