"""Times rivals in turns, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Action = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to measure.

    Attributes:
        min_rounds, max_rounds: turns of every rival.
        budget_s: no further round is begun after so many seconds.
        sample_s: a turn repeats a short action until it has taken about so long.
        hopeless: a rival this many times slower than the fastest drops out after its first turn; 0: none does.
    """

    min_rounds: int = 3
    max_rounds: int = 15
    budget_s: float = 0.3
    sample_s: float = 0.5e-3
    hopeless: float = 4.0


def interleave(
    rivals: Mapping[str, Action], *, effort: Effort, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every rival's turns; the first call of each is a warm-up and does not count.

    Rounds rotate their order, so that none always runs behind the same other.
    """
    repeats = {name: _repeats(action, effort.sample_s, clock) for name, action in rivals.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    running = list(rivals)
    began = clock()
    for number in range(effort.max_rounds):
        if number >= effort.min_rounds and clock() - began > effort.budget_s:
            break
        for name in _rotated(running, number):
            seconds[name].append(_turn(rivals[name], repeats[name], clock))
        if number == 0 and effort.hopeless:
            fastest = min(samples[0] for samples in seconds.values())
            running = [name for name in running if seconds[name][0] <= effort.hopeless * fastest]
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of every rival."""
    return {name: statistics.median(samples) for name, samples in seconds.items() if samples}


def _turn(action: Action, repeats: int, clock: Clock) -> float:
    started = clock()
    for _ in range(repeats):
        action()
    return (clock() - started) / repeats


def _repeats(action: Action, sample_s: float, clock: Clock) -> int:
    """Warms up (kernels are compiled in their first call), then tells how often one turn calls."""
    action()
    once = _turn(action, 1, clock)
    return max(1, min(1000, round(sample_s / max(once, 1e-7))))


def _rotated(names: list[str], number: int) -> list[str]:
    start = number % len(names) if names else 0
    return names[start:] + names[:start]
