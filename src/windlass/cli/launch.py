"""``windlass launch``: a program of one's own on several ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from windlass.engine.launch import find_mpiexec, mpiexec_options, threads_per_rank
from windlass.errors import ConfigError

PROGRAM_HELP = "The program, script.py or -m package.module, and its arguments."
FAULTS_HELP = "Let the other ranks live when one dies: they are told, and their program must know what to do (ULFM)."
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""What stands behind the program is the program's own."""


def launch_command(
    context: typer.Context,
    num_ranks: Annotated[int, typer.Option("-n", "--ranks", help="How many processes.")],
    threads: Annotated[int, typer.Option(help="Threads of each; 0: OMP_NUM_THREADS, or a share of the cores.")] = 0,
    with_ft: Annotated[bool, typer.Option("--with-ft", help=FAULTS_HELP)] = False,
) -> None:
    """Start a program on several ranks of this host, for torch.distributed.init_process_group("windlass")."""
    if num_ranks < 1:
        raise ConfigError(f"-n: needs a number of at least 1, got {num_ranks}")
    if threads < 0:
        raise ConfigError(f"--threads: needs a number of at least 0, got {threads}")
    command = launch_argv(num_ranks, list(context.args), with_ft=with_ft)
    raise typer.Exit(_run(command, os.environ | thread_variables(num_ranks, threads)))


def launch_argv(num_ranks: int, program: list[str], *, with_ft: bool) -> list[str]:
    """The command line that starts `program` on so many ranks."""
    if not program:
        raise ConfigError("nothing to launch: name a program, e.g. windlass launch -n 2 train.py")
    if program[0] == "-m":
        if len(program) < 2:
            raise ConfigError("-m: needs a module, e.g. windlass launch -n 2 -m package.train")
    elif not Path(program[0]).is_file():
        raise ConfigError(f"there is no file {program[0]}")
    options = [*mpiexec_options(num_ranks), *(["--with-ft", "ulfm"] if with_ft else [])]
    # mpi4py.run ends all ranks when one raises, which is not what --with-ft is for.
    python = [sys.executable, *([] if with_ft else ["-m", "mpi4py"])]
    return [find_mpiexec(), *options, *python, *program]


def thread_variables(num_ranks: int, threads: int) -> dict[str, str]:
    """The environment of a rank: its threads, and output as it comes."""
    count = threads or int(os.environ.get("OMP_NUM_THREADS") or threads_per_rank(num_ranks))
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "PYTHONUNBUFFERED": "1"}


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs mpiexec to its end, passing signals on; its exit status, as a shell would give it."""
    # In a session of its own: Ctrl-C would reach mpiexec twice, which then kills the ranks at once.
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
