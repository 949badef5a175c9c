"""The engine on 1, 2, 3 and 4 real ranks; what they check stands in ranks_collectives.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from windlass.engine.launch import find_mpiexec, mpiexec_options

PROGRAM = Path(__file__).with_name("ranks_collectives.py")


@pytest.mark.mpi
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_on_real_ranks(num_ranks: int) -> None:
    command = [find_mpiexec(), *mpiexec_options(num_ranks), sys.executable, "-m", "mpi4py", str(PROGRAM)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "all passed" in done.stdout
