"""Gradients of one of several workers, rounded to 16 bits before they travel."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.plan.recipe import Recipe
from windlass.precision.lowered import Lowered
from windlass.precision.quantize import DTYPES
from windlass.precision.rounder import widen
from windlass.precision.stored import Stored, rounder


class CodeKeeper:
    """Keeps gradients in flat tensors of codes (`engine.gradients.Keeper`).

    The bits by which a worker rounds its part are its own.

    Args:
        recipe: says the format.
        rank: of this worker.

    Attributes:
        dtype: of the flat tensors.
    """

    def __init__(self, recipe: Recipe, *, rank: int) -> None:
        self.dtype = DTYPES[recipe.gradients.storage]
        self._rank = rank
        self._lowered: Lowered | None = None
        self._stored: dict[str, Stored] = {}

    def use(self, lowered: Lowered) -> None:
        """The network whose gradients these are."""
        self._lowered = lowered
        self._stored = {entry.name: entry for entry in lowered.stored}

    def put(self, name: str, view: Tensor, gradient: Tensor) -> None:
        """`view` becomes the codes of a gradient."""
        assert self._lowered is not None, "gradients come after the network is under its recipe"
        sites, number = self._lowered.sites, self._stored[name].gradient_number
        words = sites.words("gradients", name, self._rank)
        counters = sites.tally.of("gradients", name, number)
        rounder(number, self._lowered.recipe.rounding, coded=True)(gradient, view, words, 0, counters)

    def add(self, name: str, view: Tensor, gradient: Tensor) -> None:
        """The same, with what `view` holds."""
        wide = torch.empty_strided(view.shape, view.stride())
        self.put(name, view, widen(view, self._stored[name].gradient_number, wide).add_(gradient))
