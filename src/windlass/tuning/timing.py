"""Times rivals in turns, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Action = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        min_rounds, max_rounds: turns of every rival.
        budget_s: no further round is begun after so many seconds, if samples agree.
        scatter: they agree if half of a rival's lie within this share of their median.
        patience_s: while they do not, rounds go on for so many seconds: other load passes.
        sample_s: a turn repeats a short action until it has taken about so long.
        hopeless: a rival this many times slower than the fastest, in a first call, has no further turn; 0: all have.
    """

    min_rounds: int = 3
    max_rounds: int = 15
    budget_s: float = 0.3
    scatter: float = 0.1
    patience_s: float = 3.0
    sample_s: float = 0.5e-3
    hopeless: float = 4.0


def interleave(
    rivals: Mapping[str, Action], *, effort: Effort, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every rival's turns; what is compiled in a first call must have been called before.

    One more call of each tells how often a turn repeats it, and whether it is hopeless: then that call is its only
    turn, as some are thousands of times slower.  Rounds rotate their order, so that none always runs behind the
    same other.
    """
    once = {name: _turn(action, 1, clock) for name, action in rivals.items()}
    limit = effort.hopeless * min(once.values()) if effort.hopeless else math.inf
    running = [name for name in rivals if once[name] <= limit]
    seconds: dict[str, list[float]] = {name: [] if name in running else [once[name]] for name in rivals}
    repeats = {name: max(1, min(1000, round(effort.sample_s / max(once[name], 1e-7)))) for name in running}
    began = clock()
    for number in range(effort.max_rounds):
        if number >= effort.min_rounds and clock() - began > _allowed_s(seconds.values(), effort):
            break
        for name in _rotated(running, number):
            seconds[name].append(_turn(rivals[name], repeats[name], clock))
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every rival."""
    return {name: statistics.median(samples) for name, samples in seconds.items() if samples}


def _allowed_s(samples: Iterable[list[float]], effort: Effort) -> float:
    agree = all(_spread(some) <= effort.scatter for some in samples)
    return effort.budget_s if agree else max(effort.budget_s, effort.patience_s)


def _spread(samples: list[float]) -> float:
    """The width of the middle half, as a share of the median; 0 for fewer than two."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


def _turn(action: Action, repeats: int, clock: Clock) -> float:
    started = clock()
    for _ in range(repeats):
        action()
    return (clock() - started) / repeats


def _rotated(names: list[str], number: int) -> list[str]:
    start = number % len(names) if names else 0
    return names[start:] + names[:start]
