from __future__ import annotations

import pytest

from windlass.errors import ConfigError
from windlass.plan.number import BFLOAT16, FLOAT16, FLOAT32, Fixed, Key, check_rounding, fixed, parse_format


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<4,12>", fixed(16, 12)),
        ("⟨2, 14⟩", fixed(16, 14)),
        ("fixed(16,12)", fixed(16, 12)),
        ("Fixed( 8 , -3 )", fixed(8, -3)),
        ("<-4,12>", fixed(8, 12)),
        ("fixed(8,4,symmetric)", fixed(8, 4, symmetric=True)),
        ("float16", FLOAT16),
        ("bfloat16", BFLOAT16),
        ("float32", FLOAT32),
        (FLOAT16, FLOAT16),
    ],
)
def test_formats_are_read_as_they_are_written(text: str, number: object) -> None:
    assert parse_format(text) == number
    assert parse_format(str(number)) == number


@pytest.mark.parametrize("wl", range(1, 25))
@pytest.mark.parametrize("fl", [-7, 0, 5, 30])
def test_the_range_has_all_codes(wl: int, fl: int) -> None:
    number = fixed(wl, fl)
    assert (number.highest - number.lowest) / number.quantum + 1 == 2**wl
    assert number.lowest == -(2.0 ** (wl - fl - 1)) and number.highest == 2.0 ** (wl - fl - 1) - 2.0**-fl
    assert number.storage == ("int8" if wl <= 8 else "int16" if wl <= 16 else "int32")
    assert number.il == wl - fl
    low = fixed(wl, fl, symmetric=True).lowest
    assert low == -number.highest


def test_short_floats_are_those_of_ieee() -> None:
    assert (FLOAT16.highest, FLOAT16.lowest, FLOAT16.quantum) == (65504.0, -65504.0, 2.0**-24)
    assert (BFLOAT16.highest, BFLOAT16.quantum) == (float.fromhex("0x1.fep127"), 2.0**-133)
    assert (FLOAT32.highest, FLOAT32.bits) == (float.fromhex("0x1.fffffep127"), 32)


@pytest.mark.parametrize(
    ("wl", "fl", "message"),
    [
        (0, 0, "WL of a fixed-point format is 1 to 24, got 0"),
        (25, 0, "WL of a fixed-point format is 1 to 24, got 25"),
        (16, 127, "FL of a fixed-point format is -100 to 126, got 127"),
        (16, -101, "FL of a fixed-point format is -100 to 126, got -101"),
        (16, 1.5, "FL of a fixed-point format is a whole number, got 1.5"),
        (True, 0, "WL of a fixed-point format is a whole number, got True"),
    ],
)
def test_bad_widths_are_refused(wl: int, fl: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fixed(wl, fl)


def test_bad_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        parse_format("bfloat")
    with pytest.raises(ConfigError, match="got 16"):
        parse_format(16)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got 40 in fixed"):
        parse_format("<30,10>")
    with pytest.raises(ConfigError, match="unknown rounding 'nearst'; did you mean 'nearest'"):
        check_rounding("nearst")


def test_keys_are_words_of_32_bits() -> None:
    assert Key((7 << 32) + 5, 3, 2).words == (5, 7, 3, 2)
    for bad in ({"seed": -1}, {"seed": 1 << 64}, {"seed": 0, "stream": 1 << 32}, {"seed": 0, "step": 0.5}):
        with pytest.raises(ConfigError, match="of a rounding key is a whole number from 0"):
            Key(**bad)
