"""Every lever that a plan holds: its values, what it means, and its default.

A lever is listed once, here.  Plans are read, checked, printed and documented from this table; an engine
that gains an algorithm adds its name to `values`.
"""

from __future__ import annotations

from dataclasses import dataclass

from windlass.plan.convolution import CONV_ALGORITHMS

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Lever:
    """One lever.

    Attributes:
        meaning: one line for a person.
        values: the values there are; empty for a whole number between `lowest` and `highest`.
        default: the value when nothing speaks for another.
    """

    meaning: str
    values: tuple[Value, ...]
    default: Value
    lowest: int = 0
    highest: int = 0

    def refusal(self, value: object) -> str | None:
        """Why `value` is not possible, or None.

        >>> LEVERS["allreduce"].refusal("ring")
        "'ring' is not a value of it; choose from: library"
        """
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

LEVERS: dict[str, Lever] = {
    "convolution": Lever("algorithm of every convolution; auto: each layer its own", CONVOLUTIONS, "torch"),
    "number_format": Lever("how numbers are stored and computed", ("float32",), "float32"),
    "layout": Lever("order of a tensor's dimensions in memory", ("contiguous", "channels_last"), "contiguous"),
    "parallel": Lever("what the workers divide among them", ("data",), "data"),
    "allreduce": Lever("how the workers sum their gradients", ("library",), "library"),
    "bucket_bytes": Lever("gradients are sent in buckets of about this size", (), 4 << 20, 1 << 10, 1 << 30),
    "overlap": Lever("buckets are sent while the backward pass goes on", (True, False), True),
}  # fmt: skip
"""Every lever by name."""
