"""How ranks sum a buffer, by the plan's name for it: the place where schedules stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from windlass.engine.world import Request, World

StartSum = Callable[[NDArray[Any], NDArray[Any]], Request]


def _library(world: World) -> StartSum:
    return world.start_sum


ALLREDUCE: dict[str, Callable[[World], StartSum]] = {"library": _library}
"""By the value of the plan's lever ``allreduce``: a world to its function that starts a sum."""
