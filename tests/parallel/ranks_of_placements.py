"""Runs a program of `programs/` on ranks of this host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from windlass.engine.launch import find_mpiexec, mpiexec_options

PROGRAMS = Path(__file__).parent / "programs"
SHARED = Path(__file__).parents[1] / "backend" / "programs"
"""Where `leave` is."""
_LAUNCHERS = ("OMPI_", "PMI", "PRTE", "PYTEST", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


def must_run(program: str, num_ranks: int, *arguments: str, timeout_s: float = 170) -> str:
    """Runs ``programs/PROGRAM.py``, which must succeed; what it wrote."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(SHARED), str(PROGRAMS)))}
    command = [find_mpiexec(), *mpiexec_options(num_ranks), sys.executable]
    command += [str(PROGRAMS / f"{program}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
