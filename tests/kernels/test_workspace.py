"""Memory that stays: who has it, and for how long."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from windlass.kernels import workspace
from windlass.kernels.workspace import ALIGNMENT, free_scratch, lasting, scratch


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    free_scratch()
    yield
    free_scratch()


def test_scratch_is_given_again_and_lasting_arrays_are_not() -> None:
    first, second = scratch(100, 7)
    assert scratch(100)[0].ctypes.data == first.ctypes.data
    assert second.size == 7
    one, two = lasting(100), lasting(100)
    assert one.size == two.size == 100
    one[...], two[...] = 1, 2
    scratch(100)[0][...] = 3
    assert (one == 1).all()
    assert (two == 2).all()


@pytest.mark.parametrize("size", [1, 17, 1000])
def test_all_are_aligned(size: int) -> None:
    for array in (*scratch(size, size), lasting(size)):
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.dtype == np.float32


def test_the_next_of_a_size_gets_the_memory_of_one_that_is_gone() -> None:
    tensor = torch.from_numpy(lasting(1000))
    address, view = tensor.data_ptr(), tensor[10:]
    del tensor
    assert lasting(1000).ctypes.data != address  # the view of it lives
    del view
    assert lasting(999).ctypes.data != address
    assert address in {each.ctypes.data for each in (lasting(1000), lasting(1000))}


def test_no_more_idles_than_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "LARGEST_IDLE", 3 * 4 * (1000 + 16))
    arrays = [lasting(1000) for _ in range(5)]
    arrays.clear()
    assert sum(len(blocks) for blocks in workspace._idle.values()) == 3
