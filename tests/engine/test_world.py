"""One rank alone, and how a process learns that it is one of several."""

import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from windlass.engine.allreduce import Allreduce
from windlass.engine.world import LocalWorld, join_world, sum_array, sum_over, world_from_environment
from windlass.plan.levers import LEVERS


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("OMPI_", "PMI_", "PMIX_", "SLURM_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_the_sum_over_one_rank_is_a_copy(shape: tuple[int, ...], dtype: str) -> None:
    send: NDArray[Any] = np.asarray(np.random.default_rng(0).integers(-9, 9, shape), dtype)
    total = sum_array(LocalWorld(), send)
    assert total is not send and not np.shares_memory(total, send)
    assert total.dtype == send.dtype and np.array_equal(total, send)


def test_a_sum_into_the_same_memory_changes_nothing() -> None:
    buffer = np.arange(5.0)
    request = LocalWorld().start_sum(buffer, buffer)
    assert request.test() is True
    request.wait()
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_numbers_are_summed_in_double_precision() -> None:
    values = [1 + 2.0**-40, True, 3]
    assert sum_over(LocalWorld(), values) == [1 + 2.0**-40, 1.0, 3.0]


def test_alone_there_is_nobody_else() -> None:
    world = join_world(1)
    assert isinstance(world, LocalWorld)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    value = object()
    assert world.gather(value) == [value] and world.broadcast(value) is value
    world.barrier()


def test_no_launcher_no_rank() -> None:
    assert world_from_environment() is None


STARTED = [
    {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
    {"PMI_RANK": "3", "PMI_SIZE": "4"},
    {"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "4"},
    {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "9", "PMI_RANK": "9", "PMI_SIZE": "9"},
]


@pytest.mark.parametrize("variables", STARTED)
def test_a_launcher_says_which_rank_this_is(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == (3, 4)


def test_half_of_what_a_launcher_says_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert world_from_environment() is None


def test_every_allreduce_of_the_plan_sums() -> None:
    for value in LEVERS["allreduce"].values:
        send, receive = np.arange(3.0), np.zeros(3)
        Allreduce(LocalWorld(), str(value)).start(send, receive).wait()
        assert receive.tolist() == [0.0, 1.0, 2.0]
