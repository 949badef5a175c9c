"""Winograd's minimal filtering F(m, r) from its interpolation points, as exact fractions (Toom and Cook).

For n = m + r - 1 the filter g and the outputs y are read as polynomials, evaluated at n - 1 points and at
infinity.  With V_k the n × k matrix of evaluations (row i: 1, p_i, p_i², …; the last row reads the leading
coefficient), transposing the interpolation of g·y gives the algorithm of Winograd 1980 and Lavin and Gray 2016:

    y = Aᵀ [(G g) ∘ (Bᵀ d)],    A = V_m,    G = D V_r,    Bᵀ = D⁻¹ V_n⁻ᵀ

where D scales row i by 1 / ∏_{j≠i} (p_i - p_j), so that Bᵀ has small whole multiples.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

Matrix = tuple[tuple[Fraction, ...], ...]

POINTS: dict[int, tuple[Fraction, ...]] = {
    1: (Fraction(0),),
    2: (Fraction(0), Fraction(1)),
    3: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2)),
    5: (Fraction(0), Fraction(5, 8), Fraction(-5, 8), Fraction(3, 2), Fraction(-3, 2)),
    6: (Fraction(0), Fraction(1, 2), Fraction(-1, 2), Fraction(1), Fraction(-1), Fraction(2)),
    7: (Fraction(0), Fraction(1), Fraction(-1), Fraction(2), Fraction(-2), Fraction(1, 2), Fraction(-1, 2)),
}
"""Finite points by their number, n - 1: the sets of least error in float32 (docs/convolution.md)."""


@dataclass(frozen=True, slots=True)
class Winograd:
    """F(m, r): the three matrices of the one-dimensional algorithm.

    Attributes:
        m: outputs of a tile.
        r: taps of the filter.
        AT: m × n, from products to outputs.
        G: n × r, for the filter.
        BT: n × n, for the inputs.
    """

    m: int
    r: int
    AT: Matrix
    G: Matrix
    BT: Matrix

    @property
    def n(self) -> int:
        """Inputs of a tile, m + r - 1: as many as multiplications."""
        return self.m + self.r - 1


@cache
def winograd(m: int, r: int, points: tuple[Fraction, ...] | None = None) -> Winograd:
    """F(m, r) at `points`, or at the best ones known.

    Raises:
        ValueError: the points are not m + r - 2 different numbers.
    """
    n = m + r - 1
    chosen = POINTS[n - 1] if points is None else points
    if len(set(chosen)) != n - 1:
        raise ValueError(f"F({m}, {r}) needs {n - 1} different points, got {len(set(chosen))}")
    scale = [_product(p - q for q in chosen if q != p) for p in chosen] + [Fraction(1)]
    evaluate = _vandermonde(chosen, n)
    inverse = _inverse(evaluate)
    bt = tuple(tuple(scale[i] * inverse[j][i] for j in range(n)) for i in range(n))
    g = tuple(tuple(value / scale[i] for value in row) for i, row in enumerate(_vandermonde(chosen, r)))
    return Winograd(m, r, transposed(_vandermonde(chosen, m)), g, bt)


def transposed(matrix: Matrix) -> Matrix:
    """Rows become columns."""
    return tuple(zip(*matrix, strict=True))


def _vandermonde(points: tuple[Fraction, ...], degree: int) -> Matrix:
    rows = [tuple(p**k for k in range(degree)) for p in points]
    infinity = tuple(Fraction(k == degree - 1) for k in range(degree))
    return (*rows, infinity)


def _product(values: object) -> Fraction:
    result = Fraction(1)
    for value in values:  # type: ignore[attr-defined]
        result *= value
    return result


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss and Jordan in exact fractions."""
    n = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for column in range(n):
        pivot = next(i for i in range(column, n) if rows[i][column])
        rows[column], rows[pivot] = rows[pivot], rows[column]
        head = rows[column][column]
        rows[column] = [value / head for value in rows[column]]
        for i in range(n):
            factor = rows[i][column]
            if i != column and factor:
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[column], strict=True)]
    return tuple(tuple(row[n:]) for row in rows)
