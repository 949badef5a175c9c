"""``windlass inspect --precision``: the memories of training under a recipe, beside those in float32."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.table import Table

from windlass.plan.graph import Graph
from windlass.plan.recipe import Recipe
from windlass.report.units import num_bytes, plain

if TYPE_CHECKING:
    from torch import nn

NOTES = (
    "D, W and ∇W are kept as they are counted here; buffers, and statistics that D holds, stay float32.",
    "∇D: errors in their format; the backward pass holds them in float32, of a layer or two at a time, and keeps none.",
    "The peak counts what is float32 for a while: the weights of the layer that runs, its output and its gradients "
    "until they are rounded, copies that convolutions make; and the update by plain SGD, which has no state.",
)
"""What the figures mean."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A network's graphs: in float32, under the recipe, and where it has late formats when the last has begun."""

    before: Graph
    after: Graph
    late: Graph | None

    def rows(self) -> dict[str, dict[str, int]]:
        """The four memories and the peak, by number format."""
        graphs = {"float32": self.before, self.after.number_format: self.after}
        if self.late is not None:
            graphs["with late formats"] = self.late
        return {name: {**graph.memories(), "peak": graph.peak_bytes} for name, graph in graphs.items()}


def compare(module: nn.Module, shape: tuple[int, ...], recipe: Recipe, *, network: str, num_classes: int) -> Compared:
    """Captures the network in float32 and under a recipe.

    Raises:
        ConfigError: the recipe names a layer that is not there.
    """
    from windlass.networks.capture import capture

    def captured(recipe: Recipe | None, share: float = 0.0) -> Graph:
        return capture(module, shape, name=network, num_classes=num_classes, recipe=recipe, share=share)

    after = captured(recipe)
    return Compared(captured(None), after, captured(recipe, share=1.0) if recipe.late else None)


def to_mapping(found: Compared) -> dict[str, Any]:
    """What the tables show beyond the recipe's graph."""
    return {"float32": _totals(found.before), **({"with_late_formats": _totals(found.late)} if found.late else {})}


def _totals(graph: Graph) -> dict[str, Any]:
    return {"memories": graph.memories(), "peak_bytes": graph.peak_bytes, "peak_at": graph.peak_at}


def comparison(found: Compared) -> Table:
    """Bytes by number format, and the recipe's share of float32's."""
    rows = found.rows()
    plain_row, recipe_row = rows["float32"], rows[found.after.number_format]
    table = Table()
    table.add_column("")
    for name in plain_row:
        table.add_column(name, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(plain(num_bytes(value)) for value in row.values()))
        if row is recipe_row:
            table.add_row("of float32", *(_share(row[key], plain_row[key]) for key in row))
    return table


def _share(part: int, whole: int) -> str:
    """One as a share of the other.

    >>> _share(1, 2), _share(0, 0)
    ('50.0%', '')
    """
    return f"{part / whole:.1%}" if whole else ""
