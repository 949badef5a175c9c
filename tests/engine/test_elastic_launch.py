"""The launcher of an elastic run, with ranks that the test itself speaks for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launch_by_hand import Driven

from windlass.engine import launch
from windlass.engine.elastic import STANDING_BY
from windlass.engine.launch import Outcome, fault_options
from windlass.engine.world import RankLost, losses_named, named_loss


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driven]:
    monkeypatch.chdir(tmp_path)
    launcher = Driven(tmp_path, num_ranks=3)
    for rank in range(3):
        launcher.say(rank, kind="hello", rank=rank, host="here", pid=0, survives=True)
        launcher.say(rank, kind="beat", phase="backward", step=7, idle_s=0)
    yield launcher
    launcher.close()


def die(ranks: Driven, rank: int) -> None:
    ranks.lines[rank].shutdown(socket.SHUT_RDWR)


def heard(ranks: Driven, rank: int) -> list[dict[str, Any]]:
    ranks.lines[rank].settimeout(10)
    return [json.loads(line) for line in ranks.lines[rank].recv(4096).splitlines()]


def test_the_others_hear_who_died_and_go_on(ranks: Driven) -> None:
    ranks.watcher.start()
    die(ranks, 1)
    for rank in (0, 2):
        (message,) = heard(ranks, rank)
        assert message["kind"] == "dead" and message["rank"] == 1 and message["at"] > 0
    for rank in (0, 2):
        ranks.say(rank, kind="bye", code=0)
    ranks.wait_for(lambda: sum(rank.code is not None for rank in ranks._ranks) == 2)
    assert ranks.end(0) == Outcome(0, "done")
    assert ranks.losses == ["rank 1 on here (pid 0)"]


def test_a_death_of_the_last_that_trains_ends_the_run(ranks: Driven) -> None:
    ranks.say(2, kind="beat", phase=STANDING_BY, step=0, idle_s=0)
    ranks.watcher.start()
    ranks.wait_for(lambda: any(rank.phase == STANDING_BY for rank in ranks._ranks))
    die(ranks, 0)
    ranks.wait_for(lambda: ranks.losses)
    die(ranks, 1)
    ranks.watcher.join(10)
    outcome = ranks._outcome(0, ranks.folder)
    assert outcome.code == 6
    assert outcome.message.startswith("rank 1 on here (pid 0) died, last seen in backward of step 7")


def test_a_spare_that_waits_does_not_hold_the_end(ranks: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "BYE_GRACE_S", 0.2)
    ranks.say(2, kind="beat", phase=STANDING_BY, step=0, idle_s=0)
    for rank in (0, 1):
        ranks.say(rank, kind="bye", code=0)
    ranks.watcher.start()
    ranks.watcher.join(10)
    assert not ranks.watcher.is_alive()
    assert ranks._outcome(0, ranks.folder) == Outcome(0, "done")


def test_a_silent_rank_is_killed_and_the_others_hear_since_when(ranks: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        ranks.say(1, kind="hello", rank=1, host="here", pid=process.pid, survives=True)
        ranks.wait_for(lambda: True)
        monkeypatch.setattr(ranks, "_stall_s", 1.0)
        killed: list[int] = []

        def kill(pid: int) -> None:
            if pid == process.pid:  # never 0, which would be this test's own group
                killed.append(pid)
                os.kill(pid, signal.SIGKILL)

        monkeypatch.setattr(launch, "_kill", kill)
        ranks.watcher.start()
        for _ in range(300):
            for rank in (0, 2):
                ranks.say(rank, kind="beat", phase="the allreduce", step=7, idle_s=0)
            if killed:
                break
            ranks.watcher.join(0.05)
        assert process.wait(10) == -signal.SIGKILL
    assert heard(ranks, 0)[0]["rank"] == 1


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("mpiexec (Open MPI) 5.0.11", ("--with-ft", "ulfm")),
        ("mpirun (Open MPI) 4.1.2", ()),
        ("HYDRA build details:\n    Version: 4.2.0", ()),
        ("", ()),
    ],
)
def test_fault_tolerance_is_asked_for_where_mpiexec_knows_it(
    monkeypatch: pytest.MonkeyPatch, version: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(launch, "find_mpiexec", lambda: "mpiexec")
    done = subprocess.CompletedProcess(["mpiexec"], 0, stdout=version, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: done)
    assert fault_options() == expected


def test_an_error_that_is_none_of_mpi_passes_as_it_is() -> None:
    error = ValueError("mine")
    assert named_loss(error, "an allreduce") is error
    loss = RankLost("gone")
    assert named_loss(loss, "an allreduce") is loss
    with pytest.raises(ValueError, match="mine"), losses_named("an allreduce"):
        raise error
