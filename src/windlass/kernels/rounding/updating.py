"""One pass over a parameter's codes: what an optimizer has added to the numbers is rounded, and added to the codes.

Of every weight w that is stored as a code, and w' that an optimizer has made of it, the new code is that of
Round_weights(w + Round_updates(w' - w)).  Operator by operator that takes six passes over arrays of float32; here a
number is read once and its code is written once.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from windlass.kernels.jit import kernel
from windlass.kernels.rounding.convert import FORMS, ROUNDINGS, STORAGE_NAMES, convert
from windlass.kernels.rounding.flat import share_of
from windlass.kernels.rounding.memory import array_at, on_stack
from windlass.kernels.rounding.noise import fill, ieee
from windlass.kernels.rounding.widen import multiply
from windlass.kernels.threads import parallel_for


class Updated(NamedTuple):
    """What an update did; the first four of each kind are what `Counts` holds.

    Attributes:
        moved: updates that were not zero after rounding.
    """

    update_saturated: int
    update_zeroed: int
    update_nan: int
    update_error: float
    moved: int
    saturated: int
    zeroed: int
    nan: int
    error: float


@cache
def _task(form: int, storage: int, rounding: int) -> Any:
    """The task-th run of `share` numbers; number 0 takes the random bits of position `first`."""

    def update_task(
        task, thread, source, target, size, share, first, update_words, update_numbers, words, numbers, counts, errors
    ):  # fmt: skip
        ieee()
        width = 1 if storage == 1 else 2 if storage == 2 else 4  # bytes of int8, int16, int32
        old, update, codes = on_stack(0, 1024), on_stack(0, 1024), on_stack(storage, 1024)  # CHUNK
        noise = on_stack(4, 1152)
        start = task * share
        last = min(size, start + share)
        moved = 0
        while start < last:
            length = min(1024, last - start)
            vectors = (length + 15) // 16
            new = array_at(0, source + 4 * start, length)
            stored = array_at(storage, target + width * start, length)
            for i in range(length):
                codes[i] = stored[i]
            for i in range(length, 16 * vectors):
                codes[i] = 0
            multiply(0, codes, old, 0, vectors, numbers[2])
            for i in range(length):
                update[i] = new[i] - old[i]
            for i in range(length, 16 * vectors):
                update[i] = 0
            shift = (first + start) % 8
            groups = (16 * vectors + shift + 63) // 64
            if rounding == 0:
                fill(noise, 0, (first + start) // 8, groups, update_words, update, 0)
            convert(form, 0, rounding, 1, 0, update, 0, update, 0, noise, shift, vectors, update_numbers, counts,
                    errors, 2 * task)  # fmt: skip
            for i in range(16 * vectors):
                moved += update[i] != 0
                old[i] += update[i]
            if rounding == 0:
                fill(noise, 0, (first + start) // 8, groups, words, update, 0)
            convert(0, storage, rounding, 1, 0, old, 0, codes, 0, noise, shift, vectors, numbers, counts, errors,
                    2 * task + 1)  # fmt: skip
            for i in range(length):
                stored[i] = codes[i]
            start += length
        counts[1536 + task] = moved  # 6 * MOST_TASKS

    return kernel(update_task, key=(form, storage, rounding))


@cache
def update_pass(form: str, storage: str, rounding: str) -> Any:
    """update(source, target, size, first, *update_words, *words, *update_numbers, *numbers, threads).

    `size` float32 at the address `source` are what an optimizer has made of the numbers whose codes are at `target`;
    these become the new codes.  Number i takes the random bits of position `first` + i, of one key for its update and
    of another for itself.  `update_numbers` and `numbers` are the ends of a format's range, its step and its inverse.
    Gives what `Updated` holds.

    Args:
        form: of `FORMS`, of updates; the codes are of fixed point.
        storage: int8, int16 or int32: the codes'.
        rounding: of `ROUNDINGS`, of both.
    """
    place = FORMS.index(form), STORAGE_NAMES.index(storage), ROUNDINGS.index(rounding)
    inner = _task(*place)

    def update(
        source, target, size, first, v0, v1, v2, v3, w0, w1, w2, w3, low, high, step, inverse, weight_low, weight_high,
        weight_step, weight_inverse, threads,
    ):  # fmt: skip
        update_numbers = (np.float32(low), np.float32(high), np.float32(step), np.float32(inverse))
        numbers = (
            np.float32(weight_low), np.float32(weight_high), np.float32(weight_step), np.float32(weight_inverse)
        )  # fmt: skip
        counts, errors = on_stack(5, 1792), on_stack(6, 512)  # 7 * MOST_TASKS, 2 * MOST_TASKS
        share = share_of(size)
        tasks = max(1, (size + share - 1) // share)
        for i in range(6 * tasks):
            counts[i] = 0
        for i in range(2 * tasks):
            errors[i] = 0.0
        counts[1536] = 0
        parallel_for(
            inner, tasks, min(tasks, threads),
            (source, target, size, share, first, (v0, v1, v2, v3), update_numbers, (w0, w1, w2, w3), numbers, counts,
             errors),
        )  # fmt: skip
        for task in range(1, tasks):
            for i in range(6):
                counts[i] += counts[6 * task + i]
            errors[0] += errors[2 * task]
            errors[1] += errors[2 * task + 1]
            counts[1536] += counts[1536 + task]
        return (
            counts[0], counts[1], counts[2], errors[0], counts[1536], counts[3], counts[4], counts[5], errors[1]
        )  # fmt: skip

    return kernel(update, key=place)
