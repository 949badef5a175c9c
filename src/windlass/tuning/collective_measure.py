"""Times messages and ways to sum a buffer over real ranks.

Ways to sum are rivals: in turns, all ranks together, the slowest rank counts.  Messages are those of the engine, a
ping-pong written as a schedule: their times have in them what driving them from Python costs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from windlass.engine.collectives import wait_politely
from windlass.engine.schedule_run import ScheduleRun, Scratch
from windlass.kernels.collective.combine import combine
from windlass.plan.collective import Receive, Send, Step

if TYPE_CHECKING:
    from mpi4py import MPI

Action = Callable[[], object]

TURN_S = 3e-3
"""A turn repeats a short operation until it has taken about so long."""
TRIED = 5
"""Calls of a trial turn, and trial turns; the fastest says how long a call takes."""
HOPELESS = 20.0
"""Who is so many times slower than the fastest has one turn only..."""
HOPELESS_S = 0.1
"""... if a call takes longer than this: first calls of short operations say little."""
MAX_REPEATS = 5000
MESSAGE_TURNS = 9
"""Ping-pongs are measured so often; the median counts."""
MESSAGES_S = 1.0
"""Fewer turns are taken when they would take longer; three at least."""
MESSAGE_TAG = 1
POLITE_SPINS = 20


def time_turns(
    comm: MPI.Intracomm, rivals: Mapping[str, Action], *, turns: int, spins: int | None = None, lead_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds per call of every rival's turns: of each turn the slowest rank's; equal on all ranks.  Collective.

    Each is called twice beforehand; how often a turn repeats it is found by trying.  Ranks that outnumber the
    cores wait for a common begin with few `spins`; None: they never sleep there.  Out of a barrier ranks come one or
    two latencies apart; those that share a clock begin by it, `lead_s` seconds after they have agreed.
    """
    first = {}
    for name, action in rivals.items():
        _slowest(comm, action, 1, spins, lead_s)
        first[name] = _slowest(comm, action, 1, spins, lead_s)
    slowest = max(HOPELESS * min(first.values()), HOPELESS_S)
    running = [name for name in rivals if first[name] <= slowest]
    least = {name: _least(comm, rivals[name], first[name], spins, lead_s) for name in running}
    seconds = {name: [] if name in running else [first[name]] for name in rivals}
    order = random.Random(0)  # the same on all ranks; by rotation everybody would follow the same rival for ever
    for _ in range(turns):
        for name in order.sample(running, len(running)):
            took = _slowest(comm, rivals[name], _repeats(least[name]), spins, lead_s)
            seconds[name].append(took)
            least[name] = min(least[name], took)  # a trial that was disturbed would make all its turns too short
    return seconds


def _least(comm: MPI.Intracomm, action: Action, once: float, spins: int | None, lead_s: float) -> float:
    """Seconds per call, roughly; one call alone is mostly the ranks' coming together."""
    if once > 10 * TURN_S:
        return once
    return min(_slowest(comm, action, TRIED, spins, lead_s) for _ in range(TRIED))


def _repeats(seconds: float) -> int:
    """How often a turn repeats what takes so long."""
    return max(1, min(MAX_REPEATS, round(TURN_S / max(seconds, 1e-7))))


