"""Every lever that a plan holds: its values, what it means, and its default.

A lever is listed once, here.  Plans are read, checked, printed and documented from this table; an engine
that gains an algorithm adds its name to `values`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from windlass.errors import ConfigError, unknown
from windlass.plan.convolution import CONV_ALGORITHMS
from windlass.plan.mesh import Mesh
from windlass.plan.pick import ALLREDUCE_NAMES, AUTO, Picks
from windlass.plan.recipe import PRESETS, parse_recipe

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Lever:
    """One lever.

    Attributes:
        meaning: one line for a person.
        values: the values there are; empty for a whole number between `lowest` and `highest`.
        default: the value when nothing speaks for another.
        lowest: of a whole number.
        highest: of a whole number.
        grammar: reads texts that are possible beside `values`; raises ConfigError for others.
    """

    meaning: str
    values: tuple[Value, ...]
    default: Value
    lowest: int = 0
    highest: int = 0
    grammar: Callable[[str], object] | None = None

    def refusal(self, value: object) -> str | None:
        """Why `value` is not possible, or None.

        >>> LEVERS["layout"].refusal("rows")
        "'rows' is not a value of it; choose from: contiguous, channels_last"
        >>> LEVERS["allreduce"].refusal("library..8KiB,ring")  # None
        """
        if self.grammar is not None and isinstance(value, str) and value not in self.values:
            try:
                self.grammar(value)
            except ConfigError as error:
                listed = ", ".join(spell(choice) for choice in self.values)
                return f"{value!r} is not a value of it ({error}); choose from: {listed}"
            return None
        if self.values:
            possible = any(type(value) is type(choice) and value == choice for choice in self.values)
            listed = ", ".join(spell(choice) for choice in self.values)
            return None if possible else f"{value!r} is not a value of it; choose from: {listed}"
        if isinstance(value, bool) or not isinstance(value, int):
            return f"{value!r} is not a value of it; it takes a whole number"
        if not self.lowest <= value <= self.highest:
            return f"{value} is out of range; it takes a whole number from {self.lowest} to {self.highest}"
        return None


def spell(value: Value) -> str:
    """A lever's value as it stands in a plan file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


CONVOLUTIONS: tuple[Value, ...] = ("torch", "auto", *(name for name in CONV_ALGORITHMS if name != "torch"))
"""Values of the lever ``convolution``: an algorithm for every layer that it can compute, or ``auto``."""

PARALLEL: tuple[Value, ...] = ("data", "model", "hybrid", "hybrid:a", "hybrid:b", "hybrid:c", "tiles")
"""Placements by name; a file holds any other."""
PLACEMENT_FILES = (".yaml", ".yml")
"""How the name of a placement's file ends."""


def check_parallel(text: str) -> None:
    """Refuses what is neither a placement's name nor a file's.

    Raises:
        ConfigError: neither.
    """
    if text not in PARALLEL and not text.endswith(PLACEMENT_FILES):
        names = [str(name) for name in PARALLEL]
        raise ConfigError(f"{unknown('placement', text, names)}; a file ends in .yaml")


LEVERS: dict[str, Lever] = {
    "convolution": Lever("algorithm of every convolution; auto: each layer its own", CONVOLUTIONS, "torch"),
    "number_format": Lever("how numbers are kept: a recipe by role, as in fixed16,errors=<4,12>,rounding=nearest",
                           tuple(PRESETS), "float32", grammar=parse_recipe),
    "layout": Lever("order of a tensor's dimensions in memory", ("contiguous", "channels_last"), "contiguous"),
    "parallel": Lever("what the workers divide among them; a file holds any placement", PARALLEL, "data",
                      grammar=check_parallel),
    "mesh": Lever("the workers in rows, as in node:2,device:4; auto: as the placement says", (AUTO,), AUTO,
                  grammar=Mesh.parse),
    "accumulate": Lever("micro-batches of a step, whose gradients add up", (), 1, 1, 1024),
    "recompute": Lever("activations that the backward pass computes again instead of keeping them", ("none", "blocks"),
                       "none"),
    "allreduce": Lever(
        "how the workers sum their gradients; by size as in library..8KiB,ring; auto: what is fastest",
        (AUTO, *ALLREDUCE_NAMES), AUTO, grammar=Picks.parse,
    ),
    "fixed_order": Lever("sums are made in the order of ranks whatever the size: always the same bits",
                         (False, True), False),
    "bucket_bytes": Lever("gradients are sent in buckets of about this size", (), 4 << 20, 1 << 10, 1 << 30),
    "overlap": Lever("buckets are sent while the backward pass goes on", (True, False), True),
}  # fmt: skip
"""Every lever by name."""
