"""Convolutions with many small groups against the definition."""

from __future__ import annotations

import pytest
from conv_cases import LANES, LAYOUTS, SHAPES, assert_adjoint, assert_same_bits, errors, results

from windlass.kernels import depthwise, direct


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LANES)
def test_all_directions_agree_with_the_definition(name: str, layout: str) -> None:
    assert max(errors(results(direct, LANES[name], layout), LANES[name])) < 1


@pytest.mark.parametrize("name", LANES)
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    assert_same_bits(direct, LANES[name])


@pytest.mark.parametrize("name", ["depthwise, dilation and stride", "multiplier", "pairs", "eights"])
def test_gradients_are_the_adjoints(name: str) -> None:
    assert_adjoint(direct, LANES[name])


def test_these_kernels_take_what_they_are_for() -> None:
    assert all(depthwise.takes(shape) for shape in LANES.values())
    assert not any(depthwise.takes(shape) for shape in SHAPES.values())
