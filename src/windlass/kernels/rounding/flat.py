"""The pass over an array whose logical order is that of memory.

A task takes a run of neighbours and a piece of random bits that stays in the first cache.  No array comes from Python,
all are numbers: for one task a call takes half a microsecond.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from windlass.kernels.jit import kernel
from windlass.kernels.rounding.convert import convert
from windlass.kernels.rounding.memory import array_at, on_stack
from windlass.kernels.rounding.noise import fill, fill_groups, ieee
from windlass.kernels.threads import parallel_for

CHUNK = 1024
"""Numbers between two fills of random bits: 2 KiB of them."""
LEAST_TASK = 16 * CHUNK
"""Fewer numbers take less time than it takes to wake a thread."""
MOST_TASKS = 256
"""What the stack has room to count apart."""


@cache
def run(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """Rounds neighbours in memory; what is left of a vector goes by way of a patch."""

    def run(src, dst, at, length, noise, noise_at, numbers, counts, errors, place):
        whole = length // 16
        if whole > 0:
            convert(form, storage, rounding, counted, stream, src, at, dst, at, noise, noise_at, whole,
                    numbers, counts, errors, place)  # fmt: skip
        done = 16 * whole
        if done < length:
            patch, patch_out = on_stack(0, 16), on_stack(storage, 16)
            for i in range(length - done):
                patch[i] = src[at + done + i]
            for i in range(length - done, 16):
                patch[i] = 0
            convert(form, storage, rounding, counted, 0, patch, 0, patch_out, 0, noise, noise_at + done,
                    1, numbers, counts, errors, place)  # fmt: skip
            for i in range(length - done):
                dst[at + done + i] = patch_out[i]

    return kernel(run, key=(form, storage, rounding, counted, stream))


@cache
def _task(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """Rounds one of `lots` lots of runs of `share` numbers; number 0 takes the random bits of position `first`."""
    key = (form, storage, rounding, counted, stream)
    neighbours = run(*key)

    def flat_task(lot, thread, source, target, size, share, lots, first, words, numbers, counts, errors):
        ieee()
        src, dst = array_at(0, source, size), array_at(storage, target, size)
        noise = on_stack(4, 1152)  # a chunk, a group for those that begin within a block, a vector beyond the end
        shift = first % 8
        tasks = (size + share - 1) // share
        for task in range(lot * tasks // lots, (lot + 1) * tasks // lots):
            start = task * share
            last = min(size, start + share)
            # No functions here: to hand over so many arrays takes as long as the work on a chunk.
            while start + 1024 <= last:  # CHUNK
                if rounding == 0:
                    fill_groups(4, noise, 0, (first + start) // 8, 4, words, src, start + 1024)
                    if shift > 0:
                        fill_groups(1, noise, 1024, (first + start) // 8 + 128, 1, words, src, start + 1024)
                convert(form, storage, rounding, counted, stream, src, start, dst, start, noise, shift, 64, numbers,
                        counts, errors, task)  # fmt: skip
                start += 1024
            if start < last:
                if rounding == 0:
                    fill(noise, 0, (first + start) // 8, (last - start + shift + 63) // 64, words, src, start)
                neighbours(src, dst, start, last - start, noise, shift, numbers, counts, errors, task)

    return kernel(flat_task, key=key)


@kernel
def share_of(size):
    """Numbers of a task: as few as pay, as many as leave no more than `MOST_TASKS`; threads have no say in it."""
    return max(16384, (size + 262143) // 262144 * 1024)  # LEAST_TASK, MOST_TASKS * CHUNK, CHUNK


@kernel
def lots_of(size, tasks, threads):
    """Into how many lots the tasks go, which threads take one by one.

    As many as there are threads, where a part of the numbers still lies in the cache of the core that has written it:
    PyTorch's operators give each thread one range.  Of more numbers every task is a lot, for whichever is free.
    """
    return min(tasks, threads) if size <= 1048576 else tasks


@cache
def flat_pass(form: int, storage: int, rounding: int, counted: int, stream: int) -> Any:
    """flat(source, target, size, first, w0, w1, w2, w3, low, high, step, inverse, threads).

    Rounds `size` float32 at the address `source` to the address `target`; the first takes the random bits of position
    `first`, under the key w0 to w3.  Gives what `Counts` holds.
    """
    key = (form, storage, rounding, counted, stream)
    inner = _task(*key)

    def flat(source, target, size, first, w0, w1, w2, w3, low, high, step, inverse, threads):
        numbers = (np.float32(low), np.float32(high), np.float32(step), np.float32(inverse))
        counts, errors = on_stack(5, 768), on_stack(6, 256)  # 3 * MOST_TASKS, MOST_TASKS
        share = share_of(size)
        tasks = max(1, (size + share - 1) // share)
        for i in range(3 * tasks):
            counts[i] = 0
        for i in range(tasks):
            errors[i] = 0.0
        lots = lots_of(size, tasks, threads)
        parallel_for(
            inner, lots, min(lots, threads),
            (source, target, size, share, lots, first, (w0, w1, w2, w3), numbers, counts, errors),
        )  # fmt: skip
        for task in range(1, tasks):
            counts[0] += counts[3 * task]
            counts[1] += counts[3 * task + 1]
            counts[2] += counts[3 * task + 2]
            errors[0] += errors[task]
        return counts[0], counts[1], counts[2], errors[0]

    return kernel(flat, key=key)
