"""Runs a program of `programs/` on ranks of this host."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from windlass.engine.launch import find_mpiexec, mpiexec_options

PROGRAMS = Path(__file__).parent / "programs"
_LAUNCHERS = ("OMPI_", "PMI", "PRTE", "PYTEST", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")


@dataclass(frozen=True)
class Ran:
    """How the ranks ended, and what they wrote."""

    code: int
    out: str
    err: str


def clean_environment() -> dict[str, str]:
    """This process's environment without any launcher's, one thread per rank, warnings as errors of our own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return kept | {"OMP_NUM_THREADS": "1"}


def run_ranks(
    program: str, num_ranks: int, *arguments: str, options: tuple[str, ...] = (), timeout_s: float = 170
) -> Ran:
    """Runs ``programs/PROGRAM.py`` and returns how it ended, whatever the status."""
    command = [find_mpiexec(), *mpiexec_options(num_ranks), *options]
    command += [sys.executable, str(PROGRAMS / f"{program}.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, env=clean_environment(), check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def must_run(program: str, num_ranks: int, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """The same for a program that must succeed: what it wrote."""
    ran = run_ranks(program, num_ranks, *arguments, options=options)
    assert ran.code == 0, ran.err[-4000:]
    return ran.out
