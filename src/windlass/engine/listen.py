"""Runs a program of many ranks and listens to what they say: a JSON object on a line of its own is an event.

For short programs that measure, wherever their ranks are: ``mpiexec`` carries the lines, over any network.  Training
runs go through `engine.launch`, which also watches over every rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from windlass.errors import WindlassError

Event = dict[str, Any]
LAST_LINES = 20
"""How many of the last lines of a program that failed are shown."""


class RanksFailed(WindlassError):  # noqa: N818 - what happened to them
    """A program of many ranks ended with an error; the message has its last lines."""


def run_and_listen(
    command: Sequence[str], *, on_event: Callable[[Event], None], limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Runs `command` to its end and hands on every event; no process of its group outlives this call.

    Args:
        command: an ``mpiexec``, say.
        on_event: called with every event as it comes; what it raises ends the program.
        limit_s: the program is ended after so many seconds.
        environment: beside that of this process.

    Raises:
        RanksFailed: it ended with another status than 0.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}), start_new_session=True, text=True,
        errors="replace",
    )  # fmt: skip
    watchdog = threading.Timer(limit_s, _end, [process])
    watchdog.start()
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                on_event(json.loads(line))
            else:
                said.append(line.rstrip())
        if process.wait() != 0:
            raise RanksFailed("\n  ".join(["the ranks ended with an error:", *said[-LAST_LINES:]]))
    finally:
        watchdog.cancel()
        _end(process)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def tell(event: Event) -> None:
    """Says an event, in a rank."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
