"""How a rank of a benchmark begins: what it is to measure, its line to the launcher, and its watchdog."""

from __future__ import annotations

import argparse
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STALL_S = 600.0
"""A rank of a benchmark that has not moved for so long is lost."""


@dataclass(frozen=True)
class BenchRank:
    """A rank that has said hello.

    Attributes:
        spec: what is measured.
        rank, size: its number and how many there are.
        channel: its line to the launcher.
        stop: whether somebody asked it to stop.
        watchdog: told what is being done.
    """

    spec: dict[str, Any]
    rank: int
    size: int
    channel: Any
    stop: Any
    watchdog: Any

    def say(self, event: dict[str, Any]) -> None:
        """Rank 0's events are the launcher's; those of others are not wanted."""
        if self.rank == 0:
            self.channel.send({"kind": "event", "event": event})

    def give_up(self, reasons: list[Any]) -> bool:
        """Whether some rank was asked to stop; all must have the same reasons, and leave then."""
        if any(reasons):
            self.channel.send({"kind": "error", "code": 130, "message": "interrupted"})
        return any(reasons)


def enter(arguments: list[str] | None = None) -> BenchRank:
    """Reads ``--spec JSON --channel SOCKET --logs FOLDER``, sends output to the logs, and says hello."""
    from windlass.engine.channel import Channel
    from windlass.engine.watch import StopRequest, Watchdog
    from windlass.engine.world import world_from_environment
    from windlass.worker import redirect_output

    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", required=True)
    parser.add_argument("--channel", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    options = parser.parse_args(arguments)
    rank, size = world_from_environment() or (0, 1)
    redirect_output(options.logs / f"rank-{rank}.log")
    stop = StopRequest()
    channel = Channel(options.channel, on_stop=lambda reason: stop.ask(reason))
    channel.hello(rank=rank, host=socket.gethostname())
    watchdog = Watchdog(channel, stall_s=STALL_S, on_stall=lambda phase, idle_s: None)
    return BenchRank(json.loads(options.spec), rank, size, channel, stop, watchdog)
