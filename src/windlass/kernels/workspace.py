"""Scratch memory that stays: fresh pages cost more than many a kernel."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_local = threading.local()
ALIGNMENT = 64


def scratch(*sizes: int) -> list[Floats]:
    """Arrays of so many numbers, aligned to cache lines; their contents are arbitrary.

    They are one block that belongs to the calling thread, grows to the largest demand and is given again by the
    next call: use them within one kernel only.
    """
    per_line = ALIGNMENT // 4
    rounded = [-(-size // per_line) * per_line for size in sizes]
    total = sum(rounded) + per_line
    block: Floats | None = getattr(_local, "block", None)
    if block is None or block.size < total:
        _local.block = None
        _local.block = block = np.empty(total, np.float32)
    start = (-block.ctypes.data % ALIGNMENT) // 4
    arrays = []
    for size, room in zip(sizes, rounded, strict=True):
        arrays.append(block[start : start + size])
        start += room
    return arrays


def free_scratch() -> None:
    """Gives this thread's scratch memory back."""
    _local.block = None
