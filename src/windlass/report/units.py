"""Numbers as people read them: three significant digits, a unit, a dash where there is nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

SPACE = "\N{NO-BREAK SPACE}"
NOTHING = "–"


def significant(value: float, *, digits: int = 3) -> str:
    """`value` rounded to `digits` significant digits, never in exponent form between 1e-4 and 1e15.

    >>> significant(0.01234), significant(99.96), significant(1234.5), significant(2.5e-7)
    ('0.0123', '100', '1,234', '2.5e-07')
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4 or magnitude >= 15:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def number(value: float | None) -> str:
    """A plain number with four significant digits.

    >>> number(0.043219), number(None)
    ('0.04322', '–')
    """
    return NOTHING if value is None else significant(value, digits=4)


def fixed(value: float | None) -> str:
    """A number for a column of its like: four decimals where that serves.

    >>> fixed(1.5), fixed(0.04321987), fixed(1e-5)
    ('1.5000', '0.0432', '1e-05')
    """
    return f"{value:.4f}" if value is not None and 1e-3 <= abs(value) < 1000 else number(value)


def count(value: float | None) -> str:
    """How many of something: exact below ten thousand, then k, M, G, T.

    >>> [count(n).replace(SPACE, " ") for n in (431, 9_999, 61_706, 999_960, 4_089_184_256)]
    ['431', '9,999', '61.7 k', '1.00 M', '4.09 G']
    """
    if value is not None and math.isfinite(value) and abs(value) < 10_000:
        return f"{value:,.0f}" if float(value).is_integer() else significant(value)
    return _scaled(value, base=1000, units=("", "k", "M", "G", "T", "P"))


def num_bytes(value: float | None) -> str:
    """A size in memory, in powers of 1024.

    >>> [num_bytes(n).replace(SPACE, " ") for n in (512, 2048, 1_300_000)]
    ['512 B', '2.00 KiB', '1.24 MiB']
    """
    if value is not None and 0 <= value < 1024:
        return f"{value:.0f}{SPACE}B"
    return _scaled(value, base=1024, units=("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def plain(text: str) -> str:
    """The same for a terminal: ordinary spaces, so that a search finds it.

    >>> plain(num_bytes(2048))
    '2.00 KiB'
    """
    return text.replace(SPACE, " ")


def percent(value: float | None) -> str:
    """A share, given as a fraction.

    >>> percent(0.98234), percent(0.00049), percent(1.0)
    ('98.23%', '0.05%', '100.00%')
    """
    if value is None or not math.isfinite(value):
        return NOTHING if value is None else significant(value)
    return f"{100 * value:.2f}%"


def milliseconds(seconds: float | None) -> str:
    """A short time in milliseconds.

    >>> milliseconds(0.0031).replace(SPACE, " ")
    '3.10 ms'
    """
    return NOTHING if seconds is None else f"{significant(1000 * seconds)}{SPACE}ms"


def aligned_milliseconds(seconds: Sequence[float | None]) -> list[str]:
    """Times for one column, in milliseconds with as many decimals as the longest needs.

    >>> [text.replace(SPACE, " ") for text in aligned_milliseconds([0.0031, 0.00006])]
    ['3.100 ms', '0.060 ms']
    """
    known = [1000 * s for s in seconds if s is not None and math.isfinite(s)]
    decimals = next((d for d, most in ((3, 10), (2, 100), (1, 1000)) if max(known, default=0) < most), 0)
    return [NOTHING if s is None else f"{1000 * s:,.{decimals}f}{SPACE}ms" for s in seconds]


def duration(seconds: float | None) -> str:
    """A time to wait, in the units of a clock.

    >>> [duration(s).replace(SPACE, " ") for s in (0.25, 12.34, 750, 11_520)]
    ['250 ms', '12.3 s', '12 min 30 s', '3 h 12 min']
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING if seconds is None else significant(seconds)
    if seconds < 1:
        return milliseconds(seconds)
    if seconds < 119.5:
        return f"{significant(seconds)}{SPACE}s"
    whole = round(seconds)
    if whole < 7200:
        return f"{whole // 60}{SPACE}min {whole % 60}{SPACE}s"
    return f"{whole // 3600}{SPACE}h {whole % 3600 // 60}{SPACE}min"


def _scaled(value: float | None, *, base: int, units: tuple[str, ...]) -> str:
    """`value` in the largest of `units`, each `base` times the one before, that leaves it at one or more."""
    if value is None:
        return NOTHING
    index = 0
    while math.isfinite(value) and abs(value) >= base * 0.9995 and index + 1 < len(units):
        value, index = value / base, index + 1
    return f"{significant(value)}{SPACE}{units[index]}".rstrip(SPACE)
