from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from windlass.kernels.rounding import round_array
from windlass.kernels.rounding.reference import Target, encoded, halves, philox, rounded
from windlass.plan.number import BFLOAT16, FLOAT16, fixed

Array = np.ndarray[Any, Any]
WORDS = (0x89ABCDEF, 0x01234567, 3, 0xFFFFFFFF)
NAN, INF = float("nan"), float("inf")
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 3e38, -3e38, 0.5, -0.5, 1.5, -1.5, 2.5, 65519.9, 65520.0]

FORMATS: dict[str, tuple[Target, str, tuple[str, ...]]] = {
    "fixed(16,12)": (Target(-8, 8 - 2**-12, -1, -12), "fixed", ("float32", "int16", "int32")),
    "fixed(8,0)": (Target(-128, 127, -1, 0), "fixed", ("int8",)),
    "float16": (Target(FLOAT16.lowest, FLOAT16.highest, 10, -24), "float16", ("float32", "float16")),
    "bfloat16": (Target(BFLOAT16.lowest, BFLOAT16.highest, 7, -133), "bfloat16", ("float32", "bfloat16")),
}


def numbers(size: int, *, spread: int = 12) -> Array:
    """Numbers of many magnitudes, the special ones among them."""
    random = np.random.default_rng(size)
    x = random.standard_normal(size) * 2.0 ** random.integers(-spread, spread, size)
    x[: len(SPECIAL)] = SPECIAL[:size]
    with np.errstate(all="ignore"):
        return x.astype(np.float32)


def bits(x: Array) -> Array:
    return x.view(f"u{x.itemsize}")


def run(x: Array, target: Target, form: str, rounding: str, store: str, **more: Any) -> tuple[Array, Any]:
    """The kernel's result, and its counts."""
    out = np.empty(x.shape, {"float16": np.uint16, "bfloat16": np.uint16}.get(store, store))
    step = 2.0**target.exponent if form == "fixed" else 1.0
    counts = round_array(
        x, out, form=form, rounding=rounding, low=target.low, high=target.high, step=step, words=WORDS, **more
    )
    return out, counts


def check(out: Array, expected: Array, x: Array, store: str) -> None:
    """Equal bits; NaN where there is NaN."""
    nan = np.isnan(x) if "float" in store else np.zeros(x.shape, bool)
    np.testing.assert_array_equal(bits(out)[~nan], bits(expected)[~nan])
    kept = {"float32": out, "float16": out.view(np.float16) if store == "float16" else out}.get(store)
    if kept is not None and nan.any():
        assert np.isnan(kept[nan]).all()
    if store == "bfloat16" and nan.any():
        assert np.isnan((out[nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_philox_gives_its_authors_vectors() -> None:
    """Salmon et al., Random123, kat_vectors: philox4x32 10."""
    ones = 0xFFFFFFFF
    known = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]  # fmt: skip
    for counter, key, expected in known:
        assert tuple(philox(np.array([counter], np.uint32), key)[0]) == expected


def test_the_layout_of_random_bits() -> None:
    """Element i takes half i mod 2 of word (i mod 8) // 2 of block i // 8."""
    expected = [0xE8D5, 0x6627, 0xC58D, 0xE169, 0xAC4C, 0xBC57, 0xDBD8, 0x9B00]
    assert list(halves((0, 0, 0, 0), 0, 8)) == expected
    assert list(halves((0, 0, 0, 0), 3, 3)) == expected[3:6]
    block = philox(np.array([[1, 0, 3, 9]], np.uint32), (5, 6))[0]
    assert list(halves((5, 6, 3, 9), 8, 2)) == [block[0] & 0xFFFF, block[0] >> 16]
    far = philox(np.array([[2, 1, 3, 9]], np.uint32), (5, 6))[0]
    assert halves((5, 6, 3, 9), 8 * ((1 << 32) + 2), 1)[0] == far[0] & 0xFFFF


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "floor"])
@pytest.mark.parametrize(("name", "store"), [(name, store) for name, entry in FORMATS.items() for store in entry[2]])
def test_the_kernel_has_the_bits_of_the_definition(name: str, rounding: str, store: str) -> None:
    target, form, _ = FORMATS[name]
    for size in (1, 15, 16, 17, 1023, 1025, 40007):
        x = numbers(size, spread=40 if form != "fixed" else 12)
        values, expected = rounded(x, target, rounding, halves(WORDS, 0, size))
        for threads in (1, 2):
            out, counts = run(x, target, form, rounding, store, counted="all", threads=threads)
            check(out, encoded(values, target, store), x, store)
            assert counts[:3] == expected[:3]
            assert counts.error == pytest.approx(expected.error, rel=1e-5)
        plain, nothing = run(x, target, form, rounding, store, threads=2)
        assert nothing == (0, 0, 0, 0)
        also, nan = run(x, target, form, rounding, store, counted="nan", threads=2)
        assert nan == (0, 0, expected.not_a_number, 0)
        check(also, encoded(values, target, store), x, store)
        check(plain, encoded(values, target, store), x, store)


