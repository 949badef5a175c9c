"""Rounding, prepared once and done often: from memory to memory, on PyTorch's threads."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from windlass.kernels.jit import LANES
from windlass.kernels.rounding.convert import COUNTED, FORMS, ROUNDINGS, STORAGE_NAMES, STORAGES
from windlass.kernels.rounding.flat import flat_pass
from windlass.kernels.rounding.planes import planes_pass, tiles_of
from windlass.kernels.rounding.reference import Array, Counts, Words

STREAM_BYTES = 8 << 20
"""Results of at least so many bytes are written past the caches."""


class Pass:
    """Rounds numbers in one way.

    Args:
        form: one of `FORMS`.
        rounding: one of `ROUNDINGS`.
        storage: one of `STORAGES`, how results are stored: float32; int8, int16 or int32 (codes of fixed point; NaN
            becomes 0); half (bits of float16 and bfloat16).
        low: the lowest number of the format.
        high: the highest.
        step: of fixed point, a power of two.
        counted: one of `COUNTED`: what is counted.  What is not is 0 in the result.

    Attributes:
        numbers: the range's ends, the step and its inverse, as `direct` takes them.
        most: numbers from which on a result may have to go past the caches, as `direct` does not write it.
    """

    def __init__(
        self, *, form: str, rounding: str, storage: str, low: float, high: float, step: float = 1.0,
        counted: str = "nothing",
    ) -> None:  # fmt: skip
        places = (FORMS, form), (STORAGE_NAMES, storage), (ROUNDINGS, rounding), (COUNTED, counted)
        self._key = tuple(names.index(name) for names, name in places)
        self._width = np.dtype(STORAGES[storage]).itemsize
        self.numbers = float(low), float(high), float(step), 1.0 / step
        self.most = STREAM_BYTES // self._width

    @cached_property
    def direct(self) -> Any:
        """The pass over fewer than `most` numbers.

        direct(source, target, size, first, *words, *numbers, threads) takes addresses and gives what `Counts` holds.
        """
        return flat_pass(*self._key, 0)

    def flat(self, source: int, target: int, size: int, first: int, words: Words, threads: int) -> Counts:
        """Rounds `size` float32 at `source` to `target`, which may be `source`, both addresses.

        Number i takes the random bits of position `first` + i of the key `words`.  At most so many threads.
        """
        kernel = flat_pass(*self._key, self._stream(source, target, size))
        return Counts(*kernel(source, target, size, first, *words, *self.numbers, max(1, threads)))

    def planes(
        self, source: int, target: int, planes: tuple[int, int, int], first: int, words: Words, threads: int
    ) -> Counts:
        """Likewise where memory holds [batch, pixels, channels], and positions are those of [batch, channels, pixels].

        `planes` are batch, channels and pixels.
        """
        batch, channels, pixels = planes
        size = batch * channels * pixels
        if min(channels, pixels) < 2 or size == 0 or ROUNDINGS[self._key[2]] != "stochastic":
            return self.flat(source, target, size, first, words, threads)
        stream = self._stream(source, target, size) if channels * pixels % LANES == 0 else 0
        tiles = tiles_of(planes, threads)
        counts, errors = np.zeros(3 * tiles.tasks, np.int64), np.zeros(tiles.tasks)
        planes_pass(*self._key, stream)(
            source, target, size, first, *words, *self.numbers, counts, errors, *tiles.scratch, *tiles.cut,
            tiles.tasks, tiles.threads,
        )  # fmt: skip
        saturated, zeroed, nan = counts.reshape(-1, 3).sum(axis=0).tolist()
        return Counts(saturated, zeroed, nan, float(errors.sum()))

    def _stream(self, source: int, target: int, size: int) -> int:
        """Whether the result goes past the caches."""
        return int(size * self._width >= STREAM_BYTES and target % 64 == 0 and target != source)


def round_array(
    src: Array, dst: Array, *, form: str, rounding: str, low: float, high: float, step: float = 1.0,
    words: Words = (0, 0, 0, 0), first: int = 0, planes: tuple[int, int, int] | None = None,
    counted: str = "nothing", threads: int = 1,
) -> Counts:  # fmt: skip
    """Rounds every number of `src` to `dst`, which may be `src`.

    Args:
        src: float32, one-dimensional and dense.
        dst: as many numbers of a type of `STORAGES`.
        form: see `Pass`, as for `rounding`, `low`, `high`, `step` and `counted`.
        rounding: likewise.
        low: likewise.
        high: likewise.
        step: likewise.
        counted: likewise.
        words: the key of random bits.
        first: the position whose random bits the first number takes.
        planes: batch, channels and pixels, where memory holds [batch, pixels, channels]; None: logical order.
        threads: at most so many.
    """
    storage = next(name for name, dtype in STORAGES.items() if dtype == dst.dtype)
    rounds = Pass(form=form, rounding=rounding, storage=storage, low=low, high=high, step=step, counted=counted)
    source, target = src.ctypes.data, dst.ctypes.data
    if planes is not None:
        return rounds.planes(source, target, planes, first, words, threads)
    return rounds.flat(source, target, src.size, first, words, threads)
