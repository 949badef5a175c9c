"""What rounding did to the numbers of a run, as the rows of kind ``precision`` in its metrics tell it.

Such a row stands once an epoch, and at the end of a run that stops: for every role and layer the sums over all numbers
that one rank rounded since the row before.  The same shares and means go to TensorBoard and to the report.
Reading forgives: an entry that is not whole is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from windlass.errors import ConfigError
from windlass.plan.number import Fixed, NumberFormat, parse_format
from windlass.plan.recipe import ROLES

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What rounding did to one tensor, or to all that one layer rounded in one role.

    Attributes:
        role: what the numbers are.
        layer: path of the layer, or name of the parameter.
        number: the format they were rounded to.
        elements: how many were rounded.
        saturated: out of range.
        zeroed: not zero, but rounded to zero.
        error_sum: of the absolute rounding errors; NaN where the row does not tell.
        moved: updates that were not zero after rounding; None for other roles.
    """

    role: str
    layer: str
    number: NumberFormat
    elements: float
    saturated: float
    zeroed: float
    error_sum: float
    moved: float | None

    @property
    def has_stalled(self) -> bool:
        """Whether there were updates and all of them were rounded to zero."""
        return self.moved == 0 and self.zeroed > 0


def read_tallies(row: Row) -> tuple[Tally, ...]:
    """The whole entries of a row that rounded anything, by role in the order of `ROLES`."""
    entries = row.get("rows")
    found = [_tally(entry) for entry in entries] if isinstance(entries, list) else []
    return tuple(sorted((tally for tally in found if tally is not None), key=lambda tally: role_order(tally.role)))


def role_order(role: str) -> int:
    """Where `role` stands among the roles; after all where it is none of them."""
    return ROLES.index(role) if role in ROLES else len(ROLES)


def by_role(tallies: Iterable[Tally]) -> dict[str, list[Tally]]:
    """The tallies of every role."""
    found: dict[str, list[Tally]] = {}
    for tally in tallies:
        found.setdefault(tally.role, []).append(tally)
    return found


def saturated_share(tallies: Sequence[Tally]) -> float:
    """The share of all numbers that was out of range; NaN where there were none."""
    return _ratio(sum(t.saturated for t in tallies), sum(t.elements for t in tallies))


def zeroed_share(tallies: Sequence[Tally]) -> float:
    """The share that was rounded to zero: of updates that were not zero, in other roles of all numbers."""
    whole = sum(t.elements if t.moved is None else t.zeroed + t.moved for t in tallies)
    return _ratio(sum(t.zeroed for t in tallies), whole)


def mean_error(tallies: Sequence[Tally]) -> float:
    """The mean absolute rounding error."""
    return _ratio(sum(t.error_sum for t in tallies), sum(t.elements for t in tallies))


def mean_error_steps(tallies: Sequence[Tally]) -> float:
    """The mean absolute rounding error in steps of the format, over fixed point; NaN where there is none.

    Short floating point has no one step: it grows with the number.
    """
    fixed = [(t, t.number.quantum) for t in tallies if isinstance(t.number, Fixed)]
    return _ratio(sum(t.error_sum / step for t, step in fixed), sum(t.elements for t, _ in fixed))


MEASURES: Mapping[str, Callable[[Sequence[Tally]], float]] = {
    "saturated": saturated_share,
    "zeroed": zeroed_share,
    "error": mean_error,
}
"""What TensorBoard gets of every role."""


def scalars(row: Row) -> dict[str, float]:
    """``ROLE/MEASURE`` of a row for every role and measure that it has a number for."""
    return {
        f"{role}/{name}": value
        for role, tallies in by_role(read_tallies(row)).items()
        for name, measure in MEASURES.items()
        if math.isfinite(value := measure(tallies))
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _tally(entry: object) -> Tally | None:
    """One entry, if it is whole and rounded anything."""
    if not isinstance(entry, dict):
        return None
    try:
        number = parse_format(str(entry.get("format")))
    except ConfigError:
        return None
    elements, saturated, zeroed = (_count(entry.get(name)) for name in ("elements", "saturated", "zeroed"))
    role, layer, error = entry.get("role"), entry.get("layer"), _count(entry.get("error_sum"))
    if not elements or saturated is None or zeroed is None or not isinstance(role, str) or not isinstance(layer, str):
        return None
    return Tally(
        role=role,
        layer=layer,
        number=number,
        elements=elements,
        saturated=saturated,
        zeroed=zeroed,
        error_sum=math.nan if error is None else error,
        moved=_count(entry.get("moved")),
    )


def _count(value: object) -> float | None:
    """`value`, if it is a finite number and not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return value
