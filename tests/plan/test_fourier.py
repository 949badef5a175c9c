"""Fourier codelets against the definition of the transform."""

from __future__ import annotations

import cmath
import itertools
import math
import random

import pytest

from windlass.plan.fourier import KINDS, Kind, codelet, num_frequencies, unit
from windlass.plan.linear import run

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 32, 64)


def definition(x: list[complex]) -> list[complex]:
    n = len(x)
    return [sum(x[j] * cmath.exp(-2j * math.pi * (j * k % n) / n) for j in range(n)) for k in range(n)]


def interleaved(values: list[complex]) -> list[float]:
    return [part for value in values for part in (value.real, value.imag)]


def paired(values: list[float]) -> list[complex]:
    return [complex(re, im) for re, im in zip(values[::2], values[1::2], strict=True)]


def largest_error(got: list[complex], expected: list[complex]) -> float:
    return max(abs(a - b) for a, b in zip(got, expected, strict=True))


# In float64 a transform of unit numbers has errors of some 1e-16 · √n · log n; a wrong sign or twiddle gives 0.1.
BAR = 1e-12


@pytest.mark.parametrize("n", LENGTHS)
def test_complex_numbers(n: int) -> None:
    rng = random.Random(n)
    x = [complex(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(n)]
    for nonzero in {n, max(1, n // 2), max(1, n // 4)}:
        part = [value if i < nonzero else 0j for i, value in enumerate(x)]
        # Numbers that are said to be zero are not read.
        given = [value if i < nonzero else complex(math.nan, math.nan) for i, value in enumerate(x)]
        got = paired(run(codelet("complex", n, nonzero).program, interleaved(given)))
        assert largest_error(got, definition(part)) < BAR


@pytest.mark.parametrize("n", LENGTHS)
def test_real_numbers_there_and_back(n: int) -> None:
    rng = random.Random(n)
    x = [rng.gauss(0, 1) for _ in range(n)]
    for nonzero in {n, max(1, n // 2), max(1, n // 4)}:
        given = [value if i < nonzero else math.nan for i, value in enumerate(x)]
        expected = definition([complex(v) if i < nonzero else 0j for i, v in enumerate(x)])[: n // 2 + 1]
        got = run(codelet("from_real", n, nonzero).program, given)
        assert largest_error(paired(got), expected) < BAR
    spectrum = interleaved(definition([complex(value) for value in x])[: n // 2 + 1])
    back = run(codelet("to_real", n, n).program, spectrum)
    assert max(abs(a - n * b) for a, b in zip(back, x, strict=True)) < n * BAR


def test_exchanged_parts_invert_the_transform() -> None:
    rng = random.Random(0)
    x = [complex(rng.gauss(0, 1), rng.gauss(0, 1)) for _ in range(16)]
    spectrum = paired(run(codelet("complex", 16, 16).program, interleaved(x)))
    exchanged = [complex(value.imag, value.real) for value in spectrum]
    back = paired(run(codelet("complex", 16, 16).program, interleaved(exchanged)))
    assert largest_error([complex(value.imag, value.real) / 16 for value in back], x) < BAR


def test_the_circle_is_symmetric_to_the_last_bit() -> None:
    for n in (8, 12, 64):
        for turns in range(n):
            c, s = unit(turns, n)
            assert unit(-turns, n) == (c, -s)
            assert unit(n // 4 - turns, n) == (s, c)
            assert abs(complex(c, s) - cmath.exp(2j * math.pi * turns / n)) < BAR


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [32, 64])
def test_sections_keep_few_values(kind: Kind, n: int) -> None:
    """A section reads eight complex numbers from others or from memory, and the odd value that they share."""
    work = codelet(kind, n, n)
    assert work.cuts
    starts = (0, *work.cuts, len(work.program.ops))
    for first, last in itertools.pairwise(starts):
        ops = work.program.ops[first:last]
        read = {operand for op in ops if op.kind not in ("input", "zero") for operand in (op.a, op.b) if operand >= 0}
        outside = {operand for operand in read if operand < first and work.program.ops[operand].kind != "zero"}
        assert len(outside) + sum(op.kind == "input" for op in ops) <= 18


def test_operations_are_no_more_than_known_algorithms_take() -> None:
    """Split radix takes 4 n log₂ n - 6 n + 8; a fused multiply-add saves a third of a rotation and is one here."""
    for n in (16, 32, 64):
        operations = sum(op.kind in ("add", "sub", "mul", "fma", "neg") for op in codelet("complex", n, n).program.ops)
        assert operations <= 4 * n * math.log2(n) - 6 * n + 8


def test_frequencies_of_a_tile() -> None:
    assert [num_frequencies(n) for n in (16, 32, 64)] == [130, 514, 2050]
