"""Straight-line programs for linear maps: additions and multiplications by constants, nothing else.

Winograd's transforms and Fourier codelets are such maps.  A program is data: `Recorder` records one with
common subexpressions shared, `run` interprets it (the definition), and `windlass.kernels.vector` emits it as
vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeVar

Kind = Literal["zero", "input", "add", "sub", "neg", "mul", "fma"]
Number = float | Fraction


@dataclass(frozen=True, slots=True)
class Op:
    """One value: of two earlier values `a` and `b` and a constant.

    zero; input number `a`; a + b; a - b; -a; constant · a; constant · a + b (one rounding where the host can).
    """

    kind: Kind
    a: int = -1
    b: int = -1
    constant: float = 0.0


@dataclass(frozen=True, slots=True)
class Program:
    """Values in an order in which they can be computed, and which of them are the outputs."""

    num_inputs: int
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Additions and multiplications; a fused multiply-add counts two."""
        return sum({"add": 1, "sub": 1, "mul": 1, "fma": 2}.get(op.kind, 0) for op in self.ops)


Value = TypeVar("Value")


def evaluate(
    program: Program, inputs: Sequence[Value], apply: Callable[[Op, Value | None, Value | None], Value]
) -> list[Value]:
    """Walks the program; `apply` makes the value of each operation other than an input."""
    values: list[Any] = []
    for op in program.ops:
        if op.kind == "input":
            values.append(inputs[op.a])
        else:
            values.append(apply(op, values[op.a] if op.a >= 0 else None, values[op.b] if op.b >= 0 else None))
    return [values[output] for output in program.outputs]


