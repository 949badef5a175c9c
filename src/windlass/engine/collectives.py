"""Collective operations of real ranks: schedules over MPI, shared memory within a host, or the library's own.

One object per communicator, used by one thread.  Operations are started in the same order by all ranks, and may
be under way together.  Waiting is polite: it tests a while, then sleeps, so that a late rank gets the core.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from windlass.engine.schedule_run import Places, ScheduleRun, Scratch
from windlass.engine.shared_memory import SharedAllreduce, SharedRequest
from windlass.errors import ConfigError, LostRankError
from windlass.kernels.collective.combine import OPS, STORAGE, divide
from windlass.plan.collective import Schedule, make_schedule
from windlass.plan.pick import LIBRARY, ORDERED, SHARED, Pick

if TYPE_CHECKING:
    from mpi4py import MPI

NUM_SPINS = 300
"""Tests before a waiting rank begins to sleep."""
SLEEP_S = 30e-6
"""How long a waiting rank sleeps between tests."""
SMALL_BYTES = 8 << 10
"""Up to here the library's own is faster than what is driven from Python and not prepared."""
SEGMENT_BYTES = 32 << 10
"""Longer messages between hosts travel in segments: above its eager limit Open MPI's TCP exchanges half duplex."""
NUM_TAGS = 1 << 14
CHECK_S = 2e-3
"""Seconds between two looks at the other ranks while one waits."""

Chooser = Callable[[int], Pick]
"""The algorithm for a buffer of so many bytes."""
_LIBRARY_TYPES = {
    "float32": "FLOAT", "float64": "DOUBLE", "int32": "INT32_T", "int16": "INT16_T", "int64": "INT64_T",
    "int8": "INT8_T", "uint8": "UINT8_T",
}  # fmt: skip
_LIBRARY_OPS = {"sum": "SUM", "max": "MAX", "min": "MIN", "prod": "PROD"}


class Operation(Protocol):
    """A collective operation under way."""

    def test(self) -> bool:
        """Moves it on without waiting; whether it is complete on this rank."""

    def wait(self) -> None:
        """Returns when it is complete on this rank."""


class _Done:
    def test(self) -> bool:
        return True

    def wait(self) -> None:
        return


DONE = _Done()


def wait_politely(
    test: Callable[[], bool], *, spins: int = NUM_SPINS, watch: Callable[[float], None] | None = None
) -> None:
    """Returns when `test` does; sleeps between tests when it takes long, and tells `watch` for how many seconds."""
    for _ in range(spins):
        if test():
            return
    began = time.monotonic()
    while not test():
        time.sleep(SLEEP_S)
        if watch is not None:
            watch(time.monotonic() - began)


