"""DDP, FSDP2, ZeRO, tensor parallelism, checkpoints, hooks: what PyTorch builds on a group."""

import pytest
from ranks_of_mpi import must_run

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_pytorch_builds_on_a_group_works(num_ranks: int) -> None:
    out = must_run("training", num_ranks)
    assert out.count("\n") == 12 * num_ranks