def run(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The definition: works on numbers and on NumPy arrays.

    >>> run(matrix_program([[Fraction(1), Fraction(2)], [Fraction(1), Fraction(-2)]]), [10, 1])
    [12.0, 8.0]
    """
    return evaluate(program, inputs, _apply)


def _apply(op: Op, a: Any, b: Any) -> Any:
    match op.kind:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "neg":
            return -a
        case "mul":
            return a * op.constant
        case "fma":
            return a * op.constant + b
        case _:
            return 0.0


class Recorder:
    """Records a program; equal operations are recorded once, operations with zero not at all."""

    def __init__(self, num_inputs: int) -> None:
        self._num_inputs = num_inputs
        self._ops: list[Op] = []
        self._known: dict[Op, int] = {}
        self.inputs = [self._value(Op("input", i)) for i in range(num_inputs)]
        self.zero = self._value(Op("zero"))

    def _value(self, op: Op) -> int:
        if op not in self._known:
            self._known[op] = len(self._ops)
            self._ops.append(op)
        return self._known[op]

    def _is(self, a: int, kind: Kind) -> bool:
        return self._ops[a].kind == kind

    def add(self, a: int, b: int) -> int:
        """The value a + b."""
        if self._is(a, "zero"):
            return b
        if self._is(b, "zero"):
            return a
        if self._is(b, "neg"):
            return self.sub(a, self._ops[b].a)
        if self._is(a, "neg"):
            return self.sub(b, self._ops[a].a)
        return self._value(Op("add", min(a, b), max(a, b)))

    def sub(self, a: int, b: int) -> int:
        """The value a - b."""
        if self._is(b, "zero"):
            return a
        if self._is(a, "zero"):
            return self.neg(b)
        if self._is(b, "neg"):
            return self.add(a, self._ops[b].a)
        return self.zero if a == b else self._value(Op("sub", a, b))

    def neg(self, a: int) -> int:
        """The value -a."""
        if self._is(a, "zero"):
            return a
        if self._is(a, "neg"):
            return self._ops[a].a
        if self._is(a, "sub"):
            return self._value(Op("sub", self._ops[a].b, self._ops[a].a))
        return self._value(Op("neg", a))

    def mul(self, constant: Number, a: int) -> int:
        """The value constant · a."""
        if constant == 0 or self._is(a, "zero"):
            return self.zero
        if constant == 1:
            return a
        if constant == -1:
            return self.neg(a)
        return self._value(Op("mul", a, -1, float(constant)))

    def fma(self, constant: Number, a: int, b: int) -> int:
        """The value constant · a + b."""
        if constant == 0 or self._is(a, "zero"):
            return b
        if constant == 1:
            return self.add(a, b)
        if constant == -1:
            return self.sub(b, a)
        if self._is(b, "zero"):
            return self.mul(constant, a)
        return self._value(Op("fma", a, b, float(constant)))

    def combine(self, terms: Sequence[tuple[Number, int]]) -> int:
        """The value Σ coefficient · value, starting from a term that costs nothing."""
        ordered = sorted((term for term in terms if term[0]), key=lambda term: (term[0] != 1, term[0] != -1))
        total = self.zero
        for coefficient, value in ordered:
            total = self.fma(coefficient, value, total)
        return total

    def program(self, outputs: Sequence[int]) -> Program:
        """The program of these outputs, without what none of them needs, in order of first need."""
        order: dict[int, int] = {}
        ops: list[Op] = []

        def need(value: int) -> int:
            stack = [value]
            while stack:
                top = stack[-1]
                op = self._ops[top]
                operands = [] if op.kind in ("input", "zero") else [v for v in (op.a, op.b) if v >= 0]
                missing = [v for v in operands if v not in order]
                if top not in order and not missing:
                    order[top] = len(ops)
                    a, b = (op.a, -1) if op.kind == "input" else (order.get(op.a, -1), order.get(op.b, -1))
                    ops.append(Op(op.kind, a, b, op.constant))
                if missing:
                    stack.extend(reversed(missing))
                else:
                    stack.pop()
            return order[value]

        chosen = tuple(need(value) for value in outputs)
        return Program(self._num_inputs, tuple(ops), chosen)


def matrix_program(matrix: Sequence[Sequence[Fraction]]) -> Program:
    """The program of outputs = matrix · inputs.

    Interpolation at ±p makes columns, or rows, that agree up to signs: their sums and differences, or their
    even and odd parts, are computed once.
    """
    recorder = Recorder(len(matrix[0]))
    columns = list(recorder.inputs)
    rows = [list(row) for row in matrix]
    for i, j in _pairs(list(zip(*matrix, strict=True))):
        columns[i], columns[j] = recorder.add(columns[i], columns[j]), recorder.sub(columns[i], columns[j])
        for row in rows:
            same = row[i] == row[j]
            row[i], row[j] = (row[i], Fraction(0)) if same else (Fraction(0), row[i])
    outputs = [-1] * len(rows)
    for i, j in _pairs([tuple(row) for row in rows]):
        terms = [(a, column, a == b) for a, b, column in zip(rows[i], rows[j], columns, strict=True) if a]
        even = recorder.combine([(a, column) for a, column, same in terms if same])
        odd_terms = [(a, column) for a, column, same in terms if not same]
        scale = Fraction(1) if any(abs(a) == 1 for a, _ in odd_terms) else odd_terms[-1][0]
        odd = recorder.combine([(a / scale, column) for a, column in odd_terms])
        outputs[i], outputs[j] = recorder.fma(scale, odd, even), recorder.fma(-scale, odd, even)
    for i, row in enumerate(rows):
        if outputs[i] < 0:
            outputs[i] = recorder.combine(list(zip(row, columns, strict=True)))
    return recorder.program(outputs)


def _pairs(vectors: Sequence[tuple[Fraction, ...]]) -> list[tuple[int, int]]:
    """Disjoint pairs of vectors that are equal up to signs, in some places equal and in others opposite."""
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for i, first in enumerate(vectors):
        for j in range(i + 1, len(vectors)):
            values = [(a, b) for a, b in zip(first, vectors[j], strict=True) if a or b]
            if i in taken or j in taken or not all(abs(a) == abs(b) for a, b in values):
                continue
            if any(a == b for a, b in values) and any(a == -b for a, b in values):
                pairs.append((i, j))
                taken |= {i, j}
    return pairs
