"""Errors that all ranks meet together: alone, and on ranks that are threads."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from numpy.typing import NDArray

from windlass.engine.agree import on_all, on_root
from windlass.engine.world import LocalWorld, Request, World
from windlass.errors import ConfigError, DataError, WindlassError


class ThreadWorld:
    """A rank that is a thread; values change hands over a shared list and a barrier."""

    host = "here"

    def __init__(self, rank: int, size: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = size
        self._values, self._barrier = values, barrier

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        raise NotImplementedError

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        return self.gather(value)[root]

    def barrier(self) -> None:
        self._barrier.wait()

    def abort(self, code: int) -> None:
        raise NotImplementedError


def on_ranks(size: int, program: Callable[[World], Any]) -> list[Any]:
    """What `program` returns on every rank, or the WindlassError that it raises there."""
    barrier, values, found = threading.Barrier(size, timeout=10), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = program(ThreadWorld(rank, size, values, barrier))
        except WindlassError as error:
            found[rank] = error  # type: ignore[call-overload]
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def fail_on(*ranks: int) -> Callable[[World], str]:
    def action(world: World) -> str:
        if world.rank in ranks:
            raise DataError(f"bad file on rank {world.rank}")
        return f"rank {world.rank}"

    return action


def everywhere(action: Callable[[World], str], world: World) -> str:
    return on_all(world, lambda: action(world))


SIZES = [1, 2, 3, 4]


@pytest.mark.parametrize("size", SIZES)
def test_on_root_runs_on_rank_0_alone_and_all_get_its_value(size: int) -> None:
    ran: list[int] = []

    def program(world: World) -> str:
        def action() -> str:
            ran.append(world.rank)
            return "value"

        return on_root(world, action)

    assert on_ranks(size, program) == ["value"] * size
    assert ran == [0]


@pytest.mark.parametrize("size", SIZES)
def test_on_root_raises_rank_0s_error_everywhere(size: int) -> None:
    found = on_ranks(size, lambda world: on_root(world, lambda: fail_on(0)(world)))
    assert [(type(error), str(error)) for error in found] == [(DataError, "bad file on rank 0")] * size


@pytest.mark.parametrize("size", SIZES)
def test_on_all_gives_every_rank_its_own_value(size: int) -> None:
    found = on_ranks(size, partial(everywhere, fail_on()))
    assert found == [f"rank {rank}" for rank in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_on_all_raises_the_first_failing_ranks_error_everywhere(size: int) -> None:
    for bad in range(size):
        for ranks in ([bad], list(range(bad, size))):
            action = fail_on(*ranks)
            found = on_ranks(size, partial(everywhere, action))
            assert [str(error) for error in found] == [f"bad file on rank {bad}"] * size


@pytest.mark.parametrize("value", [None, 0, False, []])
def test_a_value_that_is_false_is_a_value(value: Any) -> None:
    assert on_root(LocalWorld(), lambda: value) == value
    assert on_all(LocalWorld(), lambda: value) == value


def test_alone_an_error_is_raised_as_it_is() -> None:
    error = ConfigError("no")

    def action() -> None:
        raise error

    for together in (on_root, on_all):
        with pytest.raises(ConfigError) as caught:
            together(LocalWorld(), action)
        assert caught.value is error


def test_errors_of_ours_are_not_agreed_on() -> None:
    with pytest.raises(ZeroDivisionError):
        on_all(LocalWorld(), lambda: 1 // 0)
