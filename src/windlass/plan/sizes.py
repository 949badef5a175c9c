"""Sizes, rates and times as people write them: ``64KiB``, ``10Gbit``, ``20us``; and ranges of sizes.

Everything becomes an integer: bytes, bits per second, nanoseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from windlass.errors import ConfigError

_BYTES = {
    "": 1, "b": 1,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_BITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9, "tbit": 10**12}
_NANOSECONDS = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)")

STEP = 4
"""Factor between the sizes of a range."""


def parse_bytes(text: str) -> int:
    """A number of bytes; KiB, MiB, GiB are powers of 1024, kB, MB, GB powers of 1000.

    >>> parse_bytes("64KiB"), parse_bytes("1.5 MiB"), parse_bytes("100")
    (65536, 1572864, 100)
    """
    return _parse(text, _BYTES, "size", "64KiB, 1MiB or 4096")


def parse_bits_per_s(text: str) -> int:
    """Bits per second.

    >>> parse_bits_per_s("10Gbit"), parse_bits_per_s("100 Mbit/s")
    (10000000000, 100000000)
    """
    return _parse(text.strip().removesuffix("/s"), _BITS, "bandwidth", "10Gbit or 100Mbit/s")


def parse_ns(text: str) -> int:
    """Nanoseconds.

    >>> parse_ns("20us"), parse_ns("1.5ms")
    (20000, 1500000)
    """
    return _parse(text, _NANOSECONDS, "time", "20us or 1.5ms")


def size_range(text: str) -> list[int]:
    """Sizes from a range by powers of four, its end included, or from a list, or one alone.

    >>> size_range("1KiB..64KiB")
    [1024, 4096, 16384, 65536]
    >>> size_range("1KiB,1MiB")
    [1024, 1048576]
    """
    sizes: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        sizes.update(_powers(first, last, part) if dots else [parse_bytes(part)])
    return sorted(sizes)


def format_bytes(num_bytes: int) -> str:
    """A size as `parse_bytes` reads it, exact.

    >>> format_bytes(65536), format_bytes(1000), format_bytes(3 << 20)
    ('64KiB', '1000B', '3MiB')
    """
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        factor = _BYTES[unit.lower()]
        if num_bytes and num_bytes % factor == 0:
            return f"{num_bytes // factor}{unit}"
    return f"{num_bytes}B"


def _powers(first: str, last: str, text: str) -> list[int]:
    low, high = parse_bytes(first), parse_bytes(last)
    if not 0 < low <= high:
        raise ConfigError(f"a range of sizes goes from one above 0 to one not below it, got {text.strip()!r}")
    sizes = [low]
    while sizes[-1] * STEP < high:
        sizes.append(sizes[-1] * STEP)
    return [*sizes, high]


def _parse(text: str, units: Mapping[str, int], what: str, example: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ConfigError(f"a {what} is written like {example}, got {text!r}")
    number = Decimal(match[1]) * factor
    if number != int(number):
        raise ConfigError(f"a {what} must be a whole number of its smallest unit, got {text!r}")
    return int(number)
