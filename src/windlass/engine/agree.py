"""Errors that all ranks meet together, so that none waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from windlass.engine.world import World
from windlass.errors import WindlassError

T = TypeVar("T")


def on_root(world: World, action: Callable[[], T]) -> T:
    """Runs `action` on rank 0; every rank returns its value, or raises its error."""
    value: T | None = None
    error: WindlassError | None = None
    if world.rank == 0:
        try:
            value = action()
        except WindlassError as caught:
            error = caught
    value, error = world.broadcast((value, error))
    if error is not None:
        raise error
    return value


def on_all(world: World, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; if it fails on any, every rank raises the first one's error."""
    value: T | None = None
    error: WindlassError | None = None
    try:
        value = action()
    except WindlassError as caught:
        error = caught
    first = next((other for other in world.gather(error) if other is not None), None)
    if first is not None:
        raise first
    return value  # type: ignore[return-value]
