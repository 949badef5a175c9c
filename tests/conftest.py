"""Fixtures of the tests that start whole runs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 120

collect_ignore = ["backend/programs", "parallel/programs"]
"""Programs of ranks, which import MPI; tests start them."""


@dataclass(frozen=True)
class Ended:
    """A finished command."""

    code: int
    out: str
    err: str


Windlass = Callable[..., Ended]


@pytest.fixture
def windlass(tmp_path: Path) -> Windlass:
    """Runs the command in a process of its own, in an empty folder."""

    def run(*arguments: str, cwd: Path = tmp_path, prefix: tuple[str, ...] = ()) -> Ended:
        command = [*prefix, sys.executable, "-m", "windlass", *arguments]
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=False
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the command and leaves it running; whatever still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "windlass", *arguments],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def environment() -> dict[str, str]:
    """This process's environment without what pytest or a launcher put there."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI", "PYTEST"))}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step rows of a run."""
    return [row for row in rows_of(folder) if row["kind"] == "step"]


def run(windlass: Windlass, folder: Path, *arguments: str) -> Path:
    """Runs a command that succeeds, with this folder for its results."""
    done = windlass(*arguments, "--out", str(folder))
    assert done.code == 0, done.err
    return folder


def losses_of(folder: Path) -> list[float]:
    """The loss of every step of a run, exactly as computed."""
    return [row["loss"] for row in steps_of(folder)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks below a launcher, in the order of their start."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().split(b"\0")
    family = {launcher}
    for _ in range(4):
        family |= {pid for pid, parent in parents.items() if parent in family}
    # mpiexec has the program among its own arguments too, but further on.
    return sorted(pid for pid in family if b"windlass.worker" in commands.get(pid, [])[:8])
