"""Rows of kind ``precision``, as a trainer writes them once an epoch."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
FORMATS = {
    "weights": "fixed(16,14)",
    "activations": "fixed(16,10)",
    "errors": "fixed(16,20)",
    "gradients": "fixed(16,14)",
    "updates": "fixed(16,14)",
}


def entry(role: str, layer: str, **more: Any) -> Row:
    row: Row = {"role": role, "layer": layer, "format": FORMATS[role], "elements": 1000, "saturated": 0, "zeroed": 100}
    return row | {"error_sum": 0.0, "moved": 900 if role == "updates" else None} | more


def still(layer: str, lost: int = 1000, **more: Any) -> Row:
    """Updates that were all rounded to zero."""
    return entry("updates", layer, zeroed=lost, moved=0, **more)


def precision_row(epoch: int, *entries: Row, recipe: str = "fixed16", steps: int = 10, **more: Any) -> Row:
    row = {"kind": "precision", "step": steps * (epoch + 1), "epoch": epoch, "recipe": recipe, "rows": list(entries)}
    return row | more


def epochs(entries: list[list[Row]], **more: Any) -> list[Row]:
    """A row for each list of entries, in epochs 0, 1, …."""
    return [precision_row(i, *each, **more) for i, each in enumerate(entries)]
