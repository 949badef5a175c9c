"""Learning-rate schedules against formulas written here, step by step."""

import itertools
import math
from collections.abc import Callable

import pytest

from windlass.errors import ConfigError
from windlass.optim.rules import SCHEDULES, Schedule

BASE, STEPS, EPOCHS = 0.4, 8, 12

Formula = Callable[[int], float]


def stepwise(step: int) -> float:
    factor, completed = 1.0, 0
    while (completed + 1) * 5 * STEPS <= step:  # every_epochs = 5
        factor, completed = factor * 0.3, completed + 1
    return factor


def milestones(step: int) -> float:
    quarter = EPOCHS * STEPS // 4
    return [1.0, 0.3, 0.3**2, 0.3**3][min(step // quarter, 3)]


FORMULAS: dict[str, Formula] = {
    "constant": lambda step: 1.0,
    "step": stepwise,
    "exponential": lambda step: math.exp(math.log(0.3) * step / STEPS),
    "milestones": milestones,
    "cosine": lambda step: 0.1 + 0.9 * math.cos(math.pi * step / (EPOCHS * STEPS) / 2) ** 2,
    "linear": lambda step: 1.0 - 0.9 * step / (EPOCHS * STEPS),
}


def rates(schedule: Schedule) -> list[float]:
    return [schedule.rate(BASE, step=step, steps_per_epoch=STEPS, epochs=EPOCHS) for step in range(EPOCHS * STEPS + 1)]


# The formulas differ from the code's by a few roundings of numbers below 1, exp(log) by up to 12·1.2 ulps:
TOLERANCE = 32 * 2.0**-52


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_of_a_run_has_the_rate_of_the_formula(name: str) -> None:
    schedule = Schedule(name=name, factor=0.3, every_epochs=5, floor=0.1)
    for step, rate in enumerate(rates(schedule)):
        assert rate == pytest.approx(BASE * FORMULAS[name](step), rel=TOLERANCE * 12, abs=0), step


FIRST_AND_LAST = {
    "constant": 1.0,
    "step": 0.09,  # epochs 5 and 10
    "exponential": 0.3**12,
    "milestones": 0.027,
    "cosine": 0.1,
    "linear": 0.1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_begins_at_the_base_rate_and_ends_where_it_says(name: str) -> None:
    schedule = Schedule(name=name, factor=0.3, every_epochs=5, floor=0.1)
    found = rates(schedule)
    assert found[0] == BASE
    assert found[-1] == pytest.approx(BASE * FIRST_AND_LAST[name], rel=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_floor_holds_beyond_the_last_epoch(name: str) -> None:
    schedule = Schedule(name=name, floor=0.1)
    late = schedule.rate(BASE, step=10 * EPOCHS * STEPS, steps_per_epoch=STEPS, epochs=EPOCHS)
    assert late == pytest.approx(0.1 * BASE, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0.5, 2.0, 1 / 16])
def test_warm_up_rises_linearly_on_top_of_the_schedule(name: str, warmup_epochs: float) -> None:
    cold = rates(Schedule(name=name, factor=0.3, every_epochs=5))
    warm = rates(Schedule(name=name, factor=0.3, every_epochs=5, warmup_epochs=warmup_epochs))
    length = warmup_epochs * STEPS
    for step, (a, b) in enumerate(zip(cold, warm, strict=True)):
        expected = a * (step + 1) / length if step + 1 < length else a
        assert b == pytest.approx(expected, rel=1e-12), step
    assert warm[0] > 0


def test_krizhevskys_rate_ends_250_times_lower() -> None:
    schedule = Schedule(name="milestones", factor=250 ** (-1 / 3))
    assert rates(schedule)[-1] == pytest.approx(BASE / 250, rel=1e-12)


@pytest.mark.parametrize("key", ["warmup_epochs", "factor", "floor"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_negative_and_non_finite_numbers_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^schedule.{key}: needs a finite number of at least 0, got"):
        Schedule(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_step_needs_a_length(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.every_epochs: needs a number above 0, got"):
        Schedule(name="step", every_epochs=value)


def test_an_unknown_schedule_is_refused_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.name: unknown schedule 'cosin'; did you mean 'cosine'"):
        Schedule(name="cosin")
