"""What rounding has done to every tensor of a run, by role and layer."""

from __future__ import annotations

from typing import Any

from windlass.precision.counters import Counters

Place = tuple[str, str]
"""A role and a layer's or parameter's path."""


class Tally:
    """Counters by role and layer, since they were last cleared.

    Attributes:
        counters: by role and layer.
        formats: in which each was rounded last.
        moved: of updates, by parameter: how many were not zero after rounding.
    """

    def __init__(self) -> None:
        self.counters: dict[Place, Counters] = {}
        self.formats: dict[Place, object] = {}
        self.moved: dict[str, int] = {}

    def of(self, role: str, name: str, number: object) -> Counters:
        """The counters of one tensor, which is now rounded to this format."""
        place = (role, name)
        counters = self.counters.get(place)
        if counters is None:
            counters = self.counters[place] = Counters()
        self.formats[place] = number
        return counters

    def note_moved(self, name: str, moved: int) -> None:
        """Counts updates of this parameter that are not zero after rounding."""
        self.moved[name] = self.moved.get(name, 0) + moved

    def clear(self) -> None:
        """Begins to count anew."""
        for counters in self.counters.values():
            counters.__init__()  # type: ignore[misc]  # whoever holds one goes on with it
        self.moved.clear()

    def rows(self) -> list[dict[str, Any]]:
        """For metrics and reports: a row for every tensor that was rounded."""
        return [
            {
                "role": role,
                "layer": name,
                "format": str(self.formats[role, name]),
                "elements": found.elements,
                "saturated": found.saturated,
                "zeroed": found.zeroed,
                "error_sum": found.error_sum,
                "moved": self.moved.get(name, 0) if role == "updates" else None,
            }
            for (role, name), found in self.counters.items()
            if found.elements
        ]
