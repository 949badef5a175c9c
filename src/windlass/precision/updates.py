"""What an optimizer has added to weights is rounded to the format of updates, and added to their codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from windlass.plan.number import FLOAT32
from windlass.precision.adder import adder
from windlass.precision.sites import Sites
from windlass.precision.slices import SlicedState, slices
from windlass.precision.stored import Piece, Stored, hidden, rounder


class Updates:
    """Those of a network.

    Args:
        sites: say how numbers are rounded, and count.
    """

    def __init__(self, sites: Sites) -> None:
        self._sites = sites

    def step_sliced(
        self, optimizer: torch.optim.Optimizer, entry: Stored, gradient: Tensor | None, *, largest: int
    ) -> None:
        """One step of the optimizer on a large parameter, slice by slice of at most so many numbers."""
        parameter, state = entry.parameter, SlicedState(optimizer, entry.parameter, entry.codes)
        try:
            for rows in slices(entry.codes, largest):
                part = entry.part(rows)
                parameter.data = part.wide()
                if part.gradient is not None:
                    parameter.grad = part.wide_gradient(torch.empty_like(parameter.data))
                elif gradient is not None:
                    parameter.grad = gradient[rows]
                state.show(rows)
                type(optimizer).step(optimizer)
                state.take(rows)
                parameter.grad = None
                self._add(part, parameter.data)
        finally:
            state.give_back()
            parameter.grad = None
            parameter.data = hidden(entry.codes)
        self._updated(entry)

    def take(self, piece: Piece) -> None:
        """What the optimizer has added to the weights of a piece is rounded and added to their codes."""
        for entry in piece.members:
            self._add(entry, entry.view(piece.parameter.data))
            self._updated(entry)

    def _add(self, entry: Stored, new: Tensor) -> None:
        """The same for one parameter, or a part of it; `new` may be written."""
        sites, rounding, number = self._sites, self._sites.recipe.rounding, entry.update_number
        update_words, words = sites.words("updates", entry.name), sites.words("weights", entry.name)
        added = None if number == FLOAT32 else sites.tally.of("updates", entry.name, number)
        stored = None if entry.number == FLOAT32 else sites.tally.of("weights", entry.name, entry.number)
        at_once = adder(number, entry.number, rounding)
        done = at_once(new, entry.codes, update_words, words, entry.first) if at_once is not None else None
        if done is not None and added is not None and stored is not None:
            added.add(done[:4], new.numel())
            stored.add(done[5:], new.numel())
            sites.tally.note_moved(entry.name, done.moved)
            return
        old = entry.wide()
        update = torch.sub(new, old, out=new)
        if number != FLOAT32:
            rounder(number, rounding, coded=False)(update, update, update_words, entry.first, added)
            if not isinstance(update, FakeTensor):
                sites.tally.note_moved(entry.name, int(torch.count_nonzero(update)))
        old.add_(update)
        rounder(entry.number, rounding, coded=True)(old, entry.codes, words, entry.first, stored)

    def _updated(self, entry: Stored) -> None:
        """All of a parameter has its update."""
        entry.gradient = None
        entry.version += 1
        entry.rounded = 0
