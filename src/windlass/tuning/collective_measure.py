"""Times ways to sum a buffer over real ranks: in turns, all ranks together, the slowest rank counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

Action = Callable[[], object]

TURN_S = 3e-3
"""A turn repeats a short operation until it has taken about so long."""
HOPELESS = 20.0
"""Who is so many times slower than the fastest has one turn only."""
MAX_REPEATS = 200


def time_turns(comm: MPI.Intracomm, rivals: Mapping[str, Action], *, turns: int) -> dict[str, list[float]]:
    """Seconds per call of every rival's turns: of each turn the slowest rank's; equal on all ranks.  Collective.

    Each is called twice beforehand; the second call says how often a turn repeats it.
    """
    first = {}
    for name, action in rivals.items():
        _slowest(comm, action, 1)
        first[name] = _slowest(comm, action, 1)
    fastest = min(first.values())
    running = [name for name in rivals if first[name] <= HOPELESS * fastest]
    repeats = {name: max(1, min(MAX_REPEATS, round(TURN_S / max(first[name], 1e-7)))) for name in running}
    seconds = {name: [] if name in running else [first[name]] for name in rivals}
    for turn in range(turns):
        start = turn % len(running)
        for name in running[start:] + running[:start]:
            seconds[name].append(_slowest(comm, rivals[name], repeats[name]))
    return seconds


def _slowest(comm: MPI.Intracomm, action: Action, repeats: int) -> float:
    """Seconds per call at the slowest rank; all begin together."""
    _barrier(comm)
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    seconds = (time.perf_counter() - started) / repeats
    return max(_gathered(comm, seconds))


def _barrier(comm: MPI.Intracomm) -> None:
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0)


def _gathered(comm: MPI.Intracomm, value: float) -> list[float]:
    _barrier(comm)  # polite: the gathering itself does not have to wait
    return comm.allgather(value)
