from __future__ import annotations

import math
import random
import re

import pytest

from windlass.report.curves import (
    NUM_POINTS,
    SIDE,
    Shape,
    buckets,
    chart,
    linear_axis,
    log_axis,
    noise,
    smoothed,
    thinned,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1, 2.3), (-3, 8), (0, 0), (5, 5), (1e-9, 2e-9), (0, 1e6), (0, 3.2e10)]
)
def test_a_linear_axis_holds_its_values_between_evenly_spaced_ticks(low: float, high: float) -> None:
    axis = linear_axis("y", low, high)
    slack = 1e-9 * (axis.high - axis.low)
    assert axis.low - slack <= low <= high <= axis.high + slack
    assert axis.low < axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    gaps = [b[0] - a[0] for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert max(gaps) - min(gaps) < 1e-5


@pytest.mark.parametrize(("low", "high"), [(0.03, 2.3), (1e-6, 1e4), (1, 1), (0.2, 0.5)])
def test_a_log_axis_holds_its_values(low: float, high: float) -> None:
    axis = log_axis("y", low, high)
    assert axis.low <= low * (1 + 1e-9)
    assert high <= axis.high * (1 + 1e-9)
    assert 2 <= len(axis.ticks) <= 12
    assert axis.place(axis.low) == 0
    assert axis.place(axis.high) == pytest.approx(1)
    assert math.isnan(axis.place(0.0))


@pytest.mark.parametrize(("num_rows", "limit"), [(0, 4), (1, 4), (4, 4), (5, 4), (1001, 400)])
def test_buckets_take_every_row_once_in_order(num_rows: int, limit: int) -> None:
    spans = buckets(num_rows, limit)
    assert [i for span in spans for i in span] == list(range(num_rows))
    assert len(spans) == min(num_rows, limit)


def test_an_envelope_loses_no_spike() -> None:
    rng = random.Random(3)
    y = [rng.gauss(0, 1) for _ in range(20_000)]
    y[777], y[12_345] = 50.0, -40.0
    shape = noise(range(len(y)), y, color="c1")
    assert shape.low is not None
    assert len(shape.y) <= NUM_POINTS
    assert max(shape.y) == 50
    assert min(shape.low) == -40
    assert all(low <= high for low, high in zip(shape.low, shape.y, strict=True))


def test_a_thinned_line_keeps_its_ends_and_extremes() -> None:
    y = [math.sin(i / 900) for i in range(9_000)]
    y[4321] = 7.0
    shape = thinned(range(len(y)), y, color="c1", label="y")
    assert len(shape.x) <= NUM_POINTS + 2
    assert (shape.x[0], shape.x[-1]) == (0, 8_999)
    assert max(shape.y) == 7
    assert list(shape.x) == sorted(shape.x)


def test_smoothing_keeps_a_constant_and_steps_over_what_is_not_finite() -> None:
    y = [2.0] * 5 + [math.nan] + [2.0] * 5
    shape = smoothed(range(11), y, color="c1", label="y")
    assert [value for value in shape.y if math.isfinite(value)] == pytest.approx([2.0] * 10)
    assert math.isnan(shape.y[5])


def test_a_path_goes_through_its_points_and_breaks_at_nan() -> None:
    shape = Shape(color="c1", x=[0, 5, 10, 10, 10], y=[0, 1, math.nan, 0.5, 1], label="y")
    drawn = chart("T", [shape], x_label="x", y_label="y", log=False)
    assert drawn is not None
    assert drawn.path(shape) == f"M0 {SIDE}L{SIDE // 2} 0M{SIDE} {SIDE // 2}L{SIDE} 0"


def test_a_lonely_point_is_a_dot() -> None:
    shape = Shape(color="c1", x=[3], y=[3], label="y")
    drawn = chart("T", [shape], x_label="x", y_label="y")
    assert drawn is not None
    assert re.fullmatch(r"M\d+ \d+h0", drawn.path(shape))


def test_an_area_closes_along_its_lower_edge() -> None:
    shape = Shape(color="c1", x=[0, 10], y=[1, 1], low=[0, 0.5], style="area")
    drawn = chart("T", [shape], x_label="x", y_label="y", y_low=0, y_high=1)
    assert drawn is not None
    assert drawn.path(shape) == f"M0 0L{SIDE} 0L{SIDE} {SIDE // 2}L0 {SIDE}Z"


def test_a_wide_range_is_logarithmic_and_says_so() -> None:
    def drawn_to(least: float) -> bool:
        drawn = chart("T", [Shape(color="c1", x=[1, 2], y=[1, least])], x_label="x", y_label="loss")
        assert drawn is not None
        assert drawn.y.log == ("log scale" in drawn.y.label)
        return drawn.y.log

    assert [drawn_to(least) for least in (0.5, 0.01, 0.0, -1.0)] == [False, True, False, False]


def test_nothing_to_show_makes_no_chart() -> None:
    nothing = [Shape(color="c1", x=[], y=[]), Shape(color="c1", x=[1, 2], y=[math.nan, math.inf])]
    assert chart("T", nothing, x_label="x", y_label="y") is None


def test_crowded_marks_keep_their_lines_and_lose_their_words() -> None:
    shape = Shape(color="c1", x=[0, 100], y=[0, 1])
    marks = [(float(at), "resumed") for at in (10, 12, 14, 60, 200)]
    drawn = chart("T", [shape], x_label="x", y_label="y", marks=marks)
    assert drawn is not None
    assert [mark.text for mark in drawn.marks] == ["resumed", "", "", "resumed"]
