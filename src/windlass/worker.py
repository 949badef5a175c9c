"""The program of one rank: ``python -m windlass.worker --job JSON --channel SOCKET --logs FOLDER``.

`engine.launch` starts it.  What it prints, and what PyTorch or MPI print when they crash, goes to a file of
its own in the logs folder, from which the launcher quotes a dead rank's last lines.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

from windlass.engine.channel import Channel
from windlass.engine.elastic import Crew
from windlass.engine.memory import ask_for_huge_pages, keep_freed_memory
from windlass.engine.watch import StopRequest, Watchdog
from windlass.engine.world import RankLost, join_world, world_from_environment
from windlass.errors import WindlassError
from windlass.job import Job


def main(arguments: list[str] | None = None) -> int:
    """Runs this rank of a job; 0 when it has said ``bye``, whatever the run's exit status was."""
    parser = argparse.ArgumentParser(prog="windlass.worker")
    parser.add_argument("--job", required=True)
    parser.add_argument("--channel", required=True)
    parser.add_argument("--logs", type=Path, required=True)
    options = parser.parse_args(arguments)
    job = Job.from_mapping(json.loads(options.job))
    rank, size = world_from_environment() or (0, 1)
    redirect_output(options.logs / f"rank-{rank}.log")
    ask_for_huge_pages()
    keep_freed_memory()
    stop = StopRequest()
    stop.install()
    crew = Crew(job.config.workers) if job.config.elastic.enabled and size > 1 else None
    channel = Channel(options.channel, on_stop=stop.ask, on_dead=crew.heard_of_death if crew else lambda message: None)
    world = crew.everyone if crew else join_world(size)
    survives = crew is not None and crew.survives
    channel.hello(rank=world.rank, host=world.host, survives=survives)
    name = f"rank {world.rank} on {world.host}"

    def on_stall(phase: str, idle_s: float) -> None:
        if not survives:  # else this rank dies and the others go on
            message = f"{name} has not moved for {idle_s:.0f} s in {phase}"
            channel.send({"kind": "error", "code": 6, "message": message})

    watchdog = Watchdog(channel, stall_s=job.config.stall_s, on_stall=on_stall, elastic=survives)

    def emit(event: dict[str, object]) -> None:
        if crew.leads if crew else world.rank == 0:
            channel.send({"kind": "event", "event": event})

    from windlass.session import run_rank  # PyTorch comes in here: signs of life come before it

    code = 0
    try:
        run_rank(job, world, emit=emit, stop=stop, note=watchdog.note, crew=crew)
    except WindlassError as error:
        code = error.exit_code
        if crew is not None and survives and isinstance(error, RankLost):
            crew.revoke()  # the others may still wait for this rank
        channel.send({"kind": "error", "code": code, "message": str(error)})
    except BaseException:
        channel.send({"kind": "error", "code": 1, "message": traceback.format_exc()})
        raise
    watchdog.close()
    channel.send({"kind": "bye", "code": code})
    return 0


def redirect_output(path: Path) -> None:
    """Sends everything this process prints, from Python or below it, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


if __name__ == "__main__":
    sys.exit(main())