def time_messages(
    comm: MPI.Intracomm, pairs: Sequence[tuple[int, int]], num_bytes: int, *, num_messages: int = 1,
    segment_bytes: int = 0, spins: int = POLITE_SPINS,
) -> float:  # fmt: skip
    """Seconds from one rank's call to the other's return, for messages of a size.  Collective.

    Args:
        comm: all ranks; those in no pair wait.
        pairs: ranks that play ping-pong at the same time; no rank is in two.  The median of the pairs' times counts.
        num_bytes: of each message.
        num_messages: sent in one step, and then as many back.
        segment_bytes: longer messages travel in segments, as `plan.pick.Pick` says.
        spins: tests before a waiting rank sleeps.
    """
    partners = dict(pairs) | {second: first for first, second in pairs}
    rank = comm.Get_rank()
    parts = [np.zeros(num_bytes, dtype=np.uint8) for _ in range(num_messages)]
    play = _PingPong(comm, partners.get(rank), parts, segment_bytes=segment_bytes, spins=spins)
    starts = rank in dict(pairs)
    play.seconds(starts, 1)
    once = max(_gathered(comm, play.seconds(starts, 1), spins))
    rounds = max(1, min(20, round(TURN_S / max(once, 1e-7))))
    turns = max(3, min(MESSAGE_TURNS, round(MESSAGES_S / (2 * once * rounds))))
    mine = statistics.median(play.seconds(starts, rounds) for _ in range(turns))
    # who is asked to reply has done so before the reply has arrived: the other's times count
    return statistics.median(seconds for seconds in _gathered(comm, mine, spins) if seconds > 0)


class _PingPong:
    """One rank's part; with no partner it only waits."""

    def __init__(
        self, comm: MPI.Intracomm, partner: int | None, parts: list[NDArray[np.uint8]], *, segment_bytes: int,
        spins: int,
    ) -> None:  # fmt: skip
        self._comm, self._partner, self._parts = comm, partner, parts
        self._segment_bytes, self._spins = segment_bytes, spins
        self._scratch = Scratch()

    def seconds(self, starts: bool, rounds: int) -> float:
        """One way, on the rank that starts; elsewhere 0."""
        _barrier(self._comm, self._spins)
        if self._partner is None:
            return 0.0
        chunks = [range(number, number + 1) for number in range(len(self._parts))]
        away: Step = tuple(Send(self._partner, chunk) for chunk in chunks)
        back: Step = tuple(Receive(self._partner, chunk) for chunk in chunks)
        steps = [away, back] * rounds if starts else [back, away] * rounds
        run = ScheduleRun(
            self._comm, steps, lambda chunks: [self._parts[chunk] for chunk in chunks],
            dtype="uint8", op="sum", tag=MESSAGE_TAG, segment_bytes=self._segment_bytes, scratch=self._scratch,
        )  # fmt: skip
        started = time.perf_counter()
        wait_politely(run.test, spins=self._spins)
        return (time.perf_counter() - started) / (2 * rounds) if starts else 0.0


def time_adding(comm: MPI.Intracomm, num_bytes: int, *, spins: int | None = None) -> float:
    """Seconds to add so many bytes of float32 to as many, while all ranks do.  Collective."""
    target, source = np.zeros(num_bytes // 4, dtype=np.float32), np.ones(num_bytes // 4, dtype=np.float32)
    adding = {"add": lambda: combine(target, source, dtype="float32", op="sum")}
    return statistics.median(time_turns(comm, adding, turns=MESSAGE_TURNS, spins=spins)["add"])


def _slowest(comm: MPI.Intracomm, action: Action, repeats: int, spins: int | None, lead_s: float) -> float:
    """Seconds per call at the slowest rank; all begin together."""
    _barrier(comm, spins)
    if lead_s:
        begin = max(_gathered(comm, time.perf_counter(), spins)) + lead_s
        time.sleep(max(0.0, begin - time.perf_counter()))
    # Out of a barrier ranks come apart, out of the operation itself together.  After a rival whose ranks sleep the
    # scheduler needs milliseconds to spread them over the cores again: a turn is settled by another, not timed.
    for _ in range(max(1, repeats)):
        action()
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    seconds = (time.perf_counter() - started) / repeats
    return max(_gathered(comm, seconds, spins))


def _barrier(comm: MPI.Intracomm, spins: int | None) -> None:
    request = comm.Ibarrier()
    if spins is not None:
        wait_politely(request.Test, spins=spins)
        return
    while not request.Test():
        time.sleep(0)


def _gathered(comm: MPI.Intracomm, value: float, spins: int | None) -> list[float]:
    _barrier(comm, spins)  # polite: the gathering itself does not have to wait
    return comm.allgather(value)
