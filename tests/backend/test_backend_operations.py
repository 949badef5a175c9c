"""Every operation, on 1 to 4 ranks."""

import pytest
from ranks_of_mpi import must_run

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_operation_gives_what_its_definition_says(num_ranks: int) -> None:
    must_run("operations", num_ranks)
