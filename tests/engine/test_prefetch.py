"""Fetching ahead: order, errors, ends."""

import threading
from collections.abc import Iterator
from typing import TypeVar

import pytest

from windlass.engine.prefetch import prefetch

T = TypeVar("T")
RANGES = [range(0), range(1), range(2), range(7), range(3, 20), range(10, 0, -3)]


@pytest.mark.parametrize("steps", RANGES)
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 2, 3, 7, 50])
def test_every_step_is_fetched_once_and_in_order(steps: range, num_threads: int, ahead: int) -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        return step * step

    assert list(prefetch(fetch, steps, num_threads=num_threads, ahead=ahead)) == [step * step for step in steps]
    assert sorted(fetched) == sorted(steps)


def test_a_later_batch_that_is_done_first_waits_for_its_turn() -> None:
    second_done = threading.Event()

    def fetch(step: int) -> int:
        if step == 0:
            assert second_done.wait(10)
        if step == 1:
            second_done.set()
        return step

    assert list(prefetch(fetch, range(4), num_threads=2, ahead=2)) == [0, 1, 2, 3]


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_no_more_than_so_many_are_under_way(ahead: int) -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        return step

    for taken, step in enumerate(prefetch(fetch, range(12), num_threads=1, ahead=ahead), start=1):
        assert step == taken - 1
        assert max(fetched) < taken + ahead


def test_with_nothing_ahead_each_is_fetched_when_asked_for_by_the_caller() -> None:
    fetched: list[tuple[int, threading.Thread]] = []

    def fetch(step: int) -> int:
        fetched.append((step, threading.current_thread()))
        return step

    batches = prefetch(fetch, range(5), num_threads=3, ahead=0)
    assert fetched == []
    assert (next(batches), next(batches)) == (0, 1)
    assert fetched == [(step, threading.current_thread()) for step in (0, 1)]


@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
@pytest.mark.parametrize("bad", [0, 2, 5])
def test_an_error_is_raised_where_its_batch_is_due(ahead: int, bad: int) -> None:
    def fetch(step: int) -> int:
        if step == bad:
            raise ValueError(f"image {step}")
        return step

    batches = prefetch(fetch, range(6), num_threads=2, ahead=ahead)
    assert [next(batches) for _ in range(bad)] == list(range(bad))
    with pytest.raises(ValueError, match=f"^image {bad}$"):
        next(batches)
    assert list(batches) == []


def test_closing_early_neither_waits_for_what_is_under_way_nor_starts_more() -> None:
    release, begun = threading.Event(), threading.Event()
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        if step == 1:
            begun.set()
            assert release.wait(30)
        return step

    batches: Iterator[int] = prefetch(fetch, range(100), num_threads=1, ahead=5)
    assert next(batches) == 0
    assert begun.wait(10)
    batches.close()  # type: ignore[attr-defined]  # would hang here
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("windlass-data"):
            thread.join(10)
            assert not thread.is_alive()
    assert fetched == [0, 1]
