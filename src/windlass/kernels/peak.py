"""What this machine can do at most: the micro-kernel on data in its first cache, and the copying of large arrays."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np

from windlass.kernels.gemm import gemm_rows
from windlass.kernels.jit import LANES, TILE_COLUMNS, TILE_ROWS, kernel
from windlass.kernels.threads import parallel_for

DEPTH = 128
REPEATS = 2000
ROUNDS = 7


@kernel
def _tile_task(task: int, thread: int, a: Any, b: Any, c: Any, size: int) -> None:
    for _ in range(REPEATS):
        gemm_rows(TILE_ROWS, a, 0, DEPTH + LANES, b, 0, TILE_COLUMNS, c, thread * size, TILE_COLUMNS, DEPTH, 1)


@kernel
def _tiles(a: Any, b: Any, c: Any, size: int, tasks: int, threads: int) -> None:
    parallel_for(_tile_task, tasks, threads, (a, b, c, size))


@kernel
def _copy_task(task: int, thread: int, source: Any, target: Any, size: int) -> None:
    for i in range(task * size, (task + 1) * size):
        target[i] = source[i]


@kernel
def _copies(source: Any, target: Any, size: int, tasks: int, threads: int) -> None:
    parallel_for(_copy_task, tasks, threads, (source, target, size))


@cache
def measured_peak(threads: int) -> float:
    """FLOP/s of the matrix micro-kernel on `threads` threads: the best of a few rounds."""
    a, b = np.ones(TILE_ROWS * (DEPTH + LANES), np.float32), np.ones(DEPTH * TILE_COLUMNS, np.float32)
    size = TILE_ROWS * TILE_COLUMNS
    c = np.zeros(threads * size, np.float32)
    seconds = _best(lambda: _tiles(a, b, c, size, threads, threads))
    return 2.0 * TILE_ROWS * TILE_COLUMNS * DEPTH * REPEATS * threads / seconds


@cache
def measured_bandwidth(threads: int, *, num_bytes: int = 128 << 20) -> float:
    """Bytes/s of copying, read and written together, of an array that no cache holds."""
    source = np.ones(num_bytes // 4, np.float32)
    target = np.zeros_like(source)
    tasks = 16
    seconds = _best(lambda: _copies(source, target, source.size // tasks, tasks, threads))
    return 2.0 * source.nbytes / seconds


def _best(run: Any) -> float:
    run()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
