"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = ("data", "forward", "backward", "communication", "update")
"""The parts of a step; ``communication`` is what is left of it after the overlap with the backward pass."""


class StepTimer:
    """Seconds of the parts of one step."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Starts a step."""
        self._started = time.perf_counter()
        self.parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time inside to this part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - started

    def end(self) -> dict[str, float]:
        """The step's seconds in all (``seconds``), by part (``forward_s`` …), and the rest (``other_s``)."""
        total = time.perf_counter() - self._started
        row = {"seconds": total} | {f"{name}_s": seconds for name, seconds in self.parts.items()}
        return row | {"other_s": max(0.0, total - sum(self.parts.values()))}
