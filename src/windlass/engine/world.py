"""The ranks that train together, seen from one of them.

`LocalWorld` is the definition: one rank, no messages.  `MpiWorld` is the same over Open MPI.  Sums are
started and waited for apart, so that they can overlap with computation.  Waiting is polite: it tests a while
and then sleeps, since a spinning rank takes the core that a late one needs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.errors import LostRankError

if TYPE_CHECKING:
    from mpi4py import MPI

NUM_SPINS = 200
"""Tests before a waiting rank begins to sleep (about 50 µs)."""
SLEEP_S = 30e-6
"""How long a waiting rank sleeps between tests."""


class RankLost(LostRankError):  # noqa: N818 - it is news before it is an error: an elastic run goes on
    """An operation cannot end because a rank has died, or because another rank has said so."""


@contextmanager
def losses_named(operation: str) -> Iterator[None]:
    """Turns MPI's errors of fault tolerance into `RankLost`; every other error passes as it is."""
    try:
        yield
    except Exception as error:
        raise_named(error, operation)


def raise_named(error: Exception, operation: str) -> NoReturn:
    """Raises `named_loss`."""
    named = named_loss(error, operation)
    if named is error:
        raise error
    raise named from error


def named_loss(error: Exception, operation: str) -> Exception:
    """`RankLost` for an error of MPI that speaks of a dead rank; any other error as it is."""
    if type(error).__module__.partition(".")[0] != "mpi4py":
        return error
    from mpi4py import MPI

    kinds = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
    is_loss = isinstance(error, MPI.Exception) and error.Get_error_class() in kinds
    return RankLost(f"a rank died during {operation}") if is_loss else error


class Request(Protocol):
    """A sum under way."""

    def wait(self) -> None:
        """Returns when the sum stands in the buffer on this rank."""

    def test(self) -> bool:
        """Moves the sum on and says whether it is complete."""


class World(Protocol):
    """What a rank knows of the others.

    Attributes:
        rank, size: this rank's number and how many there are.
        local_rank, local_size: the same among the ranks of this host.
        host: this host's name.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """Starts summing `send` over all ranks into `receive`; contiguous, of one shape and dtype everywhere.

        They are two arrays because that is twice as fast in Open MPI as summing in place.
        """

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank; any object that pickles."""

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        """The value of rank `root`, on every rank."""

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    def abort(self, code: int) -> None:
        """Ends every rank at once with this exit status."""


def crosses_hosts(world: World) -> bool:
    """Whether some of the ranks are on other hosts."""
    return world.local_size < world.size


def sum_over(world: World, values: list[float]) -> list[float]:
    """Sums a few numbers over all ranks."""
    return [float(value) for value in sum_array(world, np.array(values, dtype=np.float64))]


def sum_array(world: World, array: NDArray[Any]) -> NDArray[Any]:
    """The sum of every rank's `array`."""
    total = np.empty_like(array)
    world.start_sum(array, total).wait()
    return total


class _Done:
    def wait(self) -> None:
        return

    def test(self) -> bool:
        return True


class LocalWorld:
    """One rank alone."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        self.host = socket.gethostname()

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """The sum over one rank is a copy, and nothing at all where both are the same memory."""
        if send.ctypes.data != receive.ctypes.data:
            receive[...] = send
        return _Done()

    def gather(self, value: Any) -> list[Any]:
        """One value."""
        return [value]

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, code: int) -> None:
        """Ends this process."""
        os._exit(code)


class MpiRequest:
    """A request of MPI, waited for politely.

    Raises:
        RankLost: from `test` and `wait`, under an MPI with fault tolerance.
    """

    def __init__(self, request: MPI.Request, operation: str) -> None:
        self._request = request
        self._operation = operation

    def test(self) -> bool:
        """Moves it on and says whether it is complete."""
        try:
            return bool(self._request.Test())
        except Exception as error:
            raise_named(error, self._operation)

    def wait(self) -> None:
        """Returns when it is complete."""
        for _ in range(NUM_SPINS):
            if self.test():
                return
        while not self.test():
            time.sleep(SLEEP_S)


class MpiWorld:
    """The ranks of a communicator.

    Args:
        comm: whose ranks; None for all that were started.
        hosts: every rank's host, where that is known; else the ranks ask one another.

    Attributes:
        comm: the communicator, for what speaks MPI itself.
    """

    def __init__(self, comm: MPI.Intracomm | None = None, *, hosts: list[str] | None = None) -> None:
        from mpi4py import MPI

        self.comm: MPI.Intracomm = MPI.COMM_WORLD if comm is None else comm
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.host = MPI.Get_processor_name()
        if hosts is None:
            hosts = self.comm.allgather(self.host)
        self.local_size = hosts.count(self.host)
        self.local_rank = hosts[: self.rank].count(self.host)

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """Open MPI's own non-blocking allreduce."""
        try:
            return MpiRequest(self.comm.Iallreduce(send, receive), "an allreduce")
        except Exception as error:
            raise_named(error, "an allreduce")

    def gather(self, value: Any) -> list[Any]:
        """Pickled and gathered everywhere; for rare and small things."""
        with losses_named("a gather"):
            return self.comm.allgather(value)

    def broadcast(self, value: Any, *, root: int = 0) -> Any:
        """Pickled and broadcast; for rare and small things."""
        with losses_named("a broadcast"):
            return self.comm.bcast(value, root=root)

    def barrier(self) -> None:
        """Waits politely for all."""
        with losses_named("a barrier"):
            request = self.comm.Ibarrier()
        MpiRequest(request, "a barrier").wait()

    def abort(self, code: int) -> None:
        """MPI_Abort."""
        self.comm.Abort(code)


_RANK_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # mpiexec of Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # mpiexec of MPICH, srun --mpi=pmi2
    ("PMIX_RANK", "SLURM_STEP_NUM_TASKS"),  # srun --mpi=pmix
)


def world_from_environment() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, when a launcher (mpiexec, srun) started it; else None."""
    for rank, size in _RANK_VARIABLES:
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    return None


def join_world(size: int) -> World:
    """The world of this process: MPI's when there is more than one rank."""
    return LocalWorld() if size == 1 else MpiWorld()
