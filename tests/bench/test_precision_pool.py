"""Jobs in processes: done once each, and what ends them all."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from windlass.bench.precision_pool import Emit, run_jobs
from windlass.errors import WindlassError


def work(job: Any, emit: Emit) -> None:
    """In another process."""
    if job == "fails":
        raise ValueError("no such thing")
    if job == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    emit((job, os.getpid(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN))


def test_jobs_are_done_once_each_in_other_processes_that_leave_interrupts_alone() -> None:
    heard: list[Any] = []
    run_jobs(list(range(5)), work, num_processes=2, on_event=heard.append)
    assert sorted(job for job, *_ in heard) == [0, 1, 2, 3, 4]
    assert all(ignored for *_, ignored in heard)
    processes = {process for _, process, _ in heard}
    assert os.getpid() not in processes and len(processes) <= 2


@pytest.mark.parametrize(
    ("job", "message"), [("fails", "fails: ValueError: no such thing"), ("dies", "the process of dies died with")]
)
def test_a_job_that_fails_ends_all(job: str, message: str) -> None:
    with pytest.raises(WindlassError, match=message):
        run_jobs([0, job, 1], work, num_processes=1, on_event=lambda event: None)


def test_a_listener_that_stops_ends_all() -> None:
    heard: list[Any] = []

    def stop(event: Any) -> None:
        heard.append(event)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([0, 1, 2], work, num_processes=1, on_event=stop)
    assert len(heard) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(heard[0][1], 0)
