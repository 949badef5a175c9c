"""The engine that is the definition: against NumPy's own sums, by dtype, reduction and length."""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from windlass.engine.collective_local import OPS, STORAGE, narrow, run_local, widen
from windlass.errors import CheckError, ConfigError
from windlass.plan.collective import SCHEDULES, Receive, Schedule, Send, cut, make_schedule

Array = npt.NDArray[Any]

ALLREDUCE = [name for name in SCHEDULES["allreduce"] if name != "hierarchical"]
NAMES = [(collective, name) for collective, table in SCHEDULES.items() for name in table]
ORDERED = [
    (collective, name) for collective, table in SCHEDULES.items() for name, entry in table.items() if entry.ordered
]
LENGTHS = [0, 1, 2, 7, 64, 101]


def schedule_for(collective: str, name: str, size: int, *, root: int = 0, pieces: int = 3) -> Schedule:
    """A schedule; a hierarchical one on hosts of two ranks, with one rank over."""
    hosts = [range(start, min(start + 2, size)) for start in range(0, size, 2)] if name == "hierarchical" else ()
    return make_schedule(collective, name, size, root=root, pieces=pieces, hosts=hosts)


def stored(values: Array, dtype: str) -> Array:
    """Numbers that the dtype holds exactly, as it stores them."""
    return narrow(values.astype(np.float32), dtype) if dtype == "bfloat16" else values.astype(STORAGE[dtype])


def whole_numbers(size: int, length: int, dtype: str, *, seed: int = 0) -> list[Array]:
    """Whole numbers whose sums over 9 ranks every dtype holds exactly: below 9 · 14 = 126 < 2^7."""
    generator = np.random.default_rng(seed)
    return [stored(generator.integers(-14, 15, length), dtype) for _ in range(size)]


def exact(buffers: list[Array], dtype: str) -> Array:
    """The sum, by NumPy, in float64."""
    total: Array = np.sum([widen(buffer, dtype).astype(np.float64) for buffer in buffers], axis=0)
    return total


def assert_same_bits(got: Array, wanted: Array) -> None:
    assert got.dtype == wanted.dtype
    assert got.tobytes() == wanted.tobytes()


# --- sums of whole numbers are NumPy's ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("name", SCHEDULES["allreduce"])
def test_allreduce_is_numpys_sum(name: str, dtype: str) -> None:
    for size, length in itertools.product(range(1, 10), LENGTHS):
        buffers = whole_numbers(size, length, dtype)
        before = [buffer.copy() for buffer in buffers]
        result = run_local(schedule_for("allreduce", name, size), buffers, dtype=dtype)
        for values in result.values:
            assert_same_bits(values, stored(exact(buffers, dtype), dtype))
        for buffer, old in zip(buffers, before, strict=True):
            assert_same_bits(buffer, old)


@pytest.mark.parametrize(("collective", "name"), [pair for pair in NAMES if pair[0] != "allreduce"])
def test_every_collective_gives_what_it_promises(collective: str, name: str) -> None:
    for size, length, root in itertools.product(range(1, 10), LENGTHS, (0, -1)):
        root = root % size if collective in ("broadcast", "reduce") else 0
        schedule = schedule_for(collective, name, size, root=root)
        buffers = whole_numbers(size, length, "float32", seed=length)
        values = run_local(schedule, buffers).values
        bounds = cut(length, schedule.num_chunks)
        parts = [slice(bounds[chunk], bounds[chunk + 1]) for chunk in range(schedule.num_chunks)]
        total = sum(buffers).astype(np.float32)  # type: ignore[union-attr]
        for rank in range(size):
            if collective == "reduce_scatter":
                assert_same_bits(values[rank][parts[rank]], total[parts[rank]])
            elif collective == "reduce":
                assert rank != root or values[rank].tobytes() == total.tobytes()
            elif collective == "broadcast":
                assert_same_bits(values[rank], buffers[root])
            elif collective == "allgather":
                for source in range(size):
                    assert_same_bits(values[rank][parts[source]], buffers[source][parts[source]])
            else:
                for source in range(size):
                    block = parts[source * size + rank]
                    assert_same_bits(values[rank][block], buffers[source][block])


@pytest.mark.parametrize("name", SCHEDULES["allreduce"])
def test_permuted_ranks_give_the_same_sum(name: str) -> None:
    buffers = whole_numbers(7, 50, "float32")
    order = np.random.default_rng(1).permutation(7)
    schedule = schedule_for("allreduce", name, 7)
    straight = run_local(schedule, buffers).values
    permuted = run_local(schedule, [buffers[rank] for rank in order]).values
    for one, other in zip(straight, permuted, strict=True):
        assert_same_bits(one, other)


# --- the order of additions ---------------------------------------------------------------------------------


def normal(size: int, length: int, dtype: str) -> list[Array]:
    generator = np.random.default_rng(length)
    return [narrow(generator.standard_normal(length).astype(np.float32), dtype) for _ in range(size)]


