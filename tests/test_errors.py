"""Exit statuses and the line that refuses an unknown name."""

import inspect

import pytest

from windlass import errors
from windlass.errors import EXIT_CODES, ConfigError, WindlassError, unknown

KINDS = [
    kind
    for kind in vars(errors).values()
    if inspect.isclass(kind) and issubclass(kind, WindlassError) and kind.__base__ is WindlassError
]
"""Kinds of errors; finer ones share the status of theirs."""


def test_every_error_has_an_exit_status_of_its_own_that_the_table_explains() -> None:
    codes = [kind.exit_code for kind in KINDS]
    assert sorted(codes) == sorted(set(EXIT_CODES) - {0, 1})


@pytest.mark.parametrize(
    ("name", "code"),
    [("ConfigError", 2), ("DataError", 3), ("NonFiniteError", 4), ("WriteError", 5), ("LostRankError", 6)],
)
def test_exit_statuses_are_those_that_are_promised(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_stopped_is_ex_tempfail() -> None:
    assert errors.StoppedError.exit_code == 75


def test_an_error_keeps_its_line() -> None:
    assert str(ConfigError("batch: needs 4")) == "batch: needs 4"


def test_unknown_names_the_near_ones_and_lists_all_in_order() -> None:
    assert unknown("lever", "overlp", ["parallel", "overlap", "layout"]) == (
        "unknown lever 'overlp'; did you mean 'overlap'? There are: layout, overlap, parallel"
    )


def test_unknown_suggests_nothing_when_nothing_is_near() -> None:
    assert unknown("lever", "zzz", ["overlap"]) == "unknown lever 'zzz'. There are: overlap"


def test_unknown_suggests_two_at_most() -> None:
    line = unknown("network", "resnet", ["resnet18", "resnet34", "resnet50"])
    assert line.partition("There are")[0].count("resnet") == 3
