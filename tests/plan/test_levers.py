"""The table of levers and what each refuses."""

import pytest

from windlass.plan.levers import LEVERS, Lever, spell

BY_NAME = [name for name, lever in LEVERS.items() if lever.values]
BY_NUMBER = [name for name, lever in LEVERS.items() if not lever.values]


@pytest.mark.parametrize("name", LEVERS)
def test_a_default_is_possible_and_a_meaning_is_one_line(name: str) -> None:
    lever = LEVERS[name]
    assert lever.refusal(lever.default) is None
    assert lever.meaning and "\n" not in lever.meaning


@pytest.mark.parametrize("name", BY_NAME)
def test_listed_values_are_possible_and_all_others_refused_with_the_list(name: str) -> None:
    lever = LEVERS[name]
    others: tuple[object, ...] = ("nonsense", "", None, 0, 1, 1.0, [], {})
    assert all(lever.refusal(value) is None for value in lever.values)
    for value in others:
        refusal = lever.refusal(value)
        assert refusal is not None and refusal.startswith(repr(value))
        assert refusal.endswith("choose from: " + ", ".join(map(spell, lever.values)))


def test_one_is_not_true_and_texts_are_not_booleans() -> None:
    overlap = LEVERS["overlap"]
    assert overlap.refusal(True) is None and overlap.refusal(False) is None
    assert overlap.refusal(1) == "1 is not a value of it; choose from: true, false"
    assert overlap.refusal("true") == "'true' is not a value of it; choose from: true, false"


@pytest.mark.parametrize("name", BY_NUMBER)
def test_numbers_have_both_ends(name: str) -> None:
    lever = LEVERS[name]
    assert lever.refusal(lever.lowest) is None and lever.refusal(lever.highest) is None
    span = f"it takes a whole number from {lever.lowest} to {lever.highest}"
    for value in (lever.lowest - 1, lever.highest + 1):
        assert lever.refusal(value) == f"{value} is out of range; {span}"
    for other in (True, 1e4, "4096", None):
        assert lever.refusal(other) == f"{other!r} is not a value of it; it takes a whole number"


def test_a_new_lever_is_read_from_its_row_alone() -> None:
    lever = Lever("how many", ("one", 2, True), "one")
    assert [lever.refusal(value) is None for value in ("one", 2, True, 1, "2", False)] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert [spell(value) for value in lever.values] == ["one", "2", "true"]
