"""Convolution by patches against the definition."""

from __future__ import annotations

import pytest
from conv_cases import LANES, LAYOUTS, SHAPES, assert_adjoint, assert_same_bits, errors, results

from windlass.kernels import im2col


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_all_directions_agree_with_the_definition(name: str, layout: str) -> None:
    assert max(errors(results(im2col, SHAPES[name], layout), SHAPES[name])) < 1


@pytest.mark.parametrize("name", ["depthwise, odd", "depthwise, large filter", "multiplier", "fours"])
def test_small_groups_are_right_too(name: str) -> None:
    assert max(errors(results(im2col, LANES[name]), LANES[name])) < 1


@pytest.mark.parametrize("name", ["many channels", "many small images", "wide", "groups", "first layer"])
def test_the_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    assert_same_bits(im2col, SHAPES[name])


@pytest.mark.parametrize("name", ["uneven everything", "dilation and stride", "groups of 3"])
def test_gradients_are_the_adjoints(name: str) -> None:
    assert_adjoint(im2col, SHAPES[name])
