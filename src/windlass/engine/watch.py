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
    """

    def __init__(self, channel: Channel, *, stall_s: float, on_stall: Callable[[str, float], None]) -> None:
        self._channel = channel
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._phase = "starting"
        self._step = 0
        self._moved = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="windlass-watchdog").start()

    def note(self, phase: str, step: int) -> None:
        """Says what is being done now; every call counts as progress."""
        self._phase, self._step, self._moved = phase, step, time.monotonic()

    def close(self) -> None:
        """No more signs of life."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(BEAT_S, self._stall_s / 4)):
            idle_s = time.monotonic() - self._moved
            self._channel.send({"kind": "beat", "phase": self._phase, "step": self._step, "idle_s": idle_s})
            if idle_s > self._stall_s:
                self._on_stall(f"{self._phase} of step {self._step}", idle_s)
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(6)
