"""Exposed communication: the time in which a worker does nothing but hand over data, or wait for it.

What goes on beside computation is not seen here: an exchange or a sum takes the time of its calls alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from windlass.engine.allreduce import StartSum
from windlass.engine.world import Request
from windlass.parallel.transport import Exchange, Shape, Tag, TorchTransport
from windlass.plan.mesh import Mesh


class Clock:
    """Seconds spent within it, nested uses once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._began = 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began


class _TimedRequest:
    """A sum under way, the time of whose calls is counted."""

    def __init__(self, request: Request, clock: Clock) -> None:
        self._request, self._clock = request, clock

    def test(self) -> bool:
        with self._clock:
            return self._request.test()

    def wait(self) -> None:
        with self._clock:
            self._request.wait()


def timed(start: StartSum, clock: Clock) -> StartSum:
    """The same sums, the time of whose calls is counted."""

    def start_timed(send: NDArray[Any], receive: NDArray[Any]) -> Request:
        with clock:
            return _TimedRequest(start(send, receive), clock)

    return start_timed


class TimedTransport(TorchTransport):
    """The same exchanges; what starting one takes is counted too: small messages move at once."""

    def __init__(self, mesh: Mesh, clock: Clock) -> None:
        super().__init__(mesh)
        self._clock = clock

    def start_exchange(
        self, axis: int, send: Sequence[torch.Tensor], shapes: Sequence[Shape], *, tag: Tag | None = None
    ) -> Exchange:
        """See `TorchTransport`."""
        with self._clock:
            return super().start_exchange(axis, send, shapes, tag=tag)
