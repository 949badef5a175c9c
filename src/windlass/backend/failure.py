"""What is said when ranks do not come: who is missing, where, and in which operation.

A rank that has waited for a while notes in the group's store which operation it waits in.  When the time is over,
whoever has left no such note for this operation or a later one is missing.  So operations that go well cost
nothing, and the note needs no help from the rank that does not answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from mpi4py import MPI
from torch._C._distributed_c10d import Store

from windlass.errors import LostRankError

ANSWER_S = 2.0
"""Seconds that the store has for its answers: its server may be the rank that died."""

_LOST = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING)


class LostPeerError(LostRankError, dist.DistBackendError):
    """An operation that cannot end, because a rank died or has not come in time."""


@dataclass(frozen=True)
class Members:
    """The ranks of a group: this one's number, and for each its number in the job and its host."""

    rank: int
    global_ranks: Sequence[int]
    hosts: Sequence[str]

    def name(self, rank: int) -> str:
        """A member for a person, by its number in the job."""
        return f"rank {self.global_ranks[rank]} on {self.hosts[rank]}"

    def names(self, ranks: Iterable[int]) -> str:
        """Several members for a person."""
        return ", ".join(self.name(rank) for rank in sorted(ranks))


class Attendance:
    """Notes in a group's store about who waits where.

    Args:
        store: shared by the group's ranks.
        members: the group's ranks.
    """

    def __init__(self, store: Store, members: Members) -> None:
        self._store = store
        self._members = members

    def note(self, number: int, name: str) -> None:
        """Says that this rank waits in operation `number`; a store that is gone is no reason to fail."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"waits/{self._members.rank}", f"{number} {name}")

    def note_reason(self, reason: str) -> None:
        """Says why this rank has given the group up."""
        with contextlib.suppress(RuntimeError):
            self._store.set("reason", reason)

    def reason(self) -> str:
        """Why a rank has given the group up, if one said so."""
        return self._ask(["reason"]).get("reason", "")

    def absent(self, number: int) -> dict[int, str] | None:
        """The ranks that wait in no operation as late as `number`, and where they wait; None: no answer."""
        others = [rank for rank in range(len(self._members.hosts)) if rank != self._members.rank]
        keys = {rank: f"waits/{rank}" for rank in others}
        notes = self._ask(list(keys.values()))
        if "" in notes:
            return None
        found = {rank: notes.get(key, "-1 ") for rank, key in keys.items()}
        return {rank: note.split(" ", 1)[1] for rank, note in found.items() if int(note.split(" ", 1)[0]) < number}

    def _ask(self, keys: list[str]) -> dict[str, str]:
        """What the store holds of these keys; a key of no name says that it did not answer."""
        answers: dict[str, str] = {}

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                found = {key: self._store.get(key).decode() for key in keys if self._store.check([key])}
                answers.update(found | {"answered": ""})

        asking = threading.Thread(target=ask, daemon=True, name="windlass-store")
        asking.start()
        asking.join(ANSWER_S)
        return dict(answers) if answers.pop("answered", None) is not None else {"": ""}


def late_message(what: str, seconds: float, members: Members, absent: dict[int, str] | None) -> str:
    """What is said when an operation's time is over."""
    waited = f"{what}: {members.name(members.rank)} has waited {seconds:.1f} s"
    if absent is None:
        return f"{waited}; who is missing is unknown, since the store of rank 0 does not answer"
    if not absent:
        return f"{waited}; all ranks came, but the exchange did not end"
    places = [f"{members.name(rank)}{f' (it waits in {where})' if where else ''}" for rank, where in absent.items()]
    return f"{waited} for {', '.join(places)}, which did not come before the timeout ended"


def is_lost(error: BaseException) -> bool:
    """Whether MPI says that a process has died."""
    return isinstance(error, MPI.Exception) and error.Get_error_class() in _LOST


def is_revoked(error: BaseException) -> bool:
    """Whether MPI says that another rank has given the communicator up."""
    return isinstance(error, MPI.Exception) and error.Get_error_class() == MPI.ERR_REVOKED


def failed_ranks(comm: MPI.Comm) -> list[int]:
    """The dead members of a communicator, by their number in it (User-Level Failure Mitigation)."""
    failed = comm.Get_failed()
    if failed.Get_size() == 0:
        return []
    everyone = comm.Get_group()
    return sorted(failed.Translate_ranks(None, everyone))