@pytest.mark.parametrize(("collective", "name"), ORDERED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ordered_schedules_add_in_the_order_of_ranks(collective: str, name: str, dtype: str) -> None:
    for size, length, pieces in itertools.product((1, 2, 3, 5, 8), LENGTHS, (1, 8)):
        schedule = schedule_for(collective, name, size, pieces=pieces)
        buffers = [np.random.default_rng(rank).standard_normal(length).astype(dtype) for rank in range(size)]
        wanted = reduce(np.add, buffers)
        bounds = cut(length, schedule.num_chunks)
        for rank, values in enumerate(run_local(schedule, buffers).values):
            mine = slice(bounds[rank], bounds[rank + 1]) if collective == "reduce_scatter" else slice(None)
            assert_same_bits(values[mine], wanted[mine])


@pytest.mark.parametrize("name", SCHEDULES["allreduce"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_ranks_hold_the_same_bits(name: str, dtype: str) -> None:
    for size in (2, 3, 4, 6, 8):
        values = run_local(schedule_for("allreduce", name, size), normal(size, 40, dtype), dtype=dtype).values
        for other in values[1:]:
            assert_same_bits(other, values[0])


def test_other_orders_round_otherwise() -> None:
    """Or the tests above would see nothing."""
    buffers = normal(8, 1000, "float32")
    found = {run_local(schedule_for("allreduce", name, 8), buffers).values[0].tobytes() for name in ALLREDUCE}
    assert len(found) >= 4


# --- what an addition is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_add_rounds_each_time_and_fold_once(dtype: str) -> None:
    buffers = normal(5, 1000, dtype)
    wide = [widen(buffer, dtype) for buffer in buffers]
    each = reduce(lambda total, part: widen(narrow(total + part, dtype), dtype), wide)
    once = narrow(reduce(np.add, wide), dtype)
    assert_same_bits(
        run_local(schedule_for("allreduce", "naive", 5), buffers, dtype=dtype).values[3], narrow(each, dtype)
    )
    assert_same_bits(run_local(schedule_for("allreduce", "direct", 5), buffers, dtype=dtype).values[3], once)
    assert narrow(each, dtype).tobytes() != once.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_torchs(dtype: str) -> None:
    """All 65,536 halves widen, and random, odd and half-way float32 numbers narrow, as PyTorch does it."""
    kind = getattr(torch, dtype)
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits if dtype == "bfloat16" else bits.view(np.float16)
    wanted = torch.from_numpy(bits.view(np.int16)).view(kind).float().numpy()
    assert np.array_equal(widen(halves, dtype), wanted, equal_nan=True)
    generator = np.random.default_rng(0)
    numbers = generator.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    numbers[: 1 << 16] = (bits.astype(np.uint32) << 16) | 0x8000
    numbers[-3:] = [0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF]
    floats = numbers.view(np.float32)
    with np.errstate(all="ignore"):
        got = widen(narrow(floats, dtype), dtype)
    assert np.array_equal(got, torch.from_numpy(floats).to(kind).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_mean_is_the_sum_divided_once(dtype: str) -> None:
    for name, size in itertools.product(("ring", "direct", "naive"), (1, 2, 3, 7)):
        buffers = whole_numbers(size, 33, dtype, seed=size)
        wide: Any = np.float64 if dtype in ("float64", "int16", "int32") else np.float32
        quotient = np.divide(exact(buffers, dtype).astype(wide), wide(size))
        wanted = np.trunc(quotient) if dtype.startswith("int") else quotient
        for values in run_local(schedule_for("allreduce", name, size), buffers, op="mean", dtype=dtype).values:
            assert_same_bits(values, stored(wanted, dtype))


def test_a_mean_divides_results_alone() -> None:
    buffers = [np.array([2.0, 4.0], dtype=np.float32), np.array([6.0, 10.0], dtype=np.float32)]
    for root in (0, 1):
        values = run_local(schedule_for("reduce", "binomial", 2, root=root), buffers, op="mean").values
        assert values[root].tolist() == [4.0, 7.0]
        assert values[1 - root].tolist() == buffers[1 - root].tolist()
    assert run_local(schedule_for("reduce_scatter", "ring", 2), buffers, op="mean").values[1][1] == 7.0
    assert run_local(schedule_for("broadcast", "binomial", 2), buffers, op="mean").values[1].tolist() == [2.0, 4.0]


def test_integer_means_are_rounded_towards_zero() -> None:
    buffers = [np.array([-3, 3, -1, 5, 2**31 - 1], dtype=np.int32), np.zeros(5, dtype=np.int32)]
    values = run_local(schedule_for("allreduce", "ring", 2), buffers, op="mean").values
    assert values[0].tolist() == [-1, 1, 0, 2, 2**30 - 1]


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_integers_wrap(dtype: str) -> None:
    most = np.iinfo(dtype).max
    buffers = [np.array([most, -most - 1, 3], dtype=dtype), np.array([1, -1, 4], dtype=dtype)]
    for name in ALLREDUCE:
        assert run_local(schedule_for("allreduce", name, 2), buffers).values[0].tolist() == [-most - 1, most, 7]
    product = run_local(schedule_for("allreduce", "ring", 2), buffers, op="prod").values[1]
    assert product.tolist() == [most, -most - 1, 12]


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("op", ["max", "min", "prod"])
def test_greatest_least_and_product_are_numpys(op: str, dtype: str) -> None:
    ufunc = {"max": np.maximum, "min": np.minimum, "prod": np.multiply}[op]
    for name, size in itertools.product(SCHEDULES["allreduce"], (2, 3, 5)):
        buffers = [stored(np.random.default_rng(r).integers(-2, 3, 40), dtype) for r in range(size)]  # 2^5 is exact
        wanted = ufunc.reduce([widen(buffer, dtype).astype(np.float64) for buffer in buffers])
        values = run_local(schedule_for("allreduce", name, size), buffers, op=op, dtype=dtype).values
        for mine in values:
            assert np.array_equal(widen(mine, dtype), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_a_nan_of_any_rank_reaches_all(op: str, dtype: str) -> None:
    for name, who in itertools.product(SCHEDULES["allreduce"], range(5)):
        buffers = [stored(np.full(7, rank + 1.0), dtype) for rank in range(5)]
        buffers[who][3] = stored(np.array([np.nan]), dtype)[0]
        for values in run_local(schedule_for("allreduce", name, 5), buffers, op=op, dtype=dtype).values:
            assert np.isnan(widen(values, dtype)).tolist() == [False, False, False, True, False, False, False]


def test_infinities_and_overflow() -> None:
    buffers = [np.array([np.inf, 65504.0, 1.0], dtype=np.float16), np.array([-np.inf, 65504.0, -np.inf], np.float16)]
    values = run_local(schedule_for("allreduce", "naive", 2), buffers).values[0]
    assert np.isnan(values[0]) and values[1:].tolist() == [np.inf, -np.inf]


# --- the trace, and what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(("collective", "name"), NAMES)
def test_the_trace_holds_every_message_once(collective: str, name: str) -> None:
    schedule = schedule_for(collective, name, 6)
    result = run_local(schedule, whole_numbers(6, 36, "int32"))
    wanted = [(rank, n, m) for rank in range(6) for n, step in enumerate(schedule.steps(rank)) for m in step]
    assert sorted(map(repr, result.trace)) == sorted(map(repr, wanted))
    under_way = 0
    for rank in range(6):
        steps = [step for mine, step, _ in result.trace if mine == rank]
        assert steps == sorted(steps)
    for _, _, message in result.trace:
        under_way += 1 if isinstance(message, Send) else -1
        assert under_way >= 0
    assert result.seconds == 0.0


class Stuck:
    """Both ranks wait for the other."""

    collective, size, num_chunks = "allreduce", 2, 1
    setting = make_schedule("allreduce", "naive", 2).setting

    def steps(self, rank: int) -> tuple[tuple[Send | Receive, ...], ...]:
        return ((Receive(1 - rank, (0,), "add"),), (Send(1 - rank, (0,)),))


def test_a_schedule_that_stands_still_is_named() -> None:
    with pytest.raises(CheckError, match="deadlock: rank 0, step 0 waits for rank 1"):
        run_local(Stuck(), whole_numbers(2, 4, "float32"))


@pytest.mark.parametrize(
    ("buffers", "more", "message"),
    [
        ([np.zeros(3)], {}, "2 ranks needs as many buffers, got 1"),
        ([np.zeros(3), np.zeros(4)], {}, r"rank 1 needs float64 of shape \(3,\), got float64 of shape \(4,\)"),
        ([np.zeros((2, 2)), np.zeros((2, 2))], {}, r"rank 0 needs float64 of shape \(2,\), got .* \(2, 2\)"),
        ([np.zeros(3), np.zeros(3, np.float32)], {}, "rank 1 needs float64 .* got float32"),
        ([np.zeros(3), np.zeros(3)], {"op": "avg"}, "unknown reduction 'avg'"),
        ([np.zeros(3), np.zeros(3)], {"dtype": "bfloat"}, "unknown dtype 'bfloat'; did you mean 'bfloat16'"),
        ([np.zeros(3), np.zeros(3)], {"dtype": "bfloat16"}, "needs uint16 .* got float64"),
        ([np.zeros(3, np.int64), np.zeros(3, np.int64)], {}, "unknown dtype 'int64'"),
    ],
)
def test_what_does_not_fit_is_refused(buffers: list[Array], more: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_local(schedule_for("allreduce", "ring", 2), buffers, **more)
