"""`Adder`: what an optimizer has added to a parameter is rounded and added to its codes, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from windlass.kernels.rounding import Updated, update_pass
from windlass.kernels.rounding.reference import Words
from windlass.plan.number import FLOAT32, Fixed, NumberFormat, Rounding
from windlass.precision.quantize import DTYPES
from windlass.precision.rounder import PLAIN, STORAGES, numbers_of


class Adder:
    """Adds updates of one format to codes of another.

    Args:
        update: the format of updates.
        number: that of the codes: fixed point.
        rounding: of both.
    """

    __slots__ = ("_dtype", "_numbers", "_pass")

    def __init__(self, update: NumberFormat, number: Fixed, rounding: Rounding) -> None:
        self._dtype = DTYPES[number.storage]
        form = "fixed" if isinstance(update, Fixed) else update.storage
        self._pass: Callable[..., tuple[int, int, int, float, int, int, int, int, float]] = update_pass(
            form, STORAGES[self._dtype], rounding
        )
        self._numbers = *numbers_of(update), *numbers_of(number)

    def __call__(
        self, new: Tensor, codes: Tensor, update_words: Words, words: Words, first: int = 0
    ) -> Updated | None:  # fmt: skip
        """`codes` become those of the rounded sum of their numbers and of the rounded change to `new`.

        Args:
            new: float32.
            codes: of its shape.
            update_words: the key of the random bits by which changes are rounded.
            words: of those by which sums are.
            first: element i takes the random bits of position `first` + i, of both keys.

        Gives None, and does nothing, where one of the tensors is not contiguous on the CPU.
        """
        if not (
            type(new) in PLAIN
            and type(codes) in PLAIN
            and new.dtype is torch.float32
            and codes.dtype is self._dtype
            and new.shape == codes.shape
            and new.is_contiguous()
            and codes.is_contiguous()
            and new.is_cpu
            and codes.is_cpu
        ):
            return None
        return Updated(
            *self._pass(
                new.data_ptr(), codes.data_ptr(), new.numel(), first, *update_words, *words, *self._numbers,
                torch.get_num_threads(),
            )
        )  # fmt: skip


@cache
def adder(update: NumberFormat, number: NumberFormat, rounding: Rounding) -> Adder | None:
    """What adds updates of one format to codes of another; None where several passes do it."""
    if update == FLOAT32 or not isinstance(number, Fixed):
        return None
    return Adder(update, number, rounding)
