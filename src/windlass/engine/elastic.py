"""Ranks that go on without those that died.

Theory of operation.  A job starts with `workers` ranks that train and some spare ones that wait; together they
are *everyone*.  When a rank dies, MPI with user-level fault mitigation (ULFM; MPI Forum, *Fault Tolerance*,
mpi-forum.org/mpi-issues/20; Bland et al., *Post-failure recovery of MPI communication capability*, IJHPCA 2013)
ends some operation of some survivors with an error.  Who gets the error

    revokes   both communicators, so that every other rank's operation ends too, wherever it waits;
    shrinks   everyone to the living: a collective that all survivors come to, and that tells all the same;
    seats     the living: a dead rank's seat goes to a spare, or is removed (`reseat`, a pure function);
    agrees    that all have the new training communicator, else shrinks again.

What the ranks know of the run is not looked at here: the trainer brings all to the furthest state that a
survivor has (`windlass.survival`).  A rank that only stands still is killed by the launcher: `Shrink` waits for it.

Nothing here may know what is trained.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from windlass.engine.world import MpiWorld, RankLost, World, losses_named, named_loss

if TYPE_CHECKING:
    from mpi4py import MPI

STANDING_BY = "standing by"
"""What a spare rank says it is doing while it waits."""
NAP_S = 2e-3
"""How long a spare rank sleeps between looks."""
END_TAG = 7
"""Tag of the message that lets a spare rank go."""
FAULT_OPTIONS = ("--with-ft", "ulfm")
"""What Open MPI's ``mpiexec`` must be told."""
FAULT_VARIABLE = "OMPI_MCA_mpi_ft_enable"
"""What it tells the ranks then."""


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """A process of the job, by the number it was started with."""

    rank: int
    host: str
    pid: int

    @property
    def name(self) -> str:
        """For a person."""
        return f"rank {self.rank} on {self.host} (pid {self.pid})"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a loss did.

    Attributes:
        dead: who died.
        promoted: the spare ranks that took seats.
        size: how many train now.
        noticed_at: when this rank met the first error, on the host's monotonic clock.
    """

    dead: tuple[Member, ...]
    promoted: tuple[Member, ...]
    size: int
    noticed_at: float


def reseat(seats: Sequence[Member], living: Sequence[Member]) -> tuple[Member, ...]:
    """Who trains now: the living keep their order, spares take the seats of the dead, other seats vanish.

    >>> a, b, c, d = (Member(rank, "h", 0) for rank in range(4))
    >>> [member.rank for member in reseat((a, b, c), (a, c, d))]  # b died, d was a spare
    [0, 3, 2]
    >>> [member.rank for member in reseat((a, b, c), (b, c))]
    [1, 2]
    """
    spares = iter([member for member in living if member not in seats])
    filled = [member if member in living else next(spares, None) for member in seats]
    return tuple(member for member in filled if member is not None)


def fault_tolerant(comm: MPI.Comm) -> bool:
    """Whether this MPI survives a dead rank: it knows how, and was told so at start."""
    from mpi4py import MPI

    try:
        comm.Ack_failed()
    except (NotImplementedError, MPI.Exception):
        return False
    # Open MPI answers these calls always, but notices deaths only when started with --with-ft ulfm.
    name, _ = MPI.get_vendor()
    return name != "Open MPI" or os.environ.get(FAULT_VARIABLE, "").lower() in ("1", "true", "yes")


class Crew:
    """Everyone, and who of them trains.

    Args:
        num_seats: how many ranks train at first; those started beyond are spares.

    Attributes:
        everyone: the world of all living ranks, spares too.
        world: the world of the ranks that train; None on a spare.
        me: this process.
        seats: who trains, by rank of `world`.
        generation: how often the ranks have been seated anew.
        survives: whether this MPI is fault tolerant.
        untold: what this rank, as one that trains, has recovered from since the last event.
    """

    def __init__(self, num_seats: int) -> None:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"
        from mpi4py import MPI

        self.survives = fault_tolerant(MPI.COMM_WORLD)
        self._everyone: MPI.Intracomm = MPI.COMM_WORLD.Dup()
        self.everyone: World = MpiWorld(self._everyone)
        self.me = Member(self.everyone.rank, self.everyone.host, os.getpid())
        self.members: tuple[Member, ...] = tuple(self.everyone.gather(self.me))
        self.seats = self.members[:num_seats]
        self.generation = 0
        self.died_at: dict[int, float] = {}
        self.untold: list[Recovery] = []
        self.world: MpiWorld | None = None
        self._derived: list[MPI.Intracomm] = []
        self._comm: MPI.Intracomm | None = self._form()
        self._enter()

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that writes files and speaks for all."""
        return self.world is not None and self.world.rank == 0

    @property
    def spares(self) -> tuple[Member, ...]:
        """Who waits."""
        return tuple(member for member in self.members if member not in self.seats)

    def heard_of_death(self, message: Mapping[str, Any]) -> None:
        """The launcher's word: who died and when; from another thread."""
        self.died_at.setdefault(int(message["rank"]), float(message["at"]))

    def recover(self) -> None:
        """Every living rank comes here after `RankLost`; returns with a new `world` and `everyone`.

        Raises:
            RankLost: this MPI cannot go on, or nobody is left who has trained.
        """
        noticed_at = time.monotonic()
        if not self.survives:
            raise RankLost("a rank died, and this MPI cannot go on without it")
        before, seats = self.members, self.seats
        self.revoke()
        while not self._shrink():
            self.revoke()
        dead = tuple(member for member in before if member not in self.members)
        if not any(member in self.members for member in seats):
            raise RankLost(f"every rank that trained has died, the last was {dead[-1].name}")
        promoted = tuple(member for member in self.seats if member not in seats)
        recovery = Recovery(dead, promoted, len(self.seats), noticed_at)
        self.untold = [*self.untold, recovery] if self.world is not None else []

    def revoke(self) -> None:
        """Ends every operation that waits, on every rank."""
        from mpi4py import MPI

        for comm in (*self._derived, self._comm, self._everyone):
            if comm is not None and comm != MPI.COMM_NULL and not comm.Is_revoked():
                comm.Revoke()
        self._derived.clear()

    def stand_by(self, idle: Callable[[], None]) -> bool:
        """What a spare does: waits until it has a seat (True) or the run is over (False)."""
        from mpi4py import MPI

        while self.world is None:
            try:
                request = self._everyone.Irecv(np.empty(1), source=MPI.ANY_SOURCE, tag=END_TAG)
                while not request.Test():
                    idle()
                    time.sleep(NAP_S)
                return False
            except MPI.Exception as error:
                if error.Get_error_class() == MPI.ERR_PROC_FAILED_PENDING and self._trainers_live():
                    self._everyone.Ack_failed()  # those who train will call when they notice
                    continue
                if not isinstance(named_loss(error, STANDING_BY), RankLost):
                    raise
                self.recover()
        return True

    def dismiss(self) -> None:
        """The leading rank lets the spares go; those that died meanwhile are no reason to fail."""
        if not self.leads:
            return
        for rank, member in enumerate(self.members):
            if member not in self.seats:
                try:
                    with losses_named("the end"):
                        self._everyone.Send(np.zeros(1), dest=rank, tag=END_TAG)
                except RankLost:
                    continue

    def tell(self, *, step: int) -> dict[str, Any]:
        """What has happened, as an event: who died, who took a seat, and the times where the launcher gave them.

        Args:
            step: from which the ranks went on; the next one is complete now.
        """
        now, losses = time.monotonic(), self.untold
        self.untold = []
        dead = [member for loss in losses for member in loss.dead]
        promoted = [member for loss in losses for member in loss.promoted]
        died_at = min((self.died_at[member.rank] for member in dead if member.rank in self.died_at), default=None)
        event: dict[str, Any] = {
            "kind": "lost",
            "ranks": [member.rank for member in dead],
            "pids": [member.pid for member in dead],
            "hosts": [member.host for member in dead],
            "promoted": [member.rank for member in promoted],
            "workers": losses[-1].size,
            "world": self.generation,
            "noticed_at": losses[0].noticed_at,
            "next_step_at": now,
        }
        times = ""
        if died_at is not None:
            event |= {
                "died_at": died_at,
                "noticed_s": max(0.0, losses[0].noticed_at - died_at),
                "next_step_s": now - died_at,
            }
            times = f"; noticed after {event['noticed_s']:.3f} s, next step after {event['next_step_s']:.3f} s"
        seats = "".join(f"; {member.name} takes a seat" for member in promoted)
        who = " and ".join(member.name for member in dead) or "a rank"
        ranks = f"{event['workers']} rank{'s go' if event['workers'] > 1 else ' goes'}"
        return event | {"message": f"{who} died at step {step}{seats}; {ranks} on from step {step}{times}"}

    def _trainers_live(self) -> bool:
        group, failed = self._everyone.Get_group(), self._everyone.Get_failed()
        gone = failed.Translate_ranks(list(range(failed.Get_size())), group)
        return not all(member in [self.members[rank] for rank in gone] for member in self.seats)

    def _shrink(self) -> bool:
        """One attempt; whether all have the new communicators."""
        from mpi4py import MPI

        old = self._everyone
        try:
            with losses_named("the ranks' recovery"):
                shrunk = old.Shrink()
        except RankLost:
            return False
        assert isinstance(shrunk, MPI.Intracomm)
        self._everyone = shrunk
        group = self._everyone.Get_group()
        places = group.Translate_ranks(list(range(group.Get_size())), old.Get_group())
        self.members = tuple(self.members[place] for place in places)
        self.seats = reseat(self.seats, self.members)
        self.generation += 1
        self._comm, self.world = None, None
        formed = True
        try:
            with losses_named("the ranks' seating"):
                self._comm = self._form()
        except RankLost:
            formed = False
            self._everyone.Revoke()  # another rank may wait for this one inside `_form`
        try:
            with losses_named("the ranks' agreement"):
                agreed = bool(self._everyone.Agree(int(formed)))
        except RankLost:
            agreed = False
        if agreed:
            self._enter()
        return agreed

    def _enter(self) -> None:
        """The worlds of the communicators; no message is sent, so that nothing can fail between the ranks."""
        hosts = [member.host for member in self.members]
        self.everyone = MpiWorld(self._everyone, hosts=hosts)
        if self._comm is not None:
            hosts = [member.host for member in self.seats]
            tracked = _tracked(self._comm, self._derived)
            self.world = MpiWorld(tracked, hosts=hosts)

    def _form(self) -> MPI.Intracomm | None:
        """The communicator of those who train; everyone's own where nobody waits and the order is the same."""
        from mpi4py import MPI

        if self.seats == self.members:
            return self._everyone
        seated = self.me in self.seats
        color, key = (0, self.seats.index(self.me)) if seated else (MPI.UNDEFINED, 0)
        comm = self._everyone.Split(color, key)
        return comm if isinstance(comm, MPI.Intracomm) and comm != MPI.COMM_NULL else None


def _tracked(comm: MPI.Intracomm, derived: list[MPI.Intracomm]) -> MPI.Intracomm:
    """The same communicator; its duplicates are noted in `derived`, so that they can be revoked with it."""
    from mpi4py import MPI

    class Tracked(MPI.Intracomm):
        def Dup(self, info: MPI.Info | None = None) -> MPI.Intracomm:  # type: ignore[override]  # noqa: N802
            made = MPI.Intracomm(super().Dup(*([] if info is None else [info])))
            derived.append(made)
            return made

    return Tracked(comm)
