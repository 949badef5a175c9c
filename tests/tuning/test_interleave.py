"""Turns, with a clock that counts what rivals say they take."""

from collections.abc import Callable

import pytest

from windlass.tuning.timing import Effort, interleave, medians


class Clock:
    """Moves only when a rival works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def rival(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes these seconds one after the other, then the last again and again."""
        left = list(seconds)

        def work() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return work


def test_all_have_as_many_turns_and_the_first_call_does_not_count() -> None:
    clock = Clock()
    rivals = {"a": clock.rival("a", 7.0, 1.0), "b": clock.rival("b", 5.0, 2.0)}
    effort = Effort(min_rounds=5, max_rounds=5, budget_s=1e9)
    assert interleave(rivals, effort=effort, clock=clock) == {"a": [1.0] * 5, "b": [2.0] * 5}


def test_the_order_rotates() -> None:
    clock = Clock()
    rivals = {name: clock.rival(name, 1.0) for name in "abc"}
    interleave(rivals, effort=Effort(min_rounds=3, max_rounds=3), clock=clock)
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab"


def test_short_actions_are_repeated_within_a_turn() -> None:
    clock = Clock()
    effort = Effort(min_rounds=2, max_rounds=2, sample_s=1e-3)
    found = interleave({"a": clock.rival("a", 1e-4), "b": clock.rival("b", 2.0)}, effort=effort, clock=clock)
    assert clock.calls.count("a") == 1 + 2 * 10
    assert clock.calls.count("b") == 1, "hopeless: its first call is its only turn"
    assert found["a"] == pytest.approx([1e-4, 1e-4])


def test_the_hopeless_drop_out_but_keep_their_one_turn() -> None:
    clock = Clock()
    rivals = {"fast": clock.rival("fast", 1.0), "slow": clock.rival("slow", 3.9), "lost": clock.rival("lost", 4.1)}
    found = interleave(rivals, effort=Effort(min_rounds=3, max_rounds=3, budget_s=1e9, hopeless=4.0), clock=clock)
    assert {name: len(seconds) for name, seconds in found.items()} == {"fast": 3, "slow": 3, "lost": 1}
    found = interleave(rivals, effort=Effort(min_rounds=3, max_rounds=3, budget_s=1e9, hopeless=0), clock=clock)
    assert {name: len(seconds) for name, seconds in found.items()} == {"fast": 3, "slow": 3, "lost": 3}


def test_the_budget_ends_it_after_the_least_rounds() -> None:
    for seconds, rounds in ((1.0, 3), (0.1, 10), (0.001, 15)):
        clock = Clock()
        effort = Effort(min_rounds=3, max_rounds=15, budget_s=0.95)
        assert len(interleave({"a": clock.rival("a", seconds)}, effort=effort, clock=clock)["a"]) == rounds


def test_scattered_samples_are_measured_on_until_they_agree() -> None:
    clock = Clock()
    effort = Effort(min_rounds=3, max_rounds=50, budget_s=2.5, patience_s=100.0)
    burst = clock.rival("a", 1.0, 1.0, 4.0, 4.0, 4.0, *[1.0] * 40)
    found = interleave({"a": burst}, effort=effort, clock=clock)["a"]
    assert medians({"a": found}) == {"a": 1.0}
    assert len(found) == 13, "when the quiet ones reach to the upper quartile"


def test_patience_ends() -> None:
    clock = Clock()
    effort = Effort(min_rounds=3, max_rounds=50, budget_s=2.5, patience_s=20.0)
    found = interleave({"a": clock.rival("a", *[1.0, 4.0] * 30)}, effort=effort, clock=clock)["a"]
    assert 20.0 / 4 < len(found) < 20.0


def test_medians_are_of_those_that_ran() -> None:
    assert medians({"a": [3.0, 1.0, 2.0], "b": [4.0], "c": []}) == {"a": 2.0, "b": 4.0}
