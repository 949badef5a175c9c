"""Turns measured times of messages into the cost of a link: latency and bandwidth by segments of sizes.

Times of messages are noisy, and noise never helps: a larger message that came sooner than a smaller one shows that
the smaller one was late.  So times are first made to rise with size (the closest rising sequence, by pooling
adjacent violators; Barlow et al., "Statistical Inference under Order Restrictions", 1972).  Then straight lines are
laid through neighbouring sizes, each point weighted by 1/t, so that small and large messages count alike; every way
to cut the measured sizes into at most `MOST_SEGMENTS` runs is tried.  A further segment must lower the error by a
fair part.  Bandwidth rises from segment to segment, since what a message costs beyond its bytes is latency.
Engines switch protocols with size (eager, rendezvous), which is what the breaks are for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from windlass.errors import ConfigError
from windlass.plan.linkcost import LinkCost, Segment

MOST_SEGMENTS = 4
WORTH = 0.75
"""A further segment must bring the weighted error below this part of what it was."""
SLOWER = 1.1
"""A later segment's picoseconds a byte may exceed an earlier one's by this factor: what noise makes of equal ones."""
GOOD_ERROR = 1e-4
"""Mean of squared relative errors (1 %) below which no further segment is looked for."""

Point = tuple[int, float]
"""A size in bytes and seconds."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Seconds = alpha + beta n, and its weighted squared error over the points it was laid through."""

    alpha: float
    beta: float
    error: float


def fit_link(points: Sequence[Point], *, overhead_s: float = 0.0) -> LinkCost:
    """The cost of messages from times one way, overheads of both sides included.

    Args:
        points: (bytes, seconds), in any order; one for each size.
        overhead_s: what each side spends on a message; it is taken out of the latency.

    Raises:
        ConfigError: no points, or times that are not above 0.

    >>> cost = fit_link([(n, 1e-3 + n * 8e-8) for n in (1, 1000, 10_000, 100_000)])
    >>> cost.segments
    (Segment(from_bytes=0, alpha_ns=1000000, ps_per_byte=80000),)
    """
    if not points or any(seconds <= 0 or num_bytes < 0 for num_bytes, seconds in points):
        raise ConfigError("the cost of a link needs times above 0 for sizes of at least 0")
    rising = rise(sorted(points))
    cuts, lines = _best(rising)
    overhead_ns = min(round(overhead_s * 1e9), min(round(line.alpha * 1e9) for line in lines) // 2)
    segments = tuple(
        Segment(rising[cut][0] if cut else 0, round(line.alpha * 1e9) - 2 * overhead_ns, round(line.beta * 1e12))
        for cut, line in zip(cuts, lines, strict=True)
    )
    return LinkCost(segments, overhead_ns)


def rise(points: Sequence[Point]) -> list[Point]:
    """The closest times that never fall with size, each weighted by 1/t: geometric means of runs that fall.

    >>> [round(seconds, 3) for _, seconds in rise([(1, 1.0), (2, 4.0), (3, 1.0), (4, 5.0)])]
    [1.0, 2.0, 2.0, 5.0]
    """
    runs: list[tuple[float, int]] = []
    for _, seconds in points:
        mean, count = math.log(seconds), 1
        while runs and runs[-1][0] > mean:
            earlier, number = runs.pop()
            mean = (mean * count + earlier * number) / (count + number)
            count += number
        runs.append((mean, count))
    times = [math.exp(mean) for mean, count in runs for _ in range(count)]
    return [(num_bytes, seconds) for (num_bytes, _), seconds in zip(points, times, strict=True)]


def geometric_error(pairs: Iterable[tuple[float, float]]) -> float:
    """By what part predictions are off in the geometric mean: exp(mean |ln(predicted / measured)|) - 1.

    >>> round(geometric_error([(2.0, 1.0), (1.0, 2.0)]), 3)
    1.0
    """
    logs = [abs(math.log(predicted / measured)) for predicted, measured in pairs]
    return math.exp(sum(logs) / len(logs)) - 1 if logs else 0.0


def _best(points: Sequence[Point]) -> tuple[tuple[int, ...], list[_Line]]:
    """Where segments begin, and their lines."""
    best: tuple[tuple[int, ...], list[_Line]] = ((0,), [_line(points)])
    for number in range(2, MOST_SEGMENTS + 1):
        if _error(best[1]) < GOOD_ERROR * len(points):
            break
        found = _cut(points, number)
        if found is None or _error(found[1]) > WORTH * _error(best[1]):
            continue
        best = found
    return best


def _cut(points: Sequence[Point], number: int) -> tuple[tuple[int, ...], list[_Line]] | None:
    """The best way to cut into so many runs of at least two points, with bandwidth that rises."""
    found: tuple[tuple[int, ...], list[_Line]] | None = None
    for inner in itertools.combinations(range(2, len(points) - 1), number - 1):
        cuts = (0, *inner)
        ends = (*inner, len(points))
        if any(end - start < 2 for start, end in zip(cuts, ends, strict=True)):
            continue
        lines = [_line(points[start:end]) for start, end in zip(cuts, ends, strict=True)]
        falls = any(after.beta > SLOWER * before.beta for before, after in itertools.pairwise(lines))
        if not falls and (found is None or _error(lines) < _error(found[1])):
            found = (cuts, lines)
    return found


def _error(lines: Iterable[_Line]) -> float:
    return sum(line.error for line in lines)


def _line(points: Sequence[Point]) -> _Line:
    """Least squares of relative errors, with neither latency nor slope below 0."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
    mean_t = sum(w * t for w, (_, t) in zip(weights, points, strict=True)) / total
    spread = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
    both = sum(w * (n - mean_n) * (t - mean_t) for w, (n, t) in zip(weights, points, strict=True))
    beta = max(0.0, both / spread) if spread else 0.0
    alpha = mean_t - beta * mean_n
    if alpha < 0:
        alpha = 0.0
        square = sum(w * n * n for w, (n, _) in zip(weights, points, strict=True))
        beta = sum(w * n * t for w, (n, t) in zip(weights, points, strict=True)) / square
    error = sum((1 - (alpha + beta * n) / t) ** 2 for n, t in points)
    return _Line(alpha, beta, error)
