"""The recorder of straight-line programs."""

from __future__ import annotations

from windlass.plan.linear import Recorder, run


def test_equal_operations_are_recorded_once() -> None:
    recorder = Recorder(2)
    a, b = recorder.inputs
    assert recorder.add(a, b) == recorder.add(b, a)
    assert recorder.sub(a, b) != recorder.sub(b, a)


def test_zeros_ones_and_signs_cost_nothing() -> None:
    recorder = Recorder(2)
    a, b = recorder.inputs
    zero = recorder.zero
    assert recorder.add(a, zero) == a
    assert recorder.sub(a, zero) == a
    assert recorder.sub(a, a) == zero
    assert recorder.mul(0, a) == zero
    assert recorder.mul(1, a) == a
    assert recorder.neg(recorder.neg(a)) == a
    assert recorder.add(a, recorder.neg(b)) == recorder.sub(a, b)
    assert recorder.sub(a, recorder.neg(b)) == recorder.add(a, b)
    assert recorder.sub(zero, recorder.sub(a, b)) == recorder.sub(b, a)
    assert recorder.fma(-1, a, b) == recorder.sub(b, a)
    assert recorder.fma(2, a, zero) == recorder.mul(2, a)


def test_what_no_output_needs_is_left_out() -> None:
    recorder = Recorder(3)
    a, b, c = recorder.inputs
    recorder.mul(5, recorder.add(a, c))
    program = recorder.program([recorder.sub(a, b), b])
    assert [op.kind for op in program.ops] == ["input", "input", "sub"]
    assert run(program, [7, 3, 100]) == [4, 3]


def test_flops_count_a_fused_operation_as_two() -> None:
    recorder = Recorder(2)
    a, b = recorder.inputs
    assert recorder.program([recorder.fma(3, a, b), recorder.add(a, b)]).flops == 3
