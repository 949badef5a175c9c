"""Runs one rank's part of a schedule over MPI: non-blocking messages, segments, reductions by a kernel.

Theory of operation.  Messages are bytes, so every dtype travels.  All messages of a step are posted together.
``copy`` receives straight into the buffer; ``add`` and ``fold`` receive into scratch memory.  Additions are made in
the order in which the step lists them, each as soon as it has arrived and, where the step also sends that chunk,
as soon as the sends are done; ``fold`` sums everything in the order of ranks when all is there.  A long message
travels in segments, so that one is added while the next is on its way.  Nothing here waits: `test` does what can
be done and says whether all is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from windlass.kernels.collective.combine import OPS, WIDE, combine, kind_of, make_steps
from windlass.plan.collective import Receive, Send, Step

if TYPE_CHECKING:
    from mpi4py import MPI

Places = Callable[[Sequence[int]], list[NDArray[Any]]]
"""The parts of this rank's memory that hold these chunks, as 1-D contiguous views."""


class Scratch:
    """Memory for messages, kept from one operation to the next."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """At least so many bytes; give them back with `give`."""
        fits = [index for index, block in enumerate(self._free) if block.size >= num_bytes]
        if fits:
            return self._free.pop(min(fits, key=lambda index: self._free[index].size))
        return np.empty(max(64, num_bytes), dtype=np.uint8)

    def give(self, block: NDArray[np.uint8]) -> None:
        """Takes memory back; the smallest of many blocks goes."""
        self._free.append(block)
        if len(self._free) > 64:
            self._free.sort(key=lambda kept: kept.size)
            self._free.pop(0)


@dataclass(slots=True)
class _Arrival:
    """A segment that was asked for: where it goes, and what is done with it."""

    targets: list[NDArray[Any]]
    memory: NDArray[Any] | None
    op: str
    source: int
    request: int
    behind_sends: bool


class ScheduleRun:
    """One rank's part of one operation.

    Args:
        comm: the ranks.
        steps: this rank's program.
        places: where chunks stand.
        dtype, op: what is combined and how.
        tag: of this operation alone among those under way.
        segment_bytes: longer messages travel in segments; 0: whole.
        scratch: memory for messages.
    """

    def __init__(
        self, comm: MPI.Intracomm, steps: Sequence[Step], places: Places, *,
        dtype: str, op: str, tag: int, segment_bytes: int, scratch: Scratch,
    ) -> None:  # fmt: skip
        from mpi4py import MPI

        self._mpi = MPI
        self._comm, self._places, self._tag = comm, places, tag
        self._dtype, self._op, self._scratch = dtype, op, scratch
        self._wide = WIDE[dtype]
        self._segment_bytes = segment_bytes
        self._steps = deque(steps)
        self._requests: list[MPI.Request] = []
        self._sources: list[int] = []
        self._num_receives = 0
        self._pending: set[int] = set()
        self._arrivals: deque[_Arrival] = deque()
        self._folds: list[_Arrival] = []
        self._lent: list[NDArray[np.uint8]] = []
        self.bytes_sent = 0
        self.waits_for: list[int] = []
        self._posted = False

    def test(self) -> bool:
        """Does what can be done without waiting; whether all is done."""
        while True:
            if not self._posted:
                if not self._steps:
                    return True
                self._post(self._steps.popleft())
            if not self._advance():
                return False
            self._posted = False

    @property
    def awaited(self) -> list[int]:
        """The ranks whose messages have not come, or who have not taken theirs."""
        return sorted({self._sources[index] for index in self._pending})

    def _post(self, step: Step) -> None:
        self._requests, self._sources, self._folds = [], [], []
        sent = {chunk for message in step if isinstance(message, Send) for chunk in message.chunks}
        for message in step:
            if isinstance(message, Receive):
                self._receive(message, behind_sends=not sent.isdisjoint(message.chunks))
        self._num_receives = len(self._requests)
        for message in step:
            if isinstance(message, Send):
                self._send(message)
        self._pending = set(range(len(self._requests)))
        self._posted = True

    def _receive(self, message: Receive, *, behind_sends: bool) -> None:
        views = [view for view in self._places(message.chunks) if view.size]
        for targets in self._segments(views):
            length = sum(view.size for view in targets)
            if message.op == "copy" and len(targets) == 1:
                memory, into = None, targets[0]
            else:
                memory = into = self._borrow(length * targets[0].itemsize).view(targets[0].dtype)[:length]
            arrival = _Arrival(targets, memory, message.op, message.source, len(self._requests), behind_sends)
            (self._folds if message.op == "fold" else self._arrivals).append(arrival)
            self._requests.append(self._comm.Irecv(self._bytes(into), source=message.source, tag=self._tag))
            self._sources.append(message.source)

    def _send(self, message: Send) -> None:
        views = [view for view in self._places(message.chunks) if view.size]
        for parts in self._segments(views):
            if len(parts) == 1:
                outgoing = parts[0]
            else:
                length = sum(view.size for view in parts)
                outgoing = self._borrow(length * parts[0].itemsize).view(parts[0].dtype)[:length]
                np.concatenate(parts, out=outgoing)
            self.bytes_sent += outgoing.nbytes
            self._requests.append(self._comm.Isend(self._bytes(outgoing), dest=message.to, tag=self._tag))
            self._sources.append(message.to)

    def _segments(self, views: list[NDArray[Any]]) -> list[list[NDArray[Any]]]:
        """A message in parts; one of several views travels whole."""
        if not views:
            return []
        if len(views) > 1 or not self._segment_bytes or views[0].nbytes <= self._segment_bytes:
            return [views]
        length = max(1, self._segment_bytes // views[0].itemsize)
        return [[views[0][start : start + length]] for start in range(0, views[0].size, length)]

    def _bytes(self, view: NDArray[Any]) -> list[Any]:
        return [view.view(np.uint8), self._mpi.BYTE]

    def _borrow(self, num_bytes: int) -> NDArray[np.uint8]:
        block = self._scratch.take(num_bytes)
        self._lent.append(block)
        return block[:num_bytes]

    def _advance(self) -> bool:
        if self._pending:
            for index in self._mpi.Request.Testsome(self._requests) or ():
                self._pending.discard(index)
        sends_done = all(index < self._num_receives for index in self._pending)
        while self._arrivals:
            head = self._arrivals[0]
            if head.request in self._pending or (head.behind_sends and not sends_done):
                break
            self._apply(self._arrivals.popleft())
        if self._pending or self._arrivals:
            return False
        if self._folds:
            self._fold()
        while self._lent:
            self._scratch.give(self._lent.pop())
        return True

    def _apply(self, arrival: _Arrival) -> None:
        if arrival.memory is None:
            return
        at = 0
        for target in arrival.targets:
            part = arrival.memory[at : at + target.size]
            if arrival.op == "copy":
                target[...] = part
            else:
                combine(target, part, dtype=self._dtype, op=self._op)
            at += target.size

    def _fold(self) -> None:
        """Sums what came for each part and what stands there, in the order of ranks."""
        take, fold, give = make_steps(kind_of(self._dtype))
        rank, op = self._comm.Get_rank(), OPS[self._op]
        by_target: dict[int, list[_Arrival]] = {}
        for arrival in self._folds:
            by_target.setdefault(arrival.targets[0].ctypes.data, []).append(arrival)
        for arrivals in by_target.values():
            (target,) = arrivals[0].targets
            parts = [(arrival.source, arrival.memory) for arrival in arrivals] + [(rank, target)]
            parts.sort(key=lambda part: part[0])
            wide = self._borrow(target.size * np.dtype(self._wide).itemsize).view(self._wide)[: target.size]
            take(wide, parts[0][1], 0, target.size)
            for _, memory in parts[1:]:
                fold(wide, memory, 0, target.size, op)
            give(wide, target, 0, target.size)
