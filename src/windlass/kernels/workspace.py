"""Memory that stays: fresh pages cost more than many a kernel.

Scratch memory belongs to one call at a time.  A lasting array outlives the call that fills it; when nobody refers to
it any more, the next one of its size gets its memory.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_local = threading.local()
_idle: dict[int, list[Floats]] = {}
ALIGNMENT = 64
_PER_LINE = ALIGNMENT // 4

LARGEST_IDLE = 1 << 30
"""Bytes for lasting arrays that are kept while they are not in use, at most."""


def scratch(*sizes: int) -> list[Floats]:
    """Arrays of so many numbers, aligned to cache lines; their contents are arbitrary.

    They are one block that belongs to the calling thread, grows to the largest demand and is given again by the
    next call: use them within one kernel only.
    """
    rounded = [-(-size // _PER_LINE) * _PER_LINE for size in sizes]
    total = sum(rounded) + _PER_LINE
    block: Floats | None = getattr(_local, "block", None)
    if block is None or block.size < total:
        _local.block = None
        _local.block = block = np.empty(total, np.float32)
    start = _aligned(block)
    arrays = []
    for size, room in zip(sizes, rounded, strict=True):
        arrays.append(block[start : start + size])
        start += room
    return arrays


def lasting(size: int) -> Floats:
    """An array of so many numbers, aligned to cache lines; its contents are arbitrary.

    Its memory is its own as long as this very array lives: a NumPy view of it does not keep it, a tensor made of it
    by `torch.from_numpy` does.
    """
    blocks = _idle.get(size)
    try:
        block = blocks.pop() if blocks else np.empty(size + _PER_LINE, np.float32)
    except IndexError:  # another thread was faster
        block = np.empty(size + _PER_LINE, np.float32)
    start = _aligned(block)
    array = block[start : start + size]
    weakref.finalize(array, _take_back, size, block).atexit = False
    return array


def free_scratch() -> None:
    """Gives this thread's scratch memory back, and that of lasting arrays which are not in use."""
    _local.block = None
    _idle.clear()


def _aligned(block: Floats) -> int:
    return (-block.ctypes.data % ALIGNMENT) // 4


def _take_back(size: int, block: Floats) -> None:
    """Keeps the memory of an array that is gone."""
    idle = sum(each.nbytes for blocks in list(_idle.values()) for each in blocks)
    if idle + block.nbytes <= LARGEST_IDLE:
        _idle.setdefault(size, []).append(block)
