"""The tables of ``windlass bench conv``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from windlass.bench.conv import RIVALS, TORCH_LAST, ConvRow, geometric_means


def summary(rows: Sequence[ConvRow]) -> Iterator[str]:
    """A line for every convolution and direction: the rivals' times, the chooser's pick, its speed and accuracy."""
    rivals = [by for by in RIVALS if any(row.by == by for row in rows)]
    titles = ["case", "convolution", "direction", *(f"{by}, ms" for by in rivals), "fastest of Windlass's, ms"]
    titles += ["auto", "auto, ms (quartiles)", "GFLOP/s", "of peak", "error", "times PyTorch (quartiles)"]
    yield _line(titles)
    yield _line(["---"] * len(titles))
    for mine in _groups(rows):
        yield _line(_summary_cells(mine, rivals))
    yield from _mean_lines(rows)


def details(rows: Sequence[ConvRow]) -> Iterator[str]:
    """A line for everything that was measured."""
    titles = ["case", "convolution", "direction", "by", "ms (quartiles)", "turns", "GFLOP/s", "of peak", "error"]
    yield _line([*titles, "times PyTorch (quartiles)"])
    yield _line(["---"] * (len(titles) + 1))
    for row in rows:
        name = f"{row.by} (auto)" if row.is_auto else row.by
        head = [row.case, row.shape, row.direction, name, _spread_ms(row), str(row.turns)]
        yield _line([*head, *_speed(row), _times(row)])
    yield from _mean_lines(rows)


def _groups(rows: Sequence[ConvRow]) -> list[list[ConvRow]]:
    groups: dict[tuple[str, str], list[ConvRow]] = {}
    for row in rows:
        groups.setdefault((row.case, row.direction), []).append(row)
    return list(groups.values())


def _summary_cells(rows: list[ConvRow], rivals: Sequence[str]) -> list[str]:
    by = {row.by: row for row in rows}
    ours = [row for row in rows if row.by not in RIVALS]
    best = min(ours, key=lambda row: row.seconds, default=None)
    auto = next(row for row in rows if row.is_auto)
    return [
        auto.case,
        auto.shape,
        auto.direction,
        *(_ms(by[rival].seconds) if rival in by else "–" for rival in rivals),
        f"{_ms(best.seconds)} {best.by}" if best is not None else "–",
        "PyTorch's" if auto.by == TORCH_LAST else auto.by,
        _spread_ms(auto),
        *_speed(auto),
        _times(auto),
    ]


def _mean_lines(rows: Sequence[ConvRow]) -> Iterator[str]:
    means = geometric_means(rows)
    yield ""
    for direction in dict.fromkeys(row.direction for row in rows):
        others = {by: mean for (of, by), mean in means.items() if of == direction and by != "auto"}
        listed = ", ".join(f"{by} {mean:.2f}" for by, mean in sorted(others.items(), key=lambda item: -item[1]))
        auto = means[direction, "auto"]
        yield f"{direction}: auto {auto:.2f} times as fast as PyTorch (geometric mean; {listed})"


def _speed(row: ConvRow) -> list[str]:
    error = "–" if math.isnan(row.error) else f"{row.error:.1e}"
    return [f"{row.gflops:.0f}" if row.gflops >= 10 else f"{row.gflops:.1f}", f"{row.share:.0%}", error]


def _times(row: ConvRow) -> str:
    if row.baseline != TORCH_LAST:
        return f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f}), NCHW"
    return f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})"


def _spread_ms(row: ConvRow) -> str:
    return f"{_ms(row.seconds)} ({_ms(row.low_s)}–{_ms(row.high_s)})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
