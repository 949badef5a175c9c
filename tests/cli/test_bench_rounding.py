from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_ways_to_round_are_timed_beside_a_copy(windlass: Callable[..., Any], tmp_path: Path) -> None:
    done = windlass("bench", "rounding", "--elements", "64K", "--turns", "2", "--threads", "1", "--json", "rows.json")
    assert done.code == 0, done.err
    assert "65,536 elements, fixed(16,12) where nothing else is said, 2 turns" in done.out
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["by"]: row for row in found["rows"]}
    for by in ("copy, PyTorch", "copy, NumPy", "float32 → float32, stochastic", "float32 → int16, stochastic, counted"):
        assert f"| {by} |" in done.out
        assert rows[by]["seconds"] > 0
    assert max(rows[by]["of_copy"] for by in ("copy, PyTorch", "copy, NumPy")) == pytest.approx(1.0)
    ours = rows["float32 → float32, stochastic"]
    assert ours["bytes_per_s"] == pytest.approx(8 * ours["elements_per_s"])
    missing = {note.partition(":")[0] for note in found["notes"]}
    assert ("QPyTorch, fixed_point_quantize" in rows) != ("QPyTorch, fixed_point_quantize" in missing)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--elements", "many"], "--elements: needs a number from 1 to 16G such as 100000 or 16M, got 'many'"),
        (["--elements", "0"], "got '0'"),
        (["--turns", "0"], "--turns: needs at least 1, got 0"),
        (["--json", "nowhere/rows.json"], "there is no folder nowhere"),
    ],
)
def test_bad_options_are_one_line(windlass: Callable[..., Any], arguments: list[str], message: str) -> None:
    done = windlass("bench", "rounding", *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())
