"""Allreduce within a host through shared memory; the kernels are `kernels.collective.shared`.

The memory is a file of ``/dev/shm`` that all ranks map and that loses its name at once, so nothing stays behind
however they end.  It is not a window of MPI's, which would not survive a dead rank.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from windlass.kernels.collective.combine import OPS, STORAGE, WIDE, kind_of, scratch_of
from windlass.kernels.collective.shared import (
    COUNTERS,
    DESCRIPTOR,
    ENTRY,
    LINE,
    make_one_shot,
    make_progress,
    num_counters,
    slot_elements,
)

if TYPE_CHECKING:
    from mpi4py import MPI

SLOTS = 4
"""Pieces that are under way at a time."""
PIECE_BYTES = 256 << 10
"""Default piece."""
ONE_SHOT_BYTES = 16 << 10
"""Buffers up to here go in one go."""
ONE_SHOT_TOTAL = 64 << 10
"""As long as all ranks' together are no larger than this: each rank reads them all."""
SPINS = 2000
"""Turns of waiting in the kernel before it returns to its caller (tens of microseconds)."""
CROWDED_SPINS = 100
"""The same where ranks outnumber cores: each turn lets another process run."""
YIELDS = 4000
"""Turns of waiting that then follow, of which each lets another process run: longer than a sleep takes to end, or two
ranks that wait for each other by turns would sleep by turns for ever after."""
SLEEP_S = 30e-6
"""How long a waiting rank sleeps thereafter between calls of the kernel."""

Watch = Callable[[str, float, Callable[[], list[int]]], None]
"""Told while a rank waits: for what operation, for how many seconds, and who asks which ranks have not come."""
Kernel = Callable[[int, bool], bool]
"""Moves an operation on, waits for so many turns at most, in which it lets others run or not, and says whether the
operation is complete."""


def map_shared(comm: MPI.Intracomm, num_bytes: int) -> mmap.mmap:
    """The same zeroed memory on all ranks of `comm`, which are on one host; collective.

    Raises:
        OSError: on all ranks, when one of them cannot.
    """
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    path = comm.bcast(str(folder / f"windlass-{os.getpid()}-{secrets.token_hex(8)}"))
    memory, problem = None, ""
    for turn in range(2):  # rank 0 makes it, the others open it
        if (comm.Get_rank() == 0) == (turn == 0):
            try:
                memory = _map(path, num_bytes, create=turn == 0)
            except (OSError, ValueError) as error:  # no such file, or one that is too short
                problem = str(error)
        comm.Barrier()
    problems = [text for text in comm.allgather(problem) if text]
    if comm.Get_rank() == 0:
        with contextlib.suppress(OSError):
            Path(path).unlink()
    if problems or memory is None:
        raise OSError(f"no shared memory among the ranks of a host: {problems[0]}")
    return memory


def _map(path: str, num_bytes: int, *, create: bool) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
    try:
        if create:
            os.posix_fallocate(descriptor, 0, num_bytes)  # a full memory is an error now, not a signal later
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


class SharedRequest:
    """A reduction under way."""

    def __init__(self, owner: SharedAllreduce, kernel: Kernel) -> None:
        self._owner = owner
        self.kernel: Kernel | None = kernel

    def test(self) -> bool:
        """Moves this and all earlier ones on, without waiting."""
        owner = self._owner
        done = owner.advance(self, 0)
        if not done and owner.watch is not None:
            owner.watch("allreduce", 0.0, owner.awaited)
        return done

    def wait(self) -> None:
        """Returns when the result stands in the buffer; waits politely."""
        owner = self._owner
        owner.wait(lambda turns, yields: owner.advance(self, turns, yields=yields))


