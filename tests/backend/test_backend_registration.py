"""The backend is there whichever of PyTorch and Windlass comes first, and says how ranks are started."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks_of_mpi import clean_environment, must_run

FIRST = {
    "torch": "import torch, windlass",
    "windlass": "import sys, windlass; assert 'torch' not in sys.modules; import torch",
}


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment() | variables,
        check=False,
    )


@pytest.mark.parametrize("imports", FIRST.values(), ids=FIRST)
def test_either_may_be_imported_first(imports: str) -> None:
    done = python(
        f"{imports}; import torch.distributed as d; d.Backend._plugins['WINDLASS']; assert d.Backend.WINDLASS"
    )
    assert done.returncode == 0, done.stderr


def test_without_mpi_one_error_says_how_to_start() -> None:
    """As under torchrun, which sets these."""
    program = "import torch.distributed as d, windlass; d.init_process_group('windlass', store=d.HashStore())"
    done = python(program.replace("())", "(), rank=0, world_size=2)"))
    assert "needs its 2 processes to be ranks of MPI: start them with `windlass launch -n 2 script.py`" in done.stderr
    done = python("import torch.distributed as d, windlass; d.init_process_group('windlass')")
    assert "RANK expected, but not set" in done.stderr and "windlass launch -n N" in done.stderr


@pytest.mark.mpi
def test_mpiexec_needs_no_variables_and_a_group_can_be_made_again() -> None:
    out = must_run("start", 2)
    assert sorted(out.split()) == ["0/2:0", "1/2:1"]


@pytest.mark.mpi
def test_windlass_launch_starts_ranks_and_gives_their_status(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, windlass, torch.distributed as d\n"
        "d.init_process_group('windlass')\n"
        "sys.stdout.write(f'{d.get_rank()}{sys.argv[1:]}{torch.get_num_threads()}\\n')\n"
        "d.barrier()\n"
        "sys.exit(3 if d.get_rank() else 0)\n"
    )
    command = [sys.executable, "-m", "windlass", "launch", "-n", "2", "--threads", "1", str(program), "-n", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False)
    assert sorted(done.stdout.split("\n")[:2]) == ["0['-n', 'x']1", "1['-n', 'x']1"]
    assert done.returncode == 3
