"""The kernels of reductions against NumPy, and the shared-memory sum with several ranks played by one thread."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from windlass.kernels.collective.combine import OPS, STORAGE, WIDE, combine, divide, kind_of, scratch_of
from windlass.kernels.collective.shared import DESCRIPTOR, make_one_shot, make_progress, num_counters, slot_elements

FUNCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}
LENGTHS = (0, 1, 7, 1023, 1024, 2500)


def widen(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        return values.view(np.float16).astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else values


def narrow(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "float16":
        return values.astype(np.float16).view(np.uint16)
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
    return values.astype(STORAGE[dtype])


def numbers(length: int, dtype: str, seed: int) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    if np.issubdtype(WIDE[dtype], np.integer):
        low, high = np.iinfo(STORAGE[dtype]).min, np.iinfo(STORAGE[dtype]).max
        return random.integers(low, high, length, dtype=STORAGE[dtype], endpoint=True)
    values = random.standard_normal(length) * 10.0 ** random.integers(-3, 4, length)
    return narrow(values.astype(WIDE[dtype]), dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", STORAGE)
def test_combine_is_numpys_with_one_rounding(dtype: str, op: str) -> None:
    for length in LENGTHS:
        a, b = numbers(length, dtype, 1), numbers(length, dtype, 2)
        with np.errstate(all="ignore"):
            want = narrow(FUNCTIONS[op](widen(a, dtype), widen(b, dtype)), dtype)
        combine(a, b, dtype=dtype, op=op)
        assert a.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("op", ["max", "min"])
def test_a_nan_on_either_side_stays(dtype: str, op: str) -> None:
    values = np.array([np.nan, 1.0, np.inf, -np.inf, np.nan], dtype=WIDE[dtype])
    a, b = narrow(values, dtype), narrow(values[::-1].copy(), dtype)
    combine(a, b, dtype=dtype, op=op)
    assert np.isnan(widen(a, dtype)).tolist() == [True, False, False, False, True]


def test_every_half_rounds_as_it_should() -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    for dtype in ("float16", "bfloat16"):
        same = every.copy()
        one = narrow(np.full(every.size, 1.0, dtype=np.float32), dtype)
        combine(same, one, dtype=dtype, op="prod")
        finite = ~np.isnan(widen(every, dtype))
        assert (same[finite] == every[finite]).all() and np.isnan(widen(same[~finite], dtype)).all()


@pytest.mark.parametrize("dtype", STORAGE)
def test_division_rounds_once_and_integers_towards_zero(dtype: str) -> None:
    values = numbers(500, dtype, 3)
    wide = widen(values, dtype)
    want = np.trunc(wide / 3) if np.issubdtype(WIDE[dtype], np.integer) else wide / WIDE[dtype](3)
    divide(values, 3, dtype=dtype)
    if dtype in ("int64",):  # through float64, as far as that goes
        assert np.allclose(values, want)
    else:
        assert values.tobytes() == narrow(want, dtype).tobytes()


class Host:
    """Ranks that share memory, all played here."""

    def __init__(self, size: int, dtype: str, *, piece: int, slots: int) -> None:
        self.size, self.dtype, self.piece, self.slots = size, dtype, piece, slots
        self.counters = np.zeros(num_counters(size), dtype=np.int64)
        self.data = np.zeros(slots * slot_elements(size, piece), dtype=STORAGE[dtype])
        self.progress = make_progress(kind_of(dtype))
        self.base = 0

    def reduce(self, parts: list[NDArray[Any]], *, op: str, mean: bool, seed: int) -> list[NDArray[Any]]:
        """Moves ranks on in a random order until all are done."""
        outs = [np.zeros_like(part) for part in parts]
        states = [np.array([self.base, 0, 0, 0, 0], dtype=np.int64) for _ in parts]
        left, random = list(range(self.size)), np.random.default_rng(seed)
        for _ in range(100_000):
            if not left:
                break
            rank = int(random.choice(left))
            done = self.progress(
                self.counters, self.data, parts[rank], outs[rank], scratch_of(self.dtype), states[rank],
                rank, self.size, self.slots, self.piece, OPS[op], mean, 0, False,
            )  # fmt: skip
            if done:
                left.remove(rank)
        assert not left, "somebody waits for ever"
        assert [state[4] for state in states] == [part.size for part in parts], "what was written, counted"
        self.base += -(-parts[0].size // self.piece)
        return outs


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int16"])
def test_ranks_in_any_order_sum_in_the_order_of_ranks(size: int, dtype: str) -> None:
    host = Host(size, dtype, piece=256, slots=2)
    for number, length in enumerate((1000, 0, 1, 255, 256, 257, 64, 2049)):
        parts = [numbers(length, dtype, 10 * number + rank) for rank in range(size)]
        wide = widen(parts[0], dtype).copy()
        with np.errstate(all="ignore"):
            for part in parts[1:]:
                wide = wide + widen(part, dtype)
            want = narrow(wide, dtype)
        for out in host.reduce(parts, op="sum", mean=False, seed=number):
            assert out.tobytes() == want.tobytes(), (length, size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_in_one_go_two_places_are_enough(dtype: str) -> None:
    size, place, length = 3, 64, 50
    counters = np.zeros(num_counters(size), dtype=np.int64)
    data = np.zeros(2 * size * place, dtype=STORAGE[dtype])
    like, wide, acc = data[:0], np.empty(0, dtype=WIDE[dtype]), scratch_of(dtype)
    one_shot, random = make_one_shot(kind_of(dtype)), np.random.default_rng(0)
    parts = [[numbers(length, dtype, 10 * number + rank) for rank in range(size)] for number in range(6)]
    outs = [[np.zeros_like(part) for part in row] for row in parts]

    def describe(number: int, rank: int) -> NDArray[np.int64]:
        values = {
            "counters": counters.ctypes.data, "num_counters": counters.size, "data": data.ctypes.data,
            "num_data": data.size, "x": parts[number][rank].ctypes.data, "out": outs[number][rank].ctypes.data,
            "length": length, "acc": acc.ctypes.data, "rank": rank, "size": size, "place": place, "number": number,
            "op": 0, "mean": 0, "spins": 0, "crowded": 0, "begun": 0, "written": 0,
        }  # fmt: skip
        return np.array([values[name] for name in DESCRIPTOR], dtype=np.int64)

    waiting = {rank: [describe(number, rank) for number in range(6)] for rank in range(size)}
    for _ in range(10_000):
        if not any(waiting.values()):
            break
        rank = int(random.choice([rank for rank, left in waiting.items() if left]))
        if one_shot(waiting[rank][0], like, wide):
            waiting[rank].pop(0)
    assert not any(waiting.values())
    for number in range(6):
        with np.errstate(all="ignore"):
            total = sum((widen(part, dtype) for part in parts[number][1:]), widen(parts[number][0], dtype))
            want = narrow(total, dtype)
        assert all(out.tobytes() == want.tobytes() for out in outs[number]), number


def test_a_mean_divides_the_stored_sum() -> None:
    host = Host(3, "bfloat16", piece=128, slots=2)
    parts = [numbers(300, "bfloat16", rank) for rank in range(3)]
    total = sum((widen(part, "bfloat16") for part in parts[1:]), widen(parts[0], "bfloat16"))
    want = narrow(widen(narrow(total, "bfloat16"), "bfloat16") / np.float32(3), "bfloat16")
    for out in host.reduce(parts, op="sum", mean=True, seed=0):
        assert out.tobytes() == want.tobytes()


def test_without_a_compiler_the_same() -> None:
    """The twins in plain Python, on small sizes."""
    combined = "combine_is_numpys and (float16-sum or bfloat16-max or int32-max)"
    chosen = f"{combined} or divides_the_stored or (two_places and bfloat16)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