@pytest.mark.parametrize("size", [9 * 1024, (2 << 20) + 16])
def test_in_place_and_past_the_caches(size: int) -> None:
    target, form, _ = FORMATS["fixed(16,12)"]
    x = numbers(size)
    expected = rounded(x, target, "stochastic", halves(WORDS, 0, size))[0]
    out, _ = run(x, target, form, "stochastic", "float32", threads=2)
    check(out, expected, x, "float32")
    round_array(x, x, form=form, rounding="stochastic", low=target.low, high=target.high, step=2.0**-12, words=WORDS)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize(
    ("batch", "channels", "pixels"),
    [
        (2, 3, 35),
        (1, 16, 7),
        (3, 5, 9000),
        (2, 100, 1000),
        (1, 700, 49),
        (1, 33000, 3),
        (1, 2, 40001),
        (2, 1, 9),
        (2, 64, 1027),
    ],
)
def test_transposed_memory_has_the_bits_of_logical_positions(batch: int, channels: int, pixels: int) -> None:
    target, form, _ = FORMATS["fixed(16,12)"]
    x = numbers(batch * channels * pixels).reshape(batch, channels, pixels)
    values = rounded(x, target, "stochastic", halves(WORDS, 0, x.size).reshape(x.shape))[0]
    lying = np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(-1)
    expected = np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1)
    for threads in (1, 2):
        out, _ = run(lying, target, form, "stochastic", "float32", planes=(batch, channels, pixels), threads=threads)
        check(out, expected, lying, "float32")


@pytest.mark.parametrize("fl", [-100, -20, 0, 100, 126])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "floor"])
def test_extreme_steps(fl: int, rounding: str) -> None:
    for wl in (1, 2, 9, 24):
        number = fixed(wl, fl)
        target = Target(number.lowest, number.highest, -1, -fl)
        with np.errstate(all="ignore"):
            x = (numbers(2000, spread=9).astype(np.float64) * 2.0**-fl).astype(np.float32)
        x[:6] = [1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38]
        values, _ = rounded(x, target, rounding, halves(WORDS, 0, x.size))
        out, _ = run(x, target, "fixed", rounding, "float32")
        check(out, values, x, "float32")


@pytest.mark.parametrize("first", [1, 7, 8, 1001, (1 << 35) - 5, (1 << 40) + 3])
@pytest.mark.parametrize("size", [5, 1024, 3001, 40007])
def test_the_first_position_says_which_bits_are_taken(first: int, size: int) -> None:
    target, form, _ = FORMATS["fixed(16,12)"]
    x = numbers(size)
    values, _ = rounded(x, target, "stochastic", halves(WORDS, first, size))
    for threads in (1, 2):
        out, _ = run(x, target, form, "stochastic", "float32", first=first, threads=threads)
        check(out, values, x, "float32")
    elsewhere, _ = rounded(x, target, "stochastic", halves(WORDS, first + 1, size))
    assert size < 100 or not np.array_equal(bits(elsewhere), bits(values))  # else the test could not fail


@pytest.mark.parametrize("planes", [(3, 5, 35), (2, 3, 40001), (2, 64, 1027), (1, 16, 4000)])
@pytest.mark.parametrize("first", [3, 8, (1 << 35) - 50])
def test_the_first_position_of_transposed_memory(planes: tuple[int, int, int], first: int) -> None:
    target, form, _ = FORMATS["fixed(16,12)"]
    x = numbers(planes[0] * planes[1] * planes[2]).reshape(planes)
    values = rounded(x, target, "stochastic", halves(WORDS, first, x.size).reshape(x.shape))[0]
    lying = np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(-1)
    expected = np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1)
    out, _ = run(lying, target, form, "stochastic", "float32", planes=planes, first=first, threads=2)
    check(out, expected, lying, "float32")
