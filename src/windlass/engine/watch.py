"""What a rank watches while it trains: requests to stop, and whether it still makes progress."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from windlass.engine.channel import BEAT_S, Channel
from windlass.engine.elastic import STANDING_BY

WAITS = frozenset(
    (
        "the allreduce",
        "the evaluation's sum",
        "the checkpoint's end",
        "the recovery",
        "the end",
        STANDING_BY,
    )
)
"""Phases in which a rank waits for others: in an elastic run it is they who are given up first."""
STARTS = frozenset(("starting", "preparing", "waiting for rank 0, which measures"))
"""Phases before the first step, in which large libraries are loaded."""
START_S = 120.0
"""A rank may stand still so long before its first step, however short the stall limit."""
JOINING = "joining the others"
"""Between two deaths, when everyone moves: who stands still there has missed the second one."""
JOIN_S = 20.0
"""How long that may take."""
WAIT_FACTOR = 3
"""How many times the stall limit a rank of an elastic run waits for others."""


class StopRequest:
    """Set by a signal or by the launcher; the loop looks at it every step and agrees with the other ranks."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Asks for a stop after the current step; the first reason stands."""
        self.reason = self.reason or reason

    def install(self) -> None:
        """Takes SIGINT, SIGTERM and SIGUSR1 as requests to stop; a second SIGINT ends the process at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.reason is not None:
                os._exit(130)
            self.ask(signal.Signals(number).name)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, handle)


class Watchdog:
    """Sends signs of life, and ends the process when nothing has moved for too long.

    Args:
        channel: where the signs of life go.
        stall_s: seconds without `note` after which the process is given up, stacks dumped, exit status 6.
        on_stall: called with the phase just before the end.
        elastic: whether others go on without a rank that stands still, so that who waits for it has patience.
    """

    def __init__(
        self, channel: Channel, *, stall_s: float, on_stall: Callable[[str, float], None], elastic: bool = False
    ) -> None:
        self._channel = channel
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._elastic = elastic
        self._phase = "starting"
        self._step = 0
        self._moved = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="windlass-watchdog").start()

    def note(self, phase: str, step: int) -> None:
        """Says what is being done now; every call counts as progress."""
        started = self._phase in STARTS and phase not in STARTS
        self._phase, self._step, self._moved = phase, step, time.monotonic()
        if started:  # the launcher has less patience from now on, and must know at once
            self._channel.send({"kind": "beat", "phase": phase, "step": step, "idle_s": 0.0})

    def close(self) -> None:
        """No more signs of life."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(BEAT_S, self._stall_s / 4)):
            idle_s = time.monotonic() - self._moved
            self._channel.send({"kind": "beat", "phase": self._phase, "step": self._step, "idle_s": idle_s})
            if idle_s > self._patience_s():
                self._on_stall(f"{self._phase} of step {self._step}", idle_s)
                faulthandler.dump_traceback(file=sys.stderr)
                if self._elastic:  # a status of its own would have mpiexec end the others
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(6)

    def _patience_s(self) -> float:
        """How long the present phase may last."""
        if self._phase in STARTS:
            return max(START_S, self._stall_s)
        if self._elastic and self._phase in WAITS:
            return WAIT_FACTOR * self._stall_s
        return min(JOIN_S, self._stall_s) if self._phase == JOINING else self._stall_s
