"""Fourier transforms of fixed length as straight-line programs: codelets, as FFTW's genfft makes them.

    X[k] = Σ_j x[j] · W^(jk),   W = exp(-2πi / n),   n = n1 · n2                        Cooley and Tukey 1965
    X[k + n2·q] = Σ_j W1^(jq) · (W^(jk) · X_j[k]),   X_j the transform of x[j], x[j + n1], x[j + 2·n1], …

Of real numbers only X[0] … X[n/2] are computed, the others are their conjugates.  A rotation by W^(jk) = c - i·s
costs two fused multiply-adds: re·c + im·s = c · (re + s/c · im), and the factor c waits until the next addition,
which takes it along as a fused multiply-add (Linzer and Feig 1993).  So a value is recorded together with its
factor, and signs, conjugates and multiples of i cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

from windlass.plan.linear import Op, Program, Recorder

Kind = Literal["complex", "from_real", "to_real"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SECTIONED = 32
"""The shortest transform in sections; a shorter one keeps its values in registers."""


class Term(NamedTuple):
    """A real number: factor · recorded value."""

    factor: float
    value: int


class Complex(NamedTuple):
    """A complex number of two terms."""

    re: Term
    im: Term

    @property
    def conjugate(self) -> Complex:
        """`re` - i·im."""
        return Complex(self.re, scaled(self.im, -1.0))

    @property
    def swapped(self) -> Complex:
        """`im` + i·re: the transform between two swaps is the inverse transform."""
        return Complex(self.im, self.re)


def scaled(term: Term, factor: float) -> Term:
    """`factor` · term."""
    return Term(term.factor * factor, term.value)


@dataclass(frozen=True, slots=True)
class Codelet:
    """A transform as a program in sections: few values are alive within one, what others need is to be put by.

    Attributes:
        program: its operations.
        cuts: the operations with which sections start, other than the first.
        strides: inputs, and outputs, of one section stand so far apart.
    """

    program: Program
    cuts: tuple[int, ...]
    strides: tuple[int, int]


@cache
def codelet(kind: Kind, n: int, nonzero: int) -> Codelet:
    """One transform of length n, unscaled.

    "complex": n complex numbers to n (the inverse with re and im exchanged on both sides); "from_real": n real
    numbers to the first n/2 + 1 of their transform; "to_real": the way back.  Complex numbers stand as re, im.

    Args:
        kind: which transform.
        n: its length.
        nonzero: so many of the first inputs may be other than zero; the others are not read.
    """
    recorder = _Recorder(n if kind == "from_real" else 2 * (n if kind == "complex" else n // 2 + 1), n)
    terms = [Term(1.0, value) for value in recorder.inputs]
    if kind == "from_real":
        terms[nonzero:] = [recorder.nothing] * (n - nonzero)
        outputs = _flattened(recorder.from_real(terms))
    elif kind == "to_real":
        outputs = recorder.to_real([Complex(*terms[i : i + 2]) for i in range(0, len(terms), 2)], n)
    else:
        numbers = [Complex(*terms[i : i + 2]) for i in range(0, len(terms), 2)]
        numbers[nonzero:] = [Complex(recorder.nothing, recorder.nothing)] * (n - nonzero)
        outputs = _flattened(recorder.complex(numbers))
    program, cuts = recorder.ordered(outputs)
    n1 = _first_factor(n)
    return Codelet(program, cuts, (n // n1, n1) if kind == "to_real" else (n1, n // n1))


def num_frequencies(n: int) -> int:
    """How many complex numbers determine the spectrum of n × n real ones.

    Rows are transformed first, to n/2 + 1 columns.  The first and the last are real: half their transform does; of
    the others it takes all.
    """
    return 2 * (n // 2 + 1) + (n // 2 - 1) * n


def _flattened(values: Sequence[Complex]) -> list[Term]:
    return [term for value in values for term in value]


def unit(turns: int, n: int) -> tuple[float, float]:
    """Cosine and sine of `turns` n-ths of a turn, with the symmetries of the circle to the last bit."""
    turns %= n
    if 2 * turns > n:
        c, s = unit(n - turns, n)
        return c, -s
    if 4 * turns > n:
        c, s = unit(n - 2 * turns, 2 * n)
        return -c, s
    if 8 * turns > n:
        c, s = unit(n - 4 * turns, 4 * n)
        return s, c
    if 8 * turns == n:
        return math.sqrt(0.5), math.sqrt(0.5)
    return math.cos(2 * math.pi * turns / n), math.sin(2 * math.pi * turns / n)


def _first_factor(n: int) -> int:
    """n1 of n = n1 · n2: the larger of two factors as alike as can be, which must be as few as registers hold."""
    factors = [f for f in range(2, n + 1) if n % f == 0 and f * f <= n]
    return factors[-1] if factors else n


class _Recorder(Recorder):
    """Records transforms of terms; those of `length` in sections."""

    def __init__(self, num_inputs: int, length: int) -> None:
        super().__init__(num_inputs)
        self._length = length
        self._cuts: list[int] = []

    def _cut(self, n: int) -> None:
        """Ends a section where a whole transform has come to the end of one of its parts."""
        if n == self._length and n >= SECTIONED:
            self._cuts.append(len(self._ops))

    @property
    def nothing(self) -> Term:
        """Zero."""
        return Term(1.0, self.zero)

    def plus(self, x: Term, y: Term) -> Term:
        """`x` + y, with the larger of both factors taken out."""
        if self.zero in (x.value, y.value):
            return x if y.value == self.zero else y
        if abs(y.factor) > abs(x.factor):
            x, y = y, x
        ratio = y.factor / x.factor
        if abs(abs(ratio) - 1.0) > 1e-12:
            return Term(x.factor, self.fma(ratio, y.value, x.value))
        if ratio > 0:
            return Term(x.factor, self.add(x.value, y.value))
        if Op("sub", y.value, x.value) in self._known:
            return Term(-x.factor, self.sub(y.value, x.value))
        return Term(x.factor, self.sub(x.value, y.value))

    def sum(self, x: Complex, y: Complex) -> Complex:
        """`x` + y."""
        return Complex(self.plus(x.re, y.re), self.plus(x.im, y.im))

    def rotated(self, x: Complex, turns: int, n: int) -> Complex:
        """`x` · exp(-2πi · turns / n)."""
        c, s = unit(turns, n)
        if s == 0:
            return Complex(scaled(x.re, c), scaled(x.im, c))
        if c == 0:
            return Complex(scaled(x.im, s), scaled(x.re, -s))
        re = self.plus(scaled(x.re, c), scaled(x.im, s))
        return Complex(re, self.plus(scaled(x.im, c), scaled(x.re, -s)))

    def complex(self, x: Sequence[Complex]) -> list[Complex]:
        """The transform of complex numbers."""
        n = len(x)
        n1 = _first_factor(n)
        if n1 == n:
            return [x[0]] if n == 1 else self._prime(x)
        n2 = n // n1
        parts = []
        for j in range(n1):
            parts.append(self.complex(x[j::n1]))
            self._cut(n)
        result = [x[0]] * n
        for k in range(n2):
            result[k::n2] = self.complex([self.rotated(part[k], j * k, n) for j, part in enumerate(parts)])
            self._cut(n)
        return result

    def _prime(self, x: Sequence[Complex]) -> list[Complex]:
        """By the definition, with x[j] and x[n - j] taken together."""
        n = len(x)
        if n == 2:
            return [self.sum(x[0], x[1]), self.sum(x[0], negative(x[1]))]
        pairs = [(self.sum(x[j], x[n - j]), self.sum(x[j], negative(x[n - j]))) for j in range(1, (n + 1) // 2)]
        result = [x[0]] * n
        for even, _ in pairs:
            result[0] = self.sum(result[0], even)
        for k in range(1, (n + 1) // 2):
            cosines, sines = x[0], Complex(self.nothing, self.nothing)
            for j, (even, odd) in enumerate(pairs, 1):
                c, s = unit(j * k, n)
                cosines = self.sum(cosines, Complex(scaled(even.re, c), scaled(even.im, c)))
                sines = self.sum(sines, Complex(scaled(odd.im, s), scaled(odd.re, -s)))
            result[k], result[n - k] = self.sum(cosines, sines), self.sum(cosines, negative(sines))
        return result

    def from_real(self, x: Sequence[Term]) -> list[Complex]:
        """The first n/2 + 1 numbers of the transform of real numbers."""
        n = len(x)
        n1 = _first_factor(n)
        if n1 == n:
            return self.complex([Complex(term, self.nothing) for term in x])[: n // 2 + 1]
        n2 = n // n1
        parts = []
        for j in range(n1):
            parts.append(self.from_real(x[j::n1]))
            self._cut(n)
        result: dict[int, Complex] = {}
        for k in range(n2 // 2 + 1):
            if k == 0:
                values = self.from_real([part[0].re for part in parts])
            else:
                values = self.complex([self.rotated(part[k], j * k, n) for j, part in enumerate(parts)])
            for q, value in enumerate(values):
                i = k + n2 * q
                result.setdefault(min(i, n - i), value if 2 * i <= n else value.conjugate)
            self._cut(n)
        return [result[i] for i in range(n // 2 + 1)]

    def to_real(self, x: Sequence[Complex], n: int) -> list[Term]:
        """The n real numbers whose transform starts with the n/2 + 1 given ones."""
        n1 = _first_factor(n)
        whole = [x[i] if 2 * i <= n else x[n - i].conjugate for i in range(n)]
        whole = [Complex(v.re, self.nothing) if i in (0, n / 2) else v for i, v in enumerate(whole)]
        if n1 == n:
            return [value.im for value in self.complex([value.swapped for value in whole])]
        n2 = n // n1
        parts: list[list[Complex]] = [[] for _ in range(n1)]
        for k in range(n2 // 2 + 1):
            if k == 0:
                values = [Complex(v, self.nothing) for v in self.to_real(whole[: n // 2 + 1 : n2], n1)]
            else:
                values = [v.swapped for v in self.complex([v.swapped for v in whole[k::n2]])]
            for j, value in enumerate(values):
                parts[j].append(self.rotated(value, -j * k, n))
            self._cut(n)
        result = [self.nothing] * n
        for j, part in enumerate(parts):
            result[j::n1] = self.to_real(part, n2)
            self._cut(n)
        return result

    def ordered(self, outputs: Sequence[Term]) -> tuple[Program, tuple[int, ...]]:
        """The program of what the outputs need, in the order of recording, and where its sections start.

        Inputs come where they are first needed.
        """
        chosen = [self._value_of(term) for term in outputs]
        needed = set(chosen)
        for value in range(len(self._ops) - 1, -1, -1):
            if value in needed:
                needed |= set(self._operands(value))
        order: dict[int, int] = {}
        cuts: set[int] = set()
        for value in range(len(self._ops)):
            if value in self._cuts:
                cuts.add(len(order))
            if value in needed and self._ops[value].kind != "input":
                for before in (*self._operands(value), value):
                    order.setdefault(before, len(order))
        for value in chosen:
            order.setdefault(value, len(order))
        ops = []
        for value in order:
            op = self._ops[value]
            ops.append(op if op.kind == "input" else Op(op.kind, order.get(op.a, -1), order.get(op.b, -1), op.constant))
        program = Program(self._num_inputs, tuple(ops), tuple(order[value] for value in chosen))
        return program, tuple(sorted(cuts - {0, len(ops)}))

    def _operands(self, value: int) -> list[int]:
        op = self._ops[value]
        return [] if op.kind == "input" else [operand for operand in (op.a, op.b) if operand >= 0]

    def _value_of(self, term: Term) -> int:
        factor = round(term.factor) if abs(abs(term.factor) - 1.0) < 1e-12 else term.factor
        return self.mul(factor, term.value)


def negative(x: Complex) -> Complex:
    """-x."""
    return Complex(scaled(x.re, -1.0), scaled(x.im, -1.0))
