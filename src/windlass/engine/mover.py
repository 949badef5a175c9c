"""A thread that moves sums on while the main thread computes.

MPI moves messages only when it is called.  Between two hosts a sum takes as long as the backward pass of many layers,
in which nobody calls; this thread does, from the first sum of a step until the main thread waits for them itself.
Within a host sums take less time than a thread's turn, and need none.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE_S = 1e-3
"""Between two looks, which cost computing time: a link of 1 Gbit/s brings 125 KB meanwhile, which the sockets hold."""


class Mover:
    """Calls `move` again and again while it is on; never while the lock is held.

    Args:
        move: moves everything on by what can be done without waiting.

    Attributes:
        lock: whoever starts sums, tests them or waits for them holds it.
    """

    def __init__(self, move: Callable[[], None]) -> None:
        self.lock = threading.Lock()
        self._move = move
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """From now on."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="windlass-mover")
            self._thread.start()
        self._wanted.set()

    def end(self) -> None:
        """Until now; when it returns, `move` does not run."""
        self._wanted.clear()
        with self.lock:
            return

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            with self.lock:
                if self._wanted.is_set():
                    try:
                        self._move()
                    except Exception:  # the main thread meets it too, when it waits for what has failed
                        self._wanted.clear()
            time.sleep(PAUSE_S)
