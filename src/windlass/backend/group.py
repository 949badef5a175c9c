"""A group of ranks: who its members are, how its operations run, and what is said when they fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import Store

from windlass.backend.exchange import Exchange, Steps
from windlass.backend.failure import (
    Attendance,
    LostPeerError,
    Members,
    failed_ranks,
    is_lost,
    is_revoked,
    late_message,
)
from windlass.backend.options import Options
from windlass.backend.progress import Operation, Progress
from windlass.backend.work import Work
from windlass.backend.world import MpiWorld
from windlass.errors import ConfigError

DEATH_NEWS_S = 0.01
"""Seconds between two looks for a dead member."""
DEATH_NEWS_TRIES = 20
"""How often it is looked for: the news may come later than that of a revoked communicator."""


_Base: Any = dist.ProcessGroup  # PyTorch's stubs declare overloads that nobody calls


class Group(_Base):  # type: ignore[misc]
    """A group of ranks with a communicator of its own.

    Args:
        world: this process's MPI.
        ranks: the members, by their number in the job.
        store: shared by the members.
        timeout: after so long an operation that has not ended is an error.
        options: see `Options`.
        name: PyTorch's name of the group.
    """

    def __init__(
        self,
        world: MpiWorld,
        ranks: Sequence[int],
        *,
        store: Store,
        timeout: timedelta,
        options: Options,
        name: str,
    ) -> None:
        self._rank, self._size = list(ranks).index(world.rank), len(ranks)
        super().__init__(self._rank, self._size)
        self._members = Members(self._rank, list(ranks), [world.hosts[rank] for rank in ranks])
        self._attendance = Attendance(store, self._members)
        self._store = store
        self._timeout_s = timeout.total_seconds()
        self._name, self._description = name, "undefined"
        self._world = world
        self._comm = world.communicator(ranks, name)
        self._messages = self._comm.Dup()
        self._exchange = Exchange(self._comm, fixed_order=options.fixed_order)
        self._progress = Progress(
            threaded=world.threaded, explain=self._explain, late=self._late, note=self._note_waiting
        )
        self._open = True
        world.groups.add(self)

    # --- what the group is ----------------------------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802
        """PyTorch's question for the backend's name."""
        return "windlass"

    def rank(self) -> int:
        """This process's number in the group."""
        return self._rank

    def size(self) -> int:
        """How many members there are."""
        return self._size

    def name(self) -> str:
        """The backend's name."""
        return "windlass"

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """PyTorch's name of the group."""
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        """PyTorch's name of the group."""
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        """PyTorch's words about the group."""
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        """PyTorch's words about the group."""
        return self._description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)

    def set_timeout(self, timeout: timedelta) -> None:
        """After so long an operation that has not ended is an error."""
        self._timeout_s = timeout.total_seconds()

    def get_group_store(self) -> Store:
        """The store that the members share."""
        return self._store

    def _set_sequence_number_for_group(self) -> None:
        """Operations are numbered from the group's beginning."""

    @property
    def lost(self) -> bool:
        """Whether an operation failed in a way that ends the group."""
        return self._progress.lost is not None

    # --- running operations ---------------------------------------------------------------------------------

    def _run(
        self, name: str, steps: Steps, opts: Any, result: Sequence[Any], missing: Callable[[], set[int]] | None = None
    ) -> Work:
        self._check_open()
        number = self._progress.next_number()
        operation = Operation(name, steps, number=number, timeout_s=self._limit_s(opts), missing=missing)
        if getattr(opts, "asyncOp", True) and self._progress.threaded:
            self._progress.start(operation)
        else:
            self._progress.run_now(operation)
        return Work(operation, self._progress, result)

    def _limit_s(self, opts: Any) -> float:
        timeout = getattr(opts, "timeout", None)
        seconds = timeout.total_seconds() if timeout is not None else 0.0
        return seconds if seconds > 0 else self._timeout_s

    def _check_open(self) -> None:
        if not self._open:
            raise ConfigError(f"process group {self._name!r} has been destroyed")

    def _note_waiting(self, operation: Operation) -> None:
        self._attendance.note(operation.number, operation.name)

    def _late(self, operation: Operation, seconds: float) -> LostPeerError:
        """An operation's error when its time is over."""
        absent: dict[int, str] | None
        if operation.missing is not None:
            absent = dict.fromkeys(operation.missing(), "")
        else:
            absent = self._attendance.absent(operation.number)
        message = late_message(str(operation), seconds, self._members, absent)
        if seconds >= operation.timeout_s:
            self._revoke(message)
        return LostPeerError(message)

    def _revoke(self, reason: str) -> None:
        """Frees the ranks that wait: their operations end with an error, if MPI can do that."""
        if self._world.tolerant:
            self._attendance.note_reason(f"{self._members.name(self._rank)} gave up: {reason}")
            self._comm.Revoke()
            self._messages.Revoke()

    def _explain(self, operation: Operation, error: BaseException) -> BaseException:
        """An operation's error as its caller sees it."""
        if not isinstance(error, MPI.Exception):
            return error
        here = self._members.name(self._rank)
        if not (is_lost(error) or is_revoked(error)):
            return LostPeerError(f"{operation} on {here}: {error.Get_error_string()}")
        self._progress.lost = error  # no callback may start anything on this communicator
        dead = self._find_dead()
        if dead:
            reason = f"{self._members.names(dead)} died"
        else:
            reason = self._attendance.reason() or "another rank gave the group up"
        if is_lost(error):
            self._revoke(reason)
        explained = LostPeerError(f"{operation} on {here}: {reason}")
        self._progress.give_up(explained)
        return explained

    def _find_dead(self) -> list[int]:
        """The members that died."""
        for _ in range(DEATH_NEWS_TRIES):
            dead = failed_ranks(self._comm)
            if dead:
                return dead
            time.sleep(DEATH_NEWS_S)
        return []

    # --- the end --------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Stops the group's thread; what is under way stays as it is."""
        self._open = False
        self._progress.close(finish=False)

    def shutdown(self) -> None:
        """Ends what was asked for, stops the thread, and frees the communicators."""
        if not self._open:
            return
        self._progress.close(finish=True)
        self._open = False
        if self.lost:
            self._world.was_lost = True
        else:
            self._exchange.close()
            self._comm.Free()
            self._messages.Free()

    def abort(self) -> None:
        """Gives the group up: the ranks that wait for this one get an error, where MPI can do that."""
        if not self._open:
            return
        self._revoke("the group was aborted")
        self._progress.give_up(LostPeerError(f"process group {self._name!r} was aborted on this rank"))
        self.leave()
