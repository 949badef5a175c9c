"""Weights as they are kept: codes of 16 bits, widened to float32 where they are used.

A parameter under a recipe is *hidden*: its data is one NaN seen through strides of zero, so it takes no memory, keeps
its shape, and whoever reads it past these classes gets NaN and not something that looks right.  Its numbers are in
`codes`, which lie as the parameter did.  There is no other copy.

The optimizer sees its own parameters, which may be those of the network or flat ones that hold many of them: a
`Piece` is one of the optimizer's with the network's that lie in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from windlass.errors import ConfigError
from windlass.plan.number import FLOAT32, NumberFormat, Rounding
from windlass.plan.recipe import Recipe
from windlass.precision.quantize import DTYPES
from windlass.precision.rounder import Rounder, widen


@cache
def rounder(number: NumberFormat, rounding: Rounding, *, coded: bool) -> Rounder:
    """What rounds to a format, counting: to its codes, or to float32."""
    return Rounder(number, rounding, DTYPES[number.storage] if coded else torch.float32, counted=True)


def hidden(like: Tensor) -> Tensor:
    """NaN in this shape, in the memory of one number."""
    return torch.full((1,), torch.nan, device=like.device).expand(like.shape)


@dataclass(eq=False)
class Stored:
    """One parameter of the network as codes.

    Attributes:
        name: its path in the network.
        parameter: of the network, hidden.
        number: its format.
        codes: of its shape, with the strides that the parameter had.
        offset: of its first number in the optimizer's parameter.
        first: numbers of the parameter before these, where they are a part of it.
        gradient_number: the format of its gradient.
        update_number: the format of its updates.
        gradient: codes of its gradient, or None: it stands in the parameter's ``grad``, or there is none.
        version: how often it was written.
        rounded: how often its gradient was rounded since the last update.
    """

    name: str
    parameter: nn.Parameter
    number: NumberFormat
    codes: Tensor
    gradient_number: NumberFormat
    update_number: NumberFormat
    offset: int = 0
    first: int = 0
    gradient: Tensor | None = None
    version: int = 0
    rounded: int = 0

    def wide(self) -> Tensor:
        """Its numbers in float32, in new memory."""
        return self.widen_into(torch.empty_strided(self.codes.shape, self.codes.stride()))

    def widen_into(self, out: Tensor) -> Tensor:
        """Its numbers in float32."""
        return widen(self.codes, self.number, out)

    def wide_gradient(self, out: Tensor) -> Tensor:
        """Its gradient in float32, zero where there is none."""
        if self.gradient is None:
            return out.zero_()
        return widen(self.gradient, self.gradient_number, out)

    def part(self, rows: slice) -> Stored:
        """A range of its first dimension, by the same codes."""
        gradient = None if self.gradient is None else self.gradient[rows]
        first = rows.start * math.prod(self.codes.shape[1:])
        return replace(self, codes=self.codes[rows], gradient=gradient, first=first)

    def view(self, whole: Tensor) -> Tensor:
        """Its part of a tensor that lies as the optimizer's parameter does."""
        if not self.offset and whole.shape == self.codes.shape and whole.stride() == self.codes.stride():
            return whole
        return whole.as_strided(self.codes.shape, self.codes.stride(), whole.storage_offset() + self.offset)


def store(model: nn.Module, recipe: Recipe, share: float) -> list[Stored]:
    """The parameters of a network, whose codes are still to be written.

    Raises:
        ConfigError: one is not float32 on the CPU.
    """
    stored = []
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ConfigError(
                f"{name}: a network under a recipe has float32 parameters on the CPU, got {parameter.dtype} on "
                f"{parameter.device}; model.float().cpu() makes them so"
            )
        if torch.empty_like(parameter).stride() != parameter.stride():
            parameter.data = parameter.data.contiguous()
        entry = Stored(name, parameter, FLOAT32, parameter.data, FLOAT32, FLOAT32)
        set_formats(entry, recipe, share)
        stored.append(entry)
    return stored


def set_formats(entry: Stored, recipe: Recipe, share: float) -> None:
    """The formats in force after this share of the run, for codes that will be written anew."""
    number, update, gradient = (recipe.number(role, entry.name, share) for role in ("weights", "updates", "gradients"))
    entry.codes = torch.empty_strided(entry.codes.shape, entry.codes.stride(), dtype=DTYPES[number.storage])
    if entry.gradient is not None and gradient != entry.gradient_number:
        wide = entry.wide_gradient(torch.empty_strided(entry.gradient.shape, entry.gradient.stride()))
        entry.gradient = torch.empty_like(wide, dtype=DTYPES[gradient.storage])
        rounder(gradient, "nearest", coded=True)(wide, entry.gradient, (0, 0, 0, 0))
    entry.number, entry.update_number, entry.gradient_number = number, update, gradient


@dataclass(eq=False)
class Piece:
    """What the optimizer steps at once.

    Attributes:
        parameter: the optimizer's.
        members: the network's parameters in it.
        gradient: codes or numbers of its gradient as one tensor, where the members' are views of it; else None.
    """

    parameter: nn.Parameter
    members: list[Stored]
    gradient: Tensor | None = None
    strides: tuple[int, ...] = field(default=())
    _hidden: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    def empty(self) -> Tensor:
        """Memory that lies as the optimizer's parameter; what belongs to no member is zero."""
        if len(self.members) == 1 and self.members[0].codes.numel() == self.parameter.numel():
            return torch.empty_strided(self.parameter.shape, self.strides)
        return torch.zeros(self.parameter.shape)

    def show(self) -> None:
        """The optimizer's parameter has its numbers, and the members are views of it."""
        whole = self.empty()
        for member in self.members:
            member.widen_into(member.view(whole))
        self.parameter.data = whole
        for member in self.members:
            if member.parameter is not self.parameter:
                member.parameter.data = member.view(whole)

    def hide(self) -> None:
        """Nobody has numbers but the codes."""
        if not self._hidden:
            own = {id(parameter): parameter for parameter in (self.parameter, *(x.parameter for x in self.members))}
            self._hidden = [(parameter, hidden(parameter)) for parameter in own.values()]
        for parameter, nothing in self._hidden:
            parameter.data = nothing

    @property
    def is_shown(self) -> bool:
        """Whether the numbers can be read."""
        return self.parameter.stride() == self.strides
