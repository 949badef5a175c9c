"""What rounding did, read back from the rows of a run."""

from __future__ import annotations

import math
from typing import Any

import pytest

from windlass.plan.number import BFLOAT16, fixed
from windlass.plan.recipe import ROLES
from windlass.runs.tally import (
    by_role,
    mean_error,
    mean_error_steps,
    read_tallies,
    saturated_share,
    scalars,
    zeroed_share,
)

ENTRY = {
    "role": "activations", "layer": "c1", "format": "<6,10>", "elements": 400, "saturated": 3, "zeroed": 40,
    "error_sum": 0.125, "moved": None,
}  # fmt: skip


def row(*entries: Any) -> dict[str, Any]:
    return {"kind": "precision", "step": 1, "epoch": 0, "recipe": "fixed16", "rows": list(entries)}


def test_a_tally_holds_what_the_row_says() -> None:
    (tally,) = read_tallies(row(ENTRY))
    assert (tally.role, tally.layer, tally.number) == ("activations", "c1", fixed(16, 10))
    assert (tally.elements, tally.saturated, tally.zeroed, tally.error_sum, tally.moved) == (400, 3, 40, 0.125, None)
    assert not tally.has_stalled


def test_tallies_come_in_the_order_of_roles_and_then_of_the_row() -> None:
    entries = [ENTRY | {"role": role, "layer": layer} for layer in ("z", "a") for role in ("new", *reversed(ROLES))]
    found = [(tally.role, tally.layer) for tally in read_tallies(row(*entries))]
    assert found == [(role, layer) for role in (*ROLES, "new") for layer in ("z", "a")]


@pytest.mark.parametrize(
    "broken",
    [
        None, 7, [], {}, ENTRY | {"role": 3}, ENTRY | {"layer": None}, ENTRY | {"format": "<1>"},
        ENTRY | {"format": None}, ENTRY | {"elements": 0}, ENTRY | {"elements": -1}, ENTRY | {"elements": math.inf},
        ENTRY | {"elements": True},
        ENTRY | {"saturated": "3"}, ENTRY | {"saturated": math.nan}, ENTRY | {"zeroed": None},
        {key: value for key, value in ENTRY.items() if key != "zeroed"},
    ],
)  # fmt: skip
def test_an_entry_that_is_not_whole_is_left_out_and_the_rest_read(broken: object) -> None:
    assert [tally.layer for tally in read_tallies(row(broken, ENTRY, broken))] == ["c1"]


@pytest.mark.parametrize("rows", [None, 3, "abc", {"a": 1}])
def test_a_row_without_entries_has_no_tallies(rows: object) -> None:
    assert read_tallies({"rows": rows}) == read_tallies({}) == ()


def test_shares_are_of_all_layers_together() -> None:
    tallies = read_tallies(row(ENTRY, ENTRY | {"layer": "c2", "elements": 1200, "saturated": 1, "zeroed": 0}))
    assert saturated_share(tallies) == 4 / 1600
    assert zeroed_share(tallies) == 40 / 1600
    assert mean_error(tallies) == 0.25 / 1600


def test_the_share_of_updates_is_of_those_that_were_not_zero() -> None:
    updates = ENTRY | {"role": "updates", "zeroed": 30, "moved": 10}
    assert zeroed_share(read_tallies(row(updates))) == 0.75
    assert math.isnan(zeroed_share(read_tallies(row(updates | {"zeroed": 0, "moved": 0}))))


@pytest.mark.parametrize(("zeroed", "moved", "stalled"), [(5, 0, True), (5, 1, False), (0, 0, False), (5, None, False)])
def test_a_stall_is_updates_of_which_none_came_through(zeroed: int, moved: int | None, stalled: bool) -> None:
    (tally,) = read_tallies(row(ENTRY | {"role": "updates", "zeroed": zeroed, "moved": moved}))
    assert tally.has_stalled is stalled


def test_errors_in_steps_add_up_over_formats_and_leave_floating_point_out() -> None:
    wide = ENTRY | {"format": "<2,14>", "elements": 100, "error_sum": 25 * 2**-14}
    narrow = ENTRY | {"elements": 300, "error_sum": 75 * 2**-10}
    floating = ENTRY | {"format": "bfloat16", "error_sum": 1e9}
    assert mean_error_steps(read_tallies(row(wide, narrow, floating))) == 0.25
    (alone,) = read_tallies(row(floating))
    assert alone.number == BFLOAT16
    assert math.isnan(mean_error_steps([alone]))


def test_an_unknown_error_is_not_a_number_and_spoils_nothing_else() -> None:
    for error in (None, math.inf, -math.inf, "much"):
        tallies = read_tallies(row(ENTRY | {"error_sum": error}))
        assert math.isnan(mean_error(tallies))
        assert saturated_share(tallies) == 3 / 400


def test_scalars_are_by_role_and_finite() -> None:
    updates = ENTRY | {"role": "updates", "layer": "c1.weight", "zeroed": 0, "moved": 0, "error_sum": None}
    assert scalars(row(ENTRY, updates)) == {
        "activations/saturated": 3 / 400,
        "activations/zeroed": 0.1,
        "activations/error": 0.125 / 400,
        "updates/saturated": 3 / 400,
    }
    assert scalars({}) == {}


def test_by_role_keeps_every_tally() -> None:
    tallies = read_tallies(row(ENTRY, ENTRY | {"layer": "c2"}, ENTRY | {"role": "errors"}))
    assert {role: [tally.layer for tally in found] for role, found in by_role(tallies).items()} == {
        "activations": ["c1", "c2"],
        "errors": ["c1"],
    }
