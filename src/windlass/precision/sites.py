"""Where numbers are rounded in a network: one site for every call of a layer, and what is the same for all.

Random bits are keyed by (seed, stream, step): the stream is a hash of role, layer and how often the layer has run in
this step; an element's counter is its place in the tensor of the whole batch, so the bits do not depend on how many
workers share the batch.
"""

from __future__ import annotations

import math
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from windlass.errors import ConfigError
from windlass.plan.number import FLOAT32, NumberFormat, Rounding
from windlass.plan.recipe import Recipe
from windlass.precision.alone import is_alone
from windlass.precision.counters import Counters
from windlass.precision.rounder import Rounder
from windlass.precision.stored import rounder
from windlass.precision.tally import Tally

Words = tuple[int, int, int, int]
NO_WORDS: Words = (0, 0, 0, 0)
KNOWN_CALLS = 64
"""Calls of a layer in one step whose stream is remembered."""


class _Way:
    """What is the same for all calls of a layer.

    Attributes:
        number, error: formats of its output and of its error.
        is_plain: whether nothing is rounded.
        forward, back: what rounds them, and counts.
    """

    __slots__ = ("back", "error", "forward", "is_plain", "number")

    def __init__(self, sites: Sites, name: str) -> None:
        self.number = sites.recipe.number("activations", name, sites.share)
        self.error = sites.recipe.error_number(name, sites.share, sites.batch)
        self.is_plain = self.number == FLOAT32 and self.error == FLOAT32
        tally = sites.tally if sites.is_training else None
        self.forward = _prepared(tally, "activations", name, self.number, sites.rounding)
        self.back = _prepared(tally, "errors", name, self.error, sites.rounding)


class Site:
    """One call of a layer.

    Attributes:
        number: the format of its output.
        is_plain: whether nothing is rounded here.
        rounds_output, rounds_error: whether something is, on the way forward and back.
    """

    __slots__ = ("_back", "_back_words", "_first", "_forward", "_words", "is_plain", "number")

    def __init__(self, way: _Way, words: Words, back_words: Words, first: int) -> None:
        self.number, self.is_plain = way.number, way.is_plain
        self._forward, self._back = way.forward, way.back
        self._words, self._back_words, self._first = words, back_words, first

    @property
    def rounds_output(self) -> bool:
        """Whether outputs are not left in float32."""
        return self._forward is not None

    @property
    def rounds_error(self) -> bool:
        """Whether errors are not left in float32."""
        return self._back is not None

    def round_output(self, x: Tensor, out: Tensor) -> None:
        """`out` becomes `x` in the format of activations."""
        if self._forward is None:
            if out is not x:
                out.copy_(x)
            return
        rounds, counters = self._forward
        rounds(x, out, self._words, self._place(x), counters)

    def rounded_error(self, gradient: Tensor) -> Tensor:
        """The gradient of the output in the format of errors; a hook, which writes it if nobody else has it."""
        if gradient.requires_grad:
            raise ConfigError("a network under a recipe has no second derivatives; remove() the recipe for them")
        if self._back is None:
            return gradient
        rounds, counters = self._back
        out = gradient if is_alone(gradient) else torch.empty_like(gradient)
        rounds(gradient, out, self._back_words, self._place(gradient), counters)
        return out

    def _place(self, x: Tensor) -> int:
        """Numbers of the whole batch's tensor before those of this one."""
        return self._first * math.prod(x.shape[1:]) if self._first else 0


def _prepared(
    tally: Tally | None, role: str, name: str, number: NumberFormat, rounding: Rounding
) -> tuple[Rounder, Counters | None] | None:
    if number == FLOAT32:
        return None
    counters = None if tally is None else tally.of(role, name, number)
    return rounder(number, rounding, coded=False), counters


class Sites:
    """All of a network.

    Args:
        recipe: what is rounded how.
        seed: of all random bits.

    Attributes:
        step: updates so far.
        share: of the run that is done.
        first_sample: of this worker's in the batch.
        batch: samples over which the loss is the mean; 0: as many as the network is given.
        tally: counts.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe, self.seed = recipe, seed
        self.step, self.share, self.first_sample = 0, 0.0, 0
        self.tally = Tally()
        self.rounding: Rounding = recipe.rounding
        self.is_training = True
        self.batch = 1
        self._told_batch = 0
        self._calls: dict[str, int] = {}
        self._ways: dict[str, _Way] = {}
        self._ways_of: tuple[object, ...] = ()
        self._streams: dict[tuple[str, str, int], int] = {}

    def tell(self, *, step: int | None = None, first_sample: int | None = None, batch: int | None = None) -> None:
        """Says where in the run and in the batch the next forward pass stands."""
        if (step is not None and step != self.step) or first_sample is not None:
            self._calls.clear()
        self.step = self.step if step is None else step
        self.first_sample = self.first_sample if first_sample is None else first_sample
        self._told_batch = self._told_batch if batch is None else batch

    def begin_forward(self, *, training: bool, samples: int) -> None:
        """A forward pass begins: in evaluation everything is rounded to nearest, and nothing is counted."""
        self.rounding = self.recipe.rounding if training else "nearest"
        self.is_training = training
        self.batch = self._told_batch or samples
        ways_of = (training, self.batch, self.share)
        if ways_of != self._ways_of:
            self._ways_of = ways_of
            self._ways.clear()

    def site(self, name: str) -> Site:
        """The next call of this layer."""
        way = self._ways.get(name)
        if way is None:
            way = self._ways[name] = _Way(self, name)
        if self.rounding != "stochastic" or way.is_plain:
            return Site(way, NO_WORDS, NO_WORDS, 0)
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        return Site(way, self.words("activations", name, call), self.words("errors", name, call), self.first_sample)

    def words(self, role: str, name: str, call: int = 0) -> Words:
        """The key of the random bits for a tensor in this step."""
        place = (role, name, call)
        stream = self._streams.get(place)
        if stream is None:
            stream = crc32(f"{role}/{name}#{call}".encode())
            if call < KNOWN_CALLS:
                self._streams[place] = stream
        return self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF, stream, self.step & 0xFFFFFFFF

    def state(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {"step": self.step, "seed": self.seed, "share": self.share}
