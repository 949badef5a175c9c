"""Errors name the operation, this rank and the ranks that are missing; nobody waits for ever."""

import pytest
from ranks_of_mpi import run_ranks

pytestmark = pytest.mark.mpi


def lines_of(out: str, rank: int) -> list[str]:
    return [line.removeprefix(f"{rank}: ") for line in out.splitlines() if line.startswith(f"{rank}: ")]


def test_a_barrier_names_who_is_missing_and_the_group_is_lost_then() -> None:
    ran = run_ranks("faults", 3, "barrier")
    for rank in (0, 1):  # the first that ends may end the other
        for line in lines_of(ran.out, rank):
            assert line.startswith("LostPeerError barrier (operation 0 of the group): rank ")
            assert " has waited 0.5 s for rank 2 on " in line and line.endswith(
                "which did not come before the timeout ended"
            )
    assert len(lines_of(ran.out, 0)) + len(lines_of(ran.out, 1)) >= 2
    assert ran.code == 6


def test_every_operation_ends_after_the_groups_timeout_and_errors_reach_ddp() -> None:
    ran = run_ranks("faults", 2, "future")
    backward, future = [line for line in lines_of(ran.out, 0) if line.startswith("RuntimeError")]
    for line in (backward, future):
        assert "LostPeerError: allreduce" in line and "has waited 1.0 s for rank 1 on " in line


def test_a_wait_that_gives_up_leaves_the_operation_as_it_is() -> None:
    ran = run_ranks("faults", 2, "short_wait")
    assert ran.code == 0, ran.err
    first, total = lines_of(ran.out, 0)
    assert "has waited 0.2 s" in first and total == "2.0"


def test_a_gather_knows_by_name_who_has_not_sent() -> None:
    (line,) = lines_of(run_ranks("faults", 3, "gather").out, 0)
    assert "gather (operation 0 of the group): rank 0 on " in line
    assert "has waited 1.0 s for rank 1 on " in line and "rank 2" not in line


def test_an_uncaught_exception_ends_the_job() -> None:
    ran = run_ranks("faults", 2, "uncaught")
    assert ran.code == 1
    assert "[rank1]: ValueError: a bug of the program" in ran.err


def test_what_cannot_be_exchanged_is_refused() -> None:
    ran = run_ranks("faults", 2, "refused")
    assert ran.code == 0, ran.err
    sparse, device, bits, sizes, splits, destroyed = lines_of(ran.out, 0)
    assert "dense tensors, got layout torch.sparse_coo" in sparse
    assert 'for CUDA tensors start a group with the backend "nccl"' in device
    assert "the bitwise and of torch.float32 has no meaning" in bits
    assert "2 parts of 4 x torch.float32 do not make the whole of 5 x torch.float32" in sizes
    assert "the output needs 2 splits of 3 rows in all, got [1]" in splits
    assert "has been destroyed" in destroyed


def test_with_fault_tolerance_the_others_hear_who_died_and_go_on() -> None:
    ran = run_ranks("faults", 3, "killed", options=("--with-ft", "ulfm"))
    for rank in (0, 2):
        first, second, total = lines_of(ran.out, rank)
        assert first == second and first.startswith("LostPeerError allreduce (operation 0 of the group) on rank ")
        assert "rank 1 on " in first and first.endswith("died")
        assert total == "survivors' sum 2.0"
