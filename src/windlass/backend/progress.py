"""Who runs a group's operations, and when.

Collective operations run one after the other in the order in which they were asked for, which is the same on
every rank; messages between two ranks run beside them.  Whoever needs a result runs the operations until it stands:
a synchronous call runs everything itself and pays no other thread.  A thread of the group does so for operations
that nobody waits for yet, and gives way as soon as somebody does.

A callback of a future runs on the thread that completed the operation.  When it asks for an operation of the same
group, that one runs at once, before those that wait in the queue: it was asked for by the callback on every rank, and
every rank attaches the callback before it asks for the next operation (PowerSGD's callbacks wait for such operations,
which would wait for ever behind themselves).

Waiting is polite, as in `engine.world`: some tests, then sleeps between tests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count

from windlass.backend.exchange import Steps
from windlass.backend.failure import LostPeerError

NUM_SPINS = 200
"""Tests before a waiting rank begins to sleep."""
SLEEP_S = 30e-6
"""How long it sleeps between tests; later a thousandth of the time that it has waited, up to `LONG_SLEEP_S`."""
LONG_SLEEP_S = 500e-6
"""The longest sleep."""
CHECK_S = 0.01
"""Seconds between two looks at the clock's limits."""
NOTE_S = 0.2
"""Seconds after which a waiting rank notes in the store where it waits."""
RETRY_S = 0.002
"""How long a thread waits for its turn before it looks whether its operation is done."""


_ABANDONED: list[Operation] = []
"""Operations of lost groups: MPI may still write into their tensors, which therefore stay."""


class Operation:
    """One operation under way.

    Args:
        name: what it is, for a person.
        steps: runs it; see `exchange`.
        number: its place among the collective operations of its group; -1 for messages.
        timeout_s: seconds that it may take.
        missing: the ranks that it waits for, where this rank can tell.
    """

    __slots__ = ("callbacks", "done", "error", "missing", "name", "noted", "number", "source", "started", "steps",
                 "timeout_s")  # fmt: skip

    def __init__(
        self,
        name: str,
        steps: Steps,
        *,
        number: int = -1,
        timeout_s: float,
        missing: Callable[[], set[int]] | None = None,
    ) -> None:
        self.name, self.steps, self.number, self.timeout_s = name, steps, number, timeout_s
        self.missing = missing
        self.done = False
        self.noted = False
        self.source = -1
        self.started = 0.0
        self.error: BaseException | None = None
        self.callbacks: list[Callable[[], None]] = []

    def __str__(self) -> str:
        return self.name if self.number < 0 else f"{self.name} (operation {self.number} of the group)"


