from __future__ import annotations

import pytest
import torch

from windlass.kernels.jit import DISABLED
from windlass.plan.number import NumberFormat, Rounding, parse_format
from windlass.precision import Key
from windlass.precision.adder import adder
from windlass.precision.counters import Counters
from windlass.precision.quantize import DTYPES
from windlass.precision.rounder import Rounder, widen

UPDATE_KEY, KEY = Key(7, 3, 2), Key(7, 4, 2)
SIZES = (0, 1, 15, 17, 1025) if DISABLED else (0, 1, 15, 17, 1025, 16385, 100003, 256 * 16384 + 5)


def by_hand(
    new: torch.Tensor, codes: torch.Tensor, update: NumberFormat, number: NumberFormat, rounding: Rounding, first: int
) -> tuple[Counters, Counters, int]:  # fmt: skip
    """Widened, subtracted, rounded, added and rounded, one after the other."""
    added, stored = Counters(), Counters()
    old = widen(codes, number, torch.empty(codes.shape))
    change = new - old
    Rounder(update, rounding, torch.float32, counted=True)(change, change, UPDATE_KEY.words, first, added)
    Rounder(number, rounding, codes.dtype, counted=True)(old + change, codes, KEY.words, first, stored)
    return added, stored, int(torch.count_nonzero(change))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("update", "number", "rounding"),
    [
        ("<2,14>", "<2,14>", "stochastic"), ("<1,19>", "<4,12>", "nearest"), ("<2,14>", "<4,12>", "floor"),
        ("float16", "<1,7>", "stochastic"), ("bfloat16", "<4,20>", "nearest"),
    ],
)  # fmt: skip
def test_one_pass_is_what_six_are(size: int, update: str, number: str, rounding: Rounding) -> None:
    generator = torch.Generator().manual_seed(size)
    change, weight = parse_format(update), parse_format(number)
    codes = torch.randint(-100, 100, (size,), generator=generator).to(DTYPES[weight.storage])
    new = widen(codes, weight, torch.empty(size)) + 0.01 * torch.randn(size, generator=generator)
    new[: size // 3] += 40 * torch.randn(size // 3, generator=generator)
    new[size // 2 : size // 2 + 2] = torch.nan
    expected = codes.clone()
    for first in (0, 13):
        added, stored, moved = by_hand(new, expected, change, weight, rounding, first)
        before, at_once = new.clone(), adder(change, weight, rounding)
        assert at_once is not None
        done = at_once(new, codes, UPDATE_KEY.words, KEY.words, first)
        assert done is not None
        torch.testing.assert_close(new, before, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(codes, expected)
        assert done[:3] == (added.saturated, added.zeroed, added.not_a_number)
        assert done[5:8] == (stored.saturated, stored.zeroed, stored.not_a_number)
        assert done.moved == moved
        assert done.update_error == pytest.approx(added.error_sum, rel=1e-6)
        assert done.error == pytest.approx(stored.error_sum, rel=1e-6)


def test_the_number_of_threads_changes_no_bit() -> None:
    number = parse_format("<2,14>")
    at_once, results, threads = adder(number, number, "stochastic"), [], torch.get_num_threads()
    assert at_once is not None
    start, new = torch.zeros(100000, dtype=torch.int16), torch.randn(100000)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            codes = start.clone()
            results.append((at_once(new, codes, UPDATE_KEY.words, KEY.words), codes))
    finally:
        torch.set_num_threads(threads)
    for done, codes in results[1:]:
        assert done == results[0][0] and torch.equal(codes, results[0][1])


def test_what_several_passes_do() -> None:
    number = parse_format("<2,14>")
    at_once = adder(number, number, "nearest")
    assert at_once is not None
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    codes = torch.zeros_like(images, dtype=torch.int16)
    assert at_once(images, codes, KEY.words, KEY.words) is None and not codes.any()
    assert at_once(torch.randn(4), torch.zeros(3, dtype=torch.int16), KEY.words, KEY.words) is None
    assert at_once(torch.randn(4), torch.zeros(4, dtype=torch.int8), KEY.words, KEY.words) is None
    for pair in (("float32", "<2,14>"), ("<2,14>", "float16"), ("<2,14>", "float32")):
        assert adder(parse_format(pair[0]), parse_format(pair[1]), "nearest") is None
