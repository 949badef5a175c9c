"""Allreduce within a host through a window of shared memory; the kernel is `kernels.collective.shared`."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from windlass.kernels.collective.combine import OPS, STORAGE, kind_of, scratch_of
from windlass.kernels.collective.shared import COUNTERS, LINE, make_progress, num_counters, slot_elements

if TYPE_CHECKING:
    from mpi4py import MPI

SLOTS = 4
"""Pieces that are under way at a time."""
PIECE_BYTES = 128 << 10
"""Default piece: all ranks' areas together stay in the second cache."""
SPINS = 2000
"""Turns of waiting in the kernel before it returns to its caller (tens of microseconds)."""
CROWDED_SPINS = 100
"""The same where ranks outnumber cores: each turn lets another process run."""
SLEEP_S = 30e-6
"""How long a waiting rank sleeps between calls of the kernel."""

Watch = Callable[[str, float, Callable[[], list[int]]], None]
"""Told while a rank waits: for what operation, for how many seconds, and who asks which ranks have not come."""


class SharedRequest:
    """A reduction under way."""

    def __init__(self, owner: SharedAllreduce, arguments: tuple[Any, ...], state: NDArray[Any]) -> None:
        self._owner = owner
        self.arguments = arguments
        self.state = state
        self.done = False

    def test(self) -> bool:
        """Moves this and all earlier ones on, without waiting."""
        return self._owner.advance(self, 0)

    def wait(self) -> None:
        """Returns when the result stands in the buffer; waits politely."""
        owner = self._owner
        began = 0.0
        while not owner.advance(self, owner.spins):
            time.sleep(SLEEP_S)
            if owner.watch is not None:
                began = began or time.monotonic()
                owner.watch("allreduce", time.monotonic() - began, owner.awaited)


class SharedAllreduce:
    """One window for the ranks of one host; operations are started in the same order by all.

    Args:
        comm: a communicator whose ranks share memory; creating the window is collective.
        piece_bytes: the shared memory holds `SLOTS` pieces for every rank, and for the result.
    """

    def __init__(self, comm: MPI.Intracomm, *, piece_bytes: int = PIECE_BYTES) -> None:
        from mpi4py import MPI

        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.piece_bytes = piece_bytes
        counters = 8 * num_counters(self.size)
        total = counters + SLOTS * slot_elements(self.size, piece_bytes)
        self._window: MPI.Win | None = MPI.Win.Allocate_shared(total if self.rank == 0 else 0, 1, comm=comm)
        memory: Any = self._window.Shared_query(0)[0]
        whole = np.frombuffer(memory, dtype=np.uint8)
        self._counters = whole[:counters].view(np.int64)
        self._bytes = whole[counters:]
        if self.rank == 0:
            self._counters[:] = 0
        self._typed: dict[str, tuple[Any, NDArray[Any], NDArray[Any], int]] = {}
        self._base = 0
        self._under_way: deque[SharedRequest] = deque()
        self.watch: Watch | None = None
        self.crowded = self.size > len(os.sched_getaffinity(0))
        self.spins = CROWDED_SPINS if self.crowded else SPINS
        comm.Barrier()

    def start(self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool) -> SharedRequest:
        """Starts reducing `send` of all ranks into `receive`, which may be the same array; 1-D and contiguous."""
        progress, data, acc, piece = self._kernel(dtype)
        state = np.array([self._base, 0, 0, 0], dtype=np.int64)
        self._base += -(-send.size // piece)
        arguments = (progress, data, send, receive, acc, piece, OPS[op], mean)
        request = SharedRequest(self, arguments, state)
        self._under_way.append(request)
        return request

    def advance(self, request: SharedRequest, spins: int) -> bool:
        """Moves operations on, oldest first; whether `request` is complete."""
        while self._under_way and not request.done:
            oldest = self._under_way[0]
            progress, data, send, receive, acc, piece, op, mean = oldest.arguments
            if not progress(
                self._counters, data, send, receive, acc, oldest.state, self.rank, self.size, SLOTS, piece,
                op, mean, spins, self.crowded,
            ):  # fmt: skip
                break
            oldest.done = True
            oldest.arguments = ()
            self._under_way.popleft()
        return request.done

    def awaited(self) -> list[int]:
        """The ranks that are farthest behind, if any is behind this one."""
        done = [sum(int(self._counters[(3 * rank + i) * LINE]) for i in range(COUNTERS)) for rank in range(self.size)]
        return [rank for rank, steps in enumerate(done) if steps == min(done) < done[self.rank]]

    def close(self) -> None:
        """Frees the window; collective."""
        if self._window is not None:
            self._counters = self._bytes = np.empty(0, dtype=np.int64)
            self._typed.clear()
            self._window.Free()
            self._window = None

    def _kernel(self, dtype: str) -> tuple[Any, NDArray[Any], NDArray[Any], int]:
        if dtype not in self._typed:
            kind = np.dtype(STORAGE[dtype])
            piece = self.piece_bytes // kind.itemsize
            self._typed[dtype] = (make_progress(kind_of(dtype)), self._bytes.view(kind), scratch_of(dtype), piece)
        return self._typed[dtype]
