"""What rounding did to a tensor, or to all tensors that were counted together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Sums over all elements that were rounded with these counters.

    Attributes:
        elements: how many there were.
        saturated: out of range.
        zeroed: not zero, but rounded to zero.
        not_a_number: NaN.
        error_sum: of |rounded - x|, x taken into the range before; NaN counts as 0.
    """

    elements: int = 0
    saturated: int = 0
    zeroed: int = 0
    not_a_number: int = 0
    error_sum: float = 0.0

    def add(self, counts: tuple[int, int, int, float], elements: int) -> None:
        """Adds what happened to `elements` more elements: what `kernels.rounding.Counts` holds."""
        saturated, zeroed, not_a_number, error = counts
        self.elements += elements
        self.saturated += saturated
        self.zeroed += zeroed
        self.not_a_number += not_a_number
        self.error_sum += error

    @property
    def mean_error(self) -> float:
        """The mean absolute rounding error; 0 where there were no elements."""
        return self.error_sum / self.elements if self.elements else 0.0
