"""Independent jobs on all cores: some processes, each a fresh interpreter that does one job after the other.

A child tells what happens over its pipe; the parent hands it the next job when one is done.  Children leave interrupts
to the parent, which ends them: Ctrl-C reaches all processes of a terminal.  A child whose parent is gone meets the end
of its pipe and leaves.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

from windlass.errors import WindlassError

Emit = Callable[[Any], None]
Work = Callable[[Any, Emit], None]
"""Does a job and tells what happens; a function of a module, so that another process finds it by name."""


def run_jobs(jobs: Sequence[Any], work: Work, *, num_processes: int, on_event: Callable[[Any], None]) -> None:
    """Does all jobs; returns when the last is done.

    Args:
        jobs: picklable, begun in this order.
        work: what is done with each.
        num_processes: at most so many at once.
        on_event: told, in this process, whatever `work` tells.

    Raises:
        WindlassError: a job failed or a process died; the others are ended.
    """
    waiting = list(jobs)[::-1]
    children: dict[Connection, BaseProcess] = {}
    doing: dict[Connection, Any] = {}
    try:
        with _interrupts_ignored():  # which a child inherits before it can say so itself
            for _ in range(min(num_processes, len(waiting))):
                end, process = _start(work)
                children[end] = process
        for end in children:
            doing[end] = waiting.pop()
            end.send(doing[end])
        while doing:
            for ready in wait(list(doing)):
                end = cast(Connection, ready)
                kind, what = _hear(end, doing[end], children[end])
                if kind == "event":
                    on_event(what)
                elif waiting:
                    doing[end] = waiting.pop()
                    end.send(doing[end])
                else:
                    del doing[end]
    finally:
        for end, process in children.items():
            process.terminate()
            process.join()
            end.close()


def _start(work: Work) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _hear(end: Connection, job: Any, process: BaseProcess) -> tuple[str, Any]:
    try:
        kind, what = end.recv()
    except EOFError:
        process.join()
        raise WindlassError(f"the process of {job} died with status {process.exitcode}") from None
    if kind == "failed":
        raise WindlassError(f"{job}: {what}")
    return kind, what


def _serve(end: Connection, work: Work) -> None:
    """A child: does what comes until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, BrokenPipeError):
        while True:
            job = end.recv()
            try:
                work(job, lambda event: end.send(("event", event)))
            except BrokenPipeError:
                raise
            except Exception as error:
                end.send(("failed", f"{type(error).__name__}: {error}"))
            else:
                end.send(("done", None))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
