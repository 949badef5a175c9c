"""Winograd's matrices: exact for every pair, and at the points that are asked for."""

from __future__ import annotations

from fractions import Fraction

import pytest

from windlass.plan.linear import Program, matrix_program, run
from windlass.plan.toomcook import Matrix, transposed, winograd

PAIRS = [(1, 2), (2, 2), (4, 2), (2, 3), (4, 3), (6, 3), (3, 4), (2, 5), (4, 5), (2, 6), (2, 7)]


def times(matrix: Matrix, values: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, values, strict=True)), Fraction(0)) for row in matrix]


@pytest.mark.parametrize(("m", "r"), PAIRS)
def test_it_is_the_convolution_exactly(m: int, r: int) -> None:
    """On every pair of unit vectors: the map is bilinear, so these decide it."""
    algorithm = winograd(m, r)
    for tap in range(r):
        g = [Fraction(i == tap) for i in range(r)]
        for place in range(algorithm.n):
            d = [Fraction(i == place) for i in range(algorithm.n)]
            products = [a * b for a, b in zip(times(algorithm.G, g), times(algorithm.BT, d), strict=True)]
            assert times(algorithm.AT, products) == [Fraction(place == i + tap) for i in range(m)]


def test_the_points_of_f43_are_those_of_least_error() -> None:
    at = transposed(winograd(4, 3).AT)
    assert [row[1] for row in at[:-1]] == [0, Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)]


def test_a_spoilt_matrix_is_seen() -> None:
    """The exactness test above can fail."""
    algorithm = winograd(2, 3)
    spoilt = (*algorithm.BT[:-1], tuple(2 * value for value in algorithm.BT[-1]))
    g, d = [Fraction(1)] * 3, [Fraction(i) for i in range(4)]
    products = [a * b for a, b in zip(times(algorithm.G, g), times(spoilt, d), strict=True)]
    assert times(algorithm.AT, products) != [Fraction(3), Fraction(6)]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match=r"F\(2, 3\) needs 3 different points, got 2"):
        winograd(2, 3, (Fraction(0), Fraction(1), Fraction(1)))


@pytest.mark.parametrize(("m", "r"), PAIRS)
@pytest.mark.parametrize("which", ["BT", "G", "AT", "A", "GT"])
def test_programs_compute_their_matrices_exactly(m: int, r: int, which: str) -> None:
    algorithm = winograd(m, r)
    matrix = {
        "BT": algorithm.BT, "G": algorithm.G, "AT": algorithm.AT,
        "A": transposed(algorithm.AT), "GT": transposed(algorithm.G),
    }[which]  # fmt: skip
    program = matrix_program(matrix)
    for place in range(len(matrix[0])):
        outputs = run(program, [float(i == place) for i in range(len(matrix[0]))])
        # Two roundings of constants at most, each of half a unit in 2^-52 of values below 64.
        assert outputs == pytest.approx([float(row[place]) for row in matrix], abs=64 * 2**-51)


def num_instructions(program: Program) -> int:
    return sum(op.kind in ("add", "sub", "mul", "fma", "neg") for op in program.ops)


@pytest.mark.parametrize(("which", "most"), [("BT", 12), ("AT", 12), ("A", 8)])
def test_symmetric_points_share_their_even_and_odd_parts(which: str, most: int) -> None:
    """The counts of F(4, 3) by hand: 12, 12 and 8 instructions."""
    algorithm = winograd(4, 3)
    matrix = {"BT": algorithm.BT, "AT": algorithm.AT, "A": transposed(algorithm.AT)}[which]
    assert num_instructions(matrix_program(matrix)) <= most