class _Running:
    """A schedule or a request of the library under way, and what remains to be done at its end."""

    def __init__(
        self, test: Callable[[], bool], *, spins: int, watch: Callable[[float], None],
        finish: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._test, self._finish, self._spins, self._watch = test, finish, spins, watch
        self._done = False

    def test(self) -> bool:
        if not self._done and self._test():
            self._done = True
            if self._finish is not None:
                self._finish()
        return self._done

    def wait(self) -> None:
        wait_politely(self.test, spins=self._spins, watch=self._watch)


class Collectives:
    """The collective operations of a communicator's ranks.

    Args:
        comm: the ranks; a duplicate of it is used.  Making this object is collective.
        choose: the algorithm of allreduce by size; None: `default_choice`.
        fixed_order: sums are made in the order of ranks whatever the size, so that bits depend on nothing else.
        piece_bytes: of the shared memory (`engine.shared_memory`).
        timeout_s: a rank that has waited so long for others names them in an error; 0: it waits for ever.
        check: called with the communicator every few milliseconds while a rank waits; may raise, as when another
            rank has died.
        crowded: whether ranks outnumber cores; None: as each host counts them, which is wrong where hosts share cores.

    Attributes:
        rank, size: this rank and how many there are.
        hosts: the ranks of each host.
    """

    def __init__(
        self, comm: MPI.Intracomm, *, choose: Chooser | None = None, fixed_order: bool = False, piece_bytes: int = 0,
        timeout_s: float = 0.0, check: Callable[[MPI.Intracomm], None] | None = None,
        crowded: bool | None = None,
    ) -> None:  # fmt: skip
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm.Dup()
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        host_comm: Any = comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        members = host_comm.allgather(self.rank)
        self.hosts: tuple[tuple[int, ...], ...] = tuple(sorted({tuple(host) for host in comm.allgather(members)}))
        outnumbered = any(comm.allgather(len(members) > len(os.sched_getaffinity(0))))
        self.crowded = outnumbered if crowded is None else crowded
        self._spins = 20 if self.crowded else NUM_SPINS
        self.shared: SharedAllreduce | None = None
        if len(self.hosts) == 1 and self.size > 1:
            with contextlib.suppress(OSError):  # on all ranks alike; messages do as well
                self.shared = SharedAllreduce(host_comm, **({"piece_bytes": piece_bytes} if piece_bytes else {}))
                self.shared.watch = self._watch
        host_comm.Free()
        self._names: list[str] = comm.allgather(MPI.Get_processor_name())
        self._timeout_s, self._check_others, self._checked_at = timeout_s, check, 0.0
        self.fixed_order = fixed_order
        self._asked = choose or self.default_choice
        self._bytes_sent = 0
        self._scratch = Scratch()
        self._next_tag = 0

    def choose(self, num_bytes: int) -> Pick:
        """The chooser's algorithm; one that these ranks cannot run, for want of shared memory, is not taken."""
        pick = self._asked(num_bytes)
        return self.default_choice(num_bytes) if pick.algorithm == SHARED and self.shared is None else pick

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent, or written into shared memory, in all operations that are complete; as counted."""
        return self._bytes_sent + (self.shared.bytes_written if self.shared is not None else 0)

    def default_choice(self, num_bytes: int) -> Pick:
        """What is known to be good without having measured.

        One host: the library for little, where every rank has a core, else shared memory.  Several: recursive
        doubling for little, then within hosts first if they have several ranks, else the ring.
        """
        if self.shared is not None:
            if num_bytes <= SMALL_BYTES and not self.crowded and not self.fixed_order:
                return Pick(LIBRARY)
            return Pick(SHARED)
        if self.fixed_order:
            return Pick("direct", segment_bytes=SEGMENT_BYTES)
        if num_bytes <= 32 << 10:
            return Pick("recursive-doubling")
        name = "hierarchical" if len(self.hosts) < self.size else "ring"
        return Pick(name, segment_bytes=SEGMENT_BYTES)

    # --- allreduce ---

    def start_allreduce(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str = "float32", op: str = "sum",
        pick: Pick | None = None,
    ) -> Operation:  # fmt: skip
        """Starts combining `send` of all ranks into `receive`; 1-D, contiguous, and perhaps the same array.

        Args:
            send: of one length everywhere, stored as `kernels.collective.combine.STORAGE` says.
            receive: where the result goes, of that length and type.
            dtype: what the numbers are.
            op: ``sum``, ``mean`` (the sum, divided once), ``max``, ``min`` or ``prod``.
            pick: the algorithm; None: the chooser's.

        Raises:
            ConfigError: an algorithm that these ranks cannot run.
        """
        mean = op == "mean"
        op = "sum" if mean else op
        pick = pick or self.choose(send.nbytes)
        if send.dtype == np.float16:
            send, receive = send.view(np.uint16), receive.view(np.uint16)
        self._check(pick, send, dtype, op)
        if self.size == 1 or not send.size:
            _copy(send, receive)
            return DONE
        if pick.algorithm == SHARED:
            assert self.shared is not None
            return self.shared.start(send, receive, dtype=dtype, op=op, mean=mean)
        if pick.algorithm == LIBRARY and dtype in _LIBRARY_TYPES:
            return self._library(send, receive, dtype=dtype, op=op, mean=mean)
        if pick.algorithm == LIBRARY:
            pick = Pick("ring")  # the library has no such numbers
        _copy(send, receive)
        finish = (lambda: divide(receive, self.size, dtype=dtype)) if mean else None
        schedule = pick.schedule(self.size, self.hosts)
        return self._run(schedule, _even(receive, schedule), dtype, op, pick.segment_bytes, finish)

    def allreduce(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str = "float32", op: str = "sum",
        pick: Pick | None = None,
    ) -> None:  # fmt: skip
        """The same, complete when it returns; the library's own is then its blocking form, which is faster."""
        pick = pick or self.choose(send.nbytes)
        may_block = not self._timeout_s and self._check_others is None
        if pick.algorithm == LIBRARY and dtype in _LIBRARY_TYPES and self.size > 1 and may_block:
            self._check(pick, send, dtype, op)
            kind = getattr(self._mpi, _LIBRARY_TYPES[dtype])
            operation = getattr(self._mpi, _LIBRARY_OPS["sum" if op == "mean" else op])
            sent = self._mpi.IN_PLACE if send.ctypes.data == receive.ctypes.data else [send, kind]
            self._comm.Allreduce(sent, [receive, kind], op=operation)
            if op == "mean":
                divide(receive, self.size, dtype=dtype)
            return
        self.start_allreduce(send, receive, dtype=dtype, op=op, pick=pick).wait()

    def prepare_allreduce(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str = "float32", op: str = "sum",
        pick: Pick | None = None,
    ) -> Callable[[], None]:  # fmt: skip
        """A function that combines these two arrays whenever it is called: faster, since all is settled before.

        It is called in the same order by all ranks, as every operation.  Small buffers on one host go through shared
        memory then, in less time than the library's own takes.
        """
        if send.dtype == np.float16:
            send, receive = send.view(np.uint16), receive.view(np.uint16)
        pick = pick or self.choose_prepared(send.nbytes)
        self._check(pick, send, dtype, op)
        if pick.algorithm != SHARED or self.shared is None or not send.size:
            return lambda: self.allreduce(send, receive, dtype=dtype, op=op, pick=pick)
        mean = op == "mean"
        return self.shared.prepare(send, receive, dtype=dtype, op="sum" if mean else op, mean=mean)

    def choose_prepared(self, num_bytes: int) -> Pick:
        """The algorithm of a prepared allreduce."""
        return Pick(SHARED) if self.shared is not None and num_bytes <= SMALL_BYTES else self.choose(num_bytes)

    def _library(self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str, op: str, mean: bool) -> Operation:
        kind, operation = getattr(self._mpi, _LIBRARY_TYPES[dtype]), getattr(self._mpi, _LIBRARY_OPS[op])
        sent = self._mpi.IN_PLACE if send.ctypes.data == receive.ctypes.data else [send, kind]
        request = self._comm.Iallreduce(sent, [receive, kind], op=operation)
        keep = (send, receive)  # MPI knows their addresses only

        def finish() -> None:
            if mean:
                divide(keep[1], self.size, dtype=dtype)

        return self._running(request.Test, "allreduce", list, finish)

    def _running(
        self, test: Callable[[], bool], what: str, awaited: Callable[[], list[int]], finish: Callable[[], None] | None
    ) -> _Running:
        watch = lambda waited_s: self._watch(what, waited_s, awaited)  # noqa: E731
        return _Running(test, spins=self._spins, watch=watch, finish=finish)

    def _watch(self, what: str, waited_s: float, awaited: Callable[[], list[int]]) -> None:
        """Called while this rank waits."""
        now = time.monotonic()
        if self._check_others is not None and now - self._checked_at > CHECK_S:
            self._checked_at = now
            self._check_others(self._comm)
        if self._timeout_s and waited_s > self._timeout_s:
            ranks = awaited()
            missing = ", ".join(f"rank {rank} on {self._names[rank]}" for rank in ranks) or "the others"
            raise LostRankError(
                f"rank {self.rank} on {self._names[self.rank]} waited {waited_s:.1f} s in {what} for {missing}"
            )

    def _check(self, pick: Pick, send: NDArray[Any], dtype: str, op: str) -> None:
        if dtype not in STORAGE or send.dtype != STORAGE[dtype]:
            raise ConfigError(f"allreduce of {dtype} needs one of {', '.join(STORAGE)}, stored so; got {send.dtype}")
        if op not in OPS and op != "mean":
            raise ConfigError(f"allreduce knows sum, mean, max, min and prod, got {op!r}")
        if pick.algorithm == SHARED and self.size > 1 and self.shared is None:
            where = f"they are on {len(self.hosts)}" if len(self.hosts) > 1 else "and they could not map any"
            raise ConfigError(f"shared memory needs all ranks on one host; {where}")
        if self.fixed_order and pick.algorithm not in ORDERED:
            raise ConfigError(f"{pick.algorithm} does not add in the order of ranks; choose from: {', '.join(ORDERED)}")

    # --- the others ---

    def start_reduce_scatter(
        self, send: NDArray[Any], receive: NDArray[Any], *, dtype: str = "float32", op: str = "sum",
        algorithm: str = "direct",
    ) -> Operation:  # fmt: skip
        """Starts combining `send` (size·n) over all ranks; rank r gets part r (n) in `receive`."""
        schedule = make_schedule("reduce_scatter", algorithm, self.size)
        whole = np.array(send)
        part = receive.size

        def finish() -> None:
            _copy(whole[self.rank * part : (self.rank + 1) * part], receive)
            if op == "mean":
                divide(receive, self.size, dtype=dtype)

        return self._run(schedule, _even(whole, schedule), dtype, "sum" if op == "mean" else op, 0, finish)

    def start_allgather(self, send: NDArray[Any], receive: NDArray[Any], *, algorithm: str = "ring") -> Operation:
        """Starts bringing `send` (n) of all ranks into `receive` (size·n), in the order of ranks."""
        schedule = make_schedule("allgather", algorithm, self.size)
        _copy(send, receive[self.rank * send.size : (self.rank + 1) * send.size])
        return self._run(schedule, _even(receive, schedule), "uint8", "sum", 0, None)

    def start_broadcast(self, buffer: NDArray[Any], *, root: int, algorithm: str = "binomial") -> Operation:
        """Starts bringing `root`'s `buffer` to all."""
        schedule = make_schedule("broadcast", algorithm, self.size, root=root)
        return self._run(schedule, _even(buffer, schedule), "uint8", "sum", 0, None)

    def start_reduce(self, buffer: NDArray[Any], *, root: int, dtype: str = "float32", op: str = "sum") -> Operation:
        """Starts combining all ranks' `buffer` in place at `root`; elsewhere it holds parts of the sum afterwards."""
        schedule = make_schedule("reduce", "binomial", self.size, root=root)
        return self._run(schedule, _even(buffer, schedule), dtype, op, 0, None)

    def start_alltoall(self, send: NDArray[Any], receive: NDArray[Any], *, algorithm: str = "pairwise") -> Operation:
        """Starts bringing part d of `send` (size·n) to rank d, where it becomes part r of `receive` (size·n)."""
        schedule = make_schedule("alltoall", algorithm, self.size)
        part, size, rank = send.size // self.size, self.size, self.rank
        passing: dict[int, NDArray[Any]] = {}

        def place(chunk: int) -> NDArray[Any]:
            source, to = divmod(chunk, size)
            if source == rank:
                return send[to * part : (to + 1) * part]
            if to == rank:
                return receive[source * part : (source + 1) * part]
            return passing.setdefault(chunk, np.empty(part, dtype=send.dtype))

        _copy(place(rank * size + rank), receive[rank * part : (rank + 1) * part])
        places: Places = lambda chunks: [place(chunk) for chunk in chunks]  # noqa: E731
        return self._run(schedule, places, "uint8", "sum", 0, None)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self._running(self._comm.Ibarrier().Test, "barrier", list, None).wait()

    def close(self) -> None:
        """Frees what MPI holds; collective."""
        self.shared = None
        self._comm.Free()

    def _run(
        self, schedule: Schedule, places: Places, dtype: str, op: str, segment_bytes: int,
        finish: Callable[[], None] | None,
    ) -> Operation:  # fmt: skip
        self._next_tag = (self._next_tag + 1) % NUM_TAGS
        run = ScheduleRun(
            self._comm, schedule.steps(self.rank), places,
            dtype=dtype, op=op, tag=self._next_tag, segment_bytes=segment_bytes, scratch=self._scratch,
        )  # fmt: skip

        def done() -> None:
            self._bytes_sent += run.bytes_sent
            if finish is not None:
                finish()

        operation = self._running(run.test, schedule.collective, lambda: run.awaited, done)
        operation.test()
        return operation


def _even(buffer: NDArray[Any], schedule: Schedule) -> Places:
    """Chunks as even parts of a buffer; neighbouring ones are one part."""
    bounds = schedule.bounds(buffer.size)

    def places(chunks: Sequence[int]) -> list[NDArray[Any]]:
        if isinstance(chunks, range) and chunks.step == 1:
            return [buffer[bounds[chunks.start] : bounds[chunks.stop]]] if chunks else []
        return [buffer[bounds[chunk] : bounds[chunk + 1]] for chunk in chunks]

    return places


def _copy(source: NDArray[Any], target: NDArray[Any]) -> None:
    if source.ctypes.data != target.ctypes.data:
        target[...] = source


__all__ = ["DONE", "Chooser", "Collectives", "Operation", "SharedRequest", "wait_politely"]