class SharedAllreduce:
    """The shared memory of one host's ranks; operations are started in the same order by all.

    Args:
        comm: a communicator whose ranks share memory; making this object is collective.
        piece_bytes: the shared memory holds `SLOTS` pieces for every rank, and for the result.

    Attributes:
        bytes_written: what this rank has written into the shared memory, in operations that are complete.

    Raises:
        OSError: on all ranks, where they cannot share memory, as in containers of their own or on a full disk.
    """

    def __init__(self, comm: MPI.Intracomm, *, piece_bytes: int = PIECE_BYTES) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.piece_bytes = piece_bytes
        self._one_shot_bytes = min(ONE_SHOT_BYTES, ONE_SHOT_TOTAL // self.size)
        counters = 8 * num_counters(self.size)
        small = 2 * self.size * self._one_shot_bytes
        total = counters + small + SLOTS * slot_elements(self.size, piece_bytes)
        whole = np.frombuffer(map_shared(comm, total), dtype=np.uint8)
        self._counters = whole[:counters].view(np.int64)
        self._small = whole[counters : counters + small]
        self._pieces = whole[counters + small :]
        self.bytes_written = 0
        self._scratch: dict[str, NDArray[Any]] = {}
        self._base = self._number = 0
        self._under_way: deque[SharedRequest] = deque()
        self.watch: Watch | None = None
        self.crowded = self.size > len(os.sched_getaffinity(0))
        self.spins = CROWDED_SPINS if self.crowded else SPINS

    def start(self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool) -> SharedRequest:
        """Starts reducing `send` of all ranks into `receive`, which may be the same array; 1-D and contiguous."""
        if send.nbytes <= self._one_shot_bytes:
            kernel = self._one_shot(send, receive, dtype=dtype, op=op, mean=mean)
        else:
            kernel = self._by_pieces(send, receive, dtype=dtype, op=op, mean=mean)
        request = SharedRequest(self, kernel)
        self._under_way.append(request)
        return request

    def prepare(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool
    ) -> Callable[[], None]:
        """The same as a function that reduces these two arrays whenever it is called, and returns when it is done."""
        if send.nbytes > self._one_shot_bytes:
            return lambda: self.start(send, receive, dtype=dtype, op=op, mean=mean).wait()
        descriptor, kernel, like, wide = self._describe(send, receive, dtype=dtype, op=op, mean=mean)
        number, begun, spins, crowded = (ENTRY[name] for name in ("number", "begun", "spins", "crowded"))
        written = ENTRY["written"]
        keep = (send, receive)  # the descriptor knows their addresses only

        def reduce() -> None:
            assert keep
            if self._under_way:
                self.start(send, receive, dtype=dtype, op=op, mean=mean).wait()
                return
            descriptor[number] = self._number
            descriptor[begun] = descriptor[written] = 0
            self._number += 1
            if not kernel(descriptor, like, wide):
                self.wait(move)
            self.bytes_written += int(descriptor[written]) * send.itemsize

        def move(turns: int, yields: bool) -> bool:
            descriptor[spins], descriptor[crowded] = turns, yields
            done = bool(kernel(descriptor, like, wide))
            descriptor[spins], descriptor[crowded] = self.spins, self.crowded
            return done

        return reduce

    def wait(self, move: Kernel) -> None:
        """Returns when `move` says that all is done; waits politely."""
        if move(self.spins, self.crowded) or move(YIELDS, True):
            return
        began = time.monotonic()
        while not move(self.spins if self.crowded else 0, self.crowded):
            time.sleep(SLEEP_S)
            if self.watch is not None:
                self.watch("allreduce", time.monotonic() - began, self.awaited)

    def advance(self, request: SharedRequest, spins: int, *, yields: bool = False) -> bool:
        """Moves operations on, oldest first; whether `request` is complete."""
        while self._under_way and request.kernel is not None:
            oldest = self._under_way[0]
            assert oldest.kernel is not None
            if not oldest.kernel(spins, yields):
                break
            oldest.kernel = None
            self._under_way.popleft()
        return request.kernel is None

    def awaited(self) -> list[int]:
        """The ranks that are farthest behind, if any is behind this one."""
        done = [
            sum(int(self._counters[(COUNTERS * rank + i) * LINE]) for i in range(COUNTERS)) for rank in range(self.size)
        ]
        return [rank for rank, steps in enumerate(done) if steps == min(done) < done[self.rank]]

    def _one_shot(self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool) -> Kernel:
        descriptor, kernel, like, wide = self._describe(send, receive, dtype=dtype, op=op, mean=mean)
        descriptor[ENTRY["number"]] = self._number
        self._number += 1
        spins, crowded, written = ENTRY["spins"], ENTRY["crowded"], ENTRY["written"]

        def move(turns: int, yields: bool) -> bool:
            assert send.size == receive.size  # and they live as long as this does
            descriptor[spins], descriptor[crowded] = turns, yields
            done = bool(kernel(descriptor, like, wide))
            self.bytes_written += int(descriptor[written]) * send.itemsize if done else 0
            return done

        return move

    def _describe(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool
    ) -> tuple[NDArray[Any], Any, NDArray[Any], NDArray[Any]]:
        kind = np.dtype(STORAGE[dtype])
        values = {
            "counters": self._counters.ctypes.data, "num_counters": self._counters.size,
            "data": self._small.ctypes.data, "num_data": self._small.size // kind.itemsize,
            "x": send.ctypes.data, "out": receive.ctypes.data, "length": send.size, "acc": self._acc(dtype).ctypes.data,
            "rank": self.rank, "size": self.size, "place": self._one_shot_bytes // kind.itemsize, "number": 0,
            "op": OPS[op], "mean": mean, "spins": self.spins, "crowded": self.crowded, "begun": 0,
            "written": 0,
        }  # fmt: skip
        descriptor = np.array([values[name] for name in DESCRIPTOR], dtype=np.int64)
        return descriptor, make_one_shot(kind_of(dtype)), np.empty(0, dtype=kind), np.empty(0, dtype=WIDE[dtype])

    def _by_pieces(self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool) -> Kernel:
        kind = np.dtype(STORAGE[dtype])
        piece = self.piece_bytes // kind.itemsize
        progress, data, acc, number = make_progress(kind_of(dtype)), self._pieces.view(kind), self._acc(dtype), OPS[op]
        state = np.array([self._base, 0, 0, 0, 0], dtype=np.int64)
        self._base += -(-send.size // piece)

        def move(turns: int, yields: bool) -> bool:
            done = bool(
                progress(
                    self._counters,
                    data,
                    send,
                    receive,
                    acc,
                    state,
                    self.rank,
                    self.size,
                    SLOTS,
                    piece,
                    number,
                    mean,
                    turns,
                    yields,
                )
            )
            self.bytes_written += int(state[4]) * kind.itemsize if done else 0
            return done

        return move

    def _acc(self, dtype: str) -> NDArray[Any]:
        if dtype not in self._scratch:
            self._scratch[dtype] = scratch_of(dtype)
        return self._scratch[dtype]
