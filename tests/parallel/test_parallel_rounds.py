"""Hand-over in rounds, with and without the variable batch, on real ranks; see programs/handover.py."""

from __future__ import annotations

import pytest
from ranks_of_placements import must_run

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_rounds_equal_a_loop_written_out(num_ranks: int) -> None:
    assert "all passed" in must_run("handover", num_ranks)