class Progress:
    """Runs the operations of one group.

    Args:
        threaded: whether MPI allows a second thread; if not, nothing runs but in `run_until`.
        explain: turns an operation's error into what the caller sees, and says whether the group is lost.
        late: an operation's error when its time is over.
        note: notes that this rank waits in an operation.
    """

    def __init__(
        self,
        *,
        threaded: bool,
        explain: Callable[[Operation, BaseException], BaseException],
        late: Callable[[Operation, float], LostPeerError],
        note: Callable[[Operation], None],
    ) -> None:
        self.threaded = threaded
        self.lost: BaseException | None = None
        self._explain, self._late, self._note = explain, late, note
        self._queue: deque[Operation] = deque()
        self._messages: list[Operation] = []
        self._turn = threading.RLock()
        self._runner: int | None = None
        self._wake = threading.Condition()
        self._num_waiting = 0
        self._thread: threading.Thread | None = None
        self._closed = False
        self._numbers = count()

    # --- asking for operations ------------------------------------------------------------------------------

    def next_number(self) -> int:
        """The number of the next collective operation."""
        return next(self._numbers)

    def run_now(self, operation: Operation) -> None:
        """Runs what was asked for before, and this operation, to its end; its error is left in it."""
        if self._runner == threading.get_ident():
            self._run_inside(operation)
            return
        self._queue.append(operation)
        self.run_until(operation)

    def start(self, operation: Operation) -> None:
        """Puts a collective operation in its place; the group's thread runs it if nobody waits for it."""
        if self._runner == threading.get_ident():
            self._run_inside(operation)
            return
        self._queue.append(operation)
        self._call_thread()

    def post(self, operation: Operation) -> None:
        """Starts a message between two ranks, which runs beside all else."""
        if not self._advance(operation):
            with self._wake:
                self._messages.append(operation)
            self._call_thread()

    def when_done(self, operation: Operation, callback: Callable[[], None]) -> None:
        """Calls back when the operation is done, at once if it is."""
        with self._wake:
            if not operation.done:
                operation.callbacks.append(callback)
                return
        callback()

    # --- running them ---------------------------------------------------------------------------------------

    def run_until(self, operation: Operation, timeout_s: float = 0.0) -> None:
        """Returns when the operation is done; raises `LostPeerError` after `timeout_s`, if that is more than 0."""
        limit = time.monotonic() + timeout_s if timeout_s > 0 else float("inf")
        with self._wake:
            self._num_waiting += 1
        try:
            while not operation.done:
                if self._turn.acquire(timeout=RETRY_S):
                    try:
                        self._run(lambda: operation.done or time.monotonic() > limit)
                    finally:
                        self._turn.release()
                if not operation.done and time.monotonic() > limit:
                    raise self._late(operation, timeout_s)
        finally:
            with self._wake:
                self._num_waiting -= 1
                if self._queue or self._messages:
                    self._wake.notify_all()

    def turn(self) -> None:
        """Moves everything on by one step, unless another thread does so."""
        if self._turn.acquire(blocking=False):
            try:
                self._step()
            finally:
                self._turn.release()

    def _run(self, enough: Callable[[], bool]) -> None:
        """Moves operations on until it is enough or there are none; the caller has the turn."""
        spins, waited_from, checked = 0, 0.0, 0.0
        while not enough():
            if self._step():
                spins = 0
                continue
            if not self._queue and not self._messages:
                return
            spins += 1
            if spins <= NUM_SPINS:
                continue
            now = time.monotonic()
            if spins == NUM_SPINS + 1:
                waited_from = checked = now
            if now - checked > CHECK_S:
                checked = now
                self._check_clock(now)
            time.sleep(min(max(SLEEP_S, (now - waited_from) / 1000), LONG_SLEEP_S))

    def _step(self) -> bool:
        """One step of the first collective operation and of every message; whether one of them has ended."""
        before, self._runner = self._runner, threading.get_ident()
        try:
            ended = False
            if self._messages:
                over = [message for message in self._messages if self._advance(message)]
                ended = bool(over)
                if over:
                    with self._wake:
                        self._messages = [message for message in self._messages if message not in over]
            if self._queue:
                ended |= self._advance(self._queue[0], remove=True)
            return ended
        finally:
            self._runner = before

    def _advance(self, operation: Operation, *, remove: bool = False) -> bool:
        """Runs an operation until it waits; whether it is done."""
        if operation.done:
            return True
        try:
            if self.lost is not None:
                raise self.lost
            next(operation.steps)
            return False
        except StopIteration:
            error = None
        except Exception as caught:
            error = caught if caught is self.lost else self._explain(operation, caught)
        if remove:
            self._queue.popleft()
        self._finish(operation, error)
        return True

    def _finish(self, operation: Operation, error: BaseException | None) -> None:
        operation.error = error
        with self._wake:
            operation.done = True
            callbacks, operation.callbacks = operation.callbacks, []
        for callback in callbacks:
            callback()

    def _run_inside(self, operation: Operation) -> None:
        """Runs an operation that a callback asked for, within the turn of the thread that called it."""
        waited_from = time.monotonic()
        spins = 0
        while not self._advance(operation):
            spins += 1
            if spins > NUM_SPINS:
                now = time.monotonic()
                self._check_limit(operation, now, waited_from)
                time.sleep(SLEEP_S)

    def _check_clock(self, now: float) -> None:
        for operation in [*self._messages, *list(self._queue)[:1]]:
            operation.started = operation.started or now
            self._check_limit(operation, now, operation.started)

    def _check_limit(self, operation: Operation, now: float, since: float) -> None:
        waited_s = now - since
        if not operation.noted and waited_s > min(NOTE_S, operation.timeout_s / 10) and operation.number >= 0:
            operation.noted = True
            self._note(operation)
        if waited_s > operation.timeout_s and self.lost is None:
            self.give_up(self._late(operation, operation.timeout_s), operation)

    def give_up(self, error: BaseException, operation: Operation | None = None) -> None:
        """Ends the group: every operation under way, and every later one, raises `error`."""
        self.lost = error
        # MPI may still write into their buffers.
        _ABANDONED.extend([*self._messages, *self._queue, *([operation] if operation else [])])

    # --- the group's thread ---------------------------------------------------------------------------------

    def _call_thread(self) -> None:
        if not self.threaded:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True, name="windlass-group")
            self._thread.start()
        elif not self._num_waiting:
            with self._wake:
                self._wake.notify_all()

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(
                    lambda: self._closed or (bool(self._queue or self._messages) and not self._num_waiting)
                )
                if self._closed:
                    return
            with self._turn:
                self._run(lambda: self._closed or self._num_waiting > 0)

    def close(self, *, finish: bool) -> None:
        """Stops the thread; with `finish` it first ends the collective operations that nobody has waited for."""
        if finish and self._runner != threading.get_ident():
            for operation in list(self._queue):
                if self.lost is None:
                    self.run_until(operation)
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.threaded = False
        if self.lost is None:
            for message in self._messages:
                message.steps.close()
            self._messages.clear()
