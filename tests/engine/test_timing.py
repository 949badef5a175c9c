"""The parts of a step, on a clock that the test moves."""

import pytest

from windlass.engine import timing
from windlass.engine.timing import PARTS, StepTimer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_parts_add_up_to_the_step(clock: Clock) -> None:
    timer = StepTimer()
    for part, seconds in [("data", 1.0), ("forward", 2.0), ("data", 4.0)]:
        with timer.part(part):
            clock.now += seconds
    clock.now += 8.0
    row = timer.end()
    assert row == {
        "seconds": 15.0, "data_s": 5.0, "forward_s": 2.0, "backward_s": 0.0, "communication_s": 0.0, "update_s": 0.0,
        "other_s": 8.0,
    }  # fmt: skip
    assert sum(row.values()) == 2 * row["seconds"]


def test_a_new_step_forgets_the_old_one(clock: Clock) -> None:
    timer = StepTimer()
    with timer.part("update"):
        clock.now += 1
    timer.begin()
    clock.now += 2
    assert timer.end() == {"seconds": 2.0, **{f"{part}_s": 0.0 for part in PARTS}, "other_s": 2.0}


def test_a_part_that_fails_is_counted(clock: Clock) -> None:
    timer = StepTimer()
    with pytest.raises(ValueError, match="bad"), timer.part("backward"):
        clock.now += 3
        raise ValueError("bad")
    assert timer.end()["backward_s"] == 3.0


def test_an_unknown_part_is_a_mistake_of_ours() -> None:
    timer = StepTimer()
    with pytest.raises(KeyError), timer.part("coffee"):
        pass
