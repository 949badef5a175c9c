"""The ranks that train together, seen from one of them.

`LocalWorld` is the definition: one rank, no messages.  `MpiWorld` is the same over Open MPI.  Sums are
started and waited for apart, so that they can overlap with computation.  Waiting is polite: it tests a while
and then sleeps, since a spinning rank takes the core that a late one needs.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mpi4py import MPI

NUM_SPINS = 200
"""Tests before a waiting rank begins to sleep (about 50 µs)."""
SLEEP_S = 30e-6
"""How long a waiting rank sleeps between tests."""


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

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def barrier(self) -> None:
        """Returns when every rank has come here."""

    def abort(self, code: int) -> None:
        """Ends every rank at once with this exit status."""


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

    def broadcast(self, value: Any) -> Any:
        """The value itself."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""

    def abort(self, code: int) -> None:
        """Ends this process."""
        os._exit(code)


class _MpiRequest:
    def __init__(self, request: MPI.Request) -> None:
        self._request = request

    def test(self) -> bool:
        return bool(self._request.Test())

    def wait(self) -> None:
        for _ in range(NUM_SPINS):
            if self._request.Test():
                return
        while not self._request.Test():
            time.sleep(SLEEP_S)


class MpiWorld:
    """All ranks of ``MPI.COMM_WORLD``."""

    def __init__(self) -> None:
        import mpi4py

        mpi4py.rc.thread_level = "funneled"  # only the main thread speaks MPI
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank = self._comm.Get_rank()
        self.size = self._comm.Get_size()
        self.host = MPI.Get_processor_name()
        hosts = self._comm.allgather(self.host)
        self.local_size = hosts.count(self.host)
        self.local_rank = hosts[: self.rank].count(self.host)

    def start_sum(self, send: NDArray[Any], receive: NDArray[Any]) -> Request:
        """Open MPI's own non-blocking allreduce."""
        return _MpiRequest(self._comm.Iallreduce(send, receive))

    def gather(self, value: Any) -> list[Any]:
        """Pickled and gathered everywhere; for rare and small things."""
        return self._comm.allgather(value)

    def broadcast(self, value: Any) -> Any:
        """Pickled and broadcast from rank 0; for rare and small things."""
        return self._comm.bcast(value, root=0)

    def barrier(self) -> None:
        """Waits politely for all."""
        _MpiRequest(self._comm.Ibarrier()).wait()

    def abort(self, code: int) -> None:
        """MPI_Abort."""
        self._comm.Abort(code)


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
