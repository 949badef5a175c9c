"""MPI as a process group sees it: started once in a process, with the hosts of all ranks.

A process that fails must not leave the others waiting: MPI would wait in ``MPI_Finalize``, which Python calls as it
ends, for ranks that wait for this one.  So an uncaught exception, or an end with a lost group, aborts the job.
Under User-Level Failure Mitigation only this process ends, and the others are told that it is gone.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
import weakref
import zlib
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType
from typing import Protocol

from mpi4py import MPI

from windlass.errors import LostRankError

_FAULT_VARIABLE = "OMPI_MCA_mpi_ft_enable"
"""What ``mpiexec --with-ft ulfm`` sets for the ranks."""


class Closable(Protocol):
    """A group that is closed before MPI is."""

    @property
    def lost(self) -> bool:
        """Whether it ended with an error."""

    def leave(self) -> None:
        """Stops its thread."""


class MpiWorld:
    """All ranks of the job.

    Attributes:
        rank, size: this rank's number and how many there are.
        hosts: every rank's host.
        threaded: whether MPI may be called from several threads.
        tolerant: whether the job outlives the death of a rank (``mpiexec --with-ft ulfm``).
        was_lost: whether a group that is no more ended with an error.
    """

    def __init__(self) -> None:
        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.hosts: list[str] = self._comm.allgather(MPI.Get_processor_name())
        self.threaded = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self.tolerant = os.environ.get(_FAULT_VARIABLE, "").lower() in ("1", "true", "yes")
        self.groups: weakref.WeakSet[Closable] = weakref.WeakSet()
        self.was_lost = False
        self._process = os.getpid()
        sys.excepthook = _Hook(self, sys.excepthook)
        atexit.register(self._leave)

    def communicator(self, ranks: Sequence[int], name: str) -> MPI.Comm:
        """A communicator of its own for these ranks; only they call this."""
        members = self._comm.Get_group().Incl(list(ranks))
        if self.tolerant:  # a communicator with a dead member makes no others
            return MPI.Intracomm.Create_from_group(members, name, errhandler=MPI.ERRORS_RETURN)
        if list(ranks) == list(range(self.size)):
            return self._comm.Dup()
        tag = zlib.crc32(name.encode()) & 0x7FFF  # groups made at the same time do not meet each other's messages
        return self._comm.Create_group(members, tag)

    def end(self, code: int) -> None:
        """Ends this process now, and with it the job, unless the job outlives its ranks."""
        sys.stdout.flush()
        sys.stderr.flush()
        if not self.tolerant:
            self._comm.Abort(code)
        elif code:
            os.kill(os.getpid(), signal.SIGKILL)  # Open MPI tells the others of no other end
        os._exit(code)

    def is_own(self) -> bool:
        """Whether this is the process that started MPI, not a fork of it."""
        return os.getpid() == self._process and not MPI.Is_finalized()

    def _leave(self) -> None:
        if not self.is_own():
            return
        for group in list(self.groups):
            group.leave()
        if self.was_lost or any(group.lost for group in self.groups):
            self.end(0 if self.tolerant else LostRankError.exit_code)


class _Hook:
    """Says what went wrong on which rank, and ends the process."""

    def __init__(self, world: MpiWorld, before: object) -> None:
        self._world = world
        self._before = before

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = "".join(traceback.format_exception(kind, error, trace)).rstrip().splitlines()
        text = "".join(f"[rank{self._world.rank}]: {line}\n" for line in lines)
        stream = sys.__stderr__  # PyTorch's own hook, which calls this one, holds sys.stderr back
        if stream is not None:
            stream.write(text)
            stream.flush()
        if self._world.is_own():
            self._world.end(1)


@lru_cache(maxsize=1)
def mpi_world() -> MpiWorld:
    """The world of this process; the first call on a rank waits for the others."""
    return MpiWorld()
