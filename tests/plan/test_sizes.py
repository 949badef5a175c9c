"""Sizes, rates and times as people write them."""

from __future__ import annotations

import pytest

from windlass.errors import ConfigError
from windlass.plan.sizes import format_bytes, parse_bits_per_s, parse_bytes, parse_ns, size_range


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("0", 0), ("17", 17), ("17B", 17), ("64KiB", 65536), ("64kib", 65536), ("1MB", 10**6), (" 1.5 MiB ", 3 << 19)],
)
def test_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, 1024, 1025, 65536, 3 << 20, 5 << 40])
def test_what_is_written_is_read_back(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1 KiB 2", "1.0001KiB", "1Kib/s", "١"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"size must be|size is written like"):
        parse_bytes(text)


def test_a_range_goes_by_powers_of_four_and_keeps_its_end() -> None:
    assert size_range("1KiB..20KiB") == [1024, 4096, 16384, 20480]
    assert size_range("1KiB..1KiB") == [1024]
    assert size_range("4MiB, 1KiB..4KiB, 1KiB") == [1024, 4096, 4 << 20]


@pytest.mark.parametrize("text", ["4KiB..1KiB", "0..4KiB", "1KiB..", "..1KiB", "1KiB,,2KiB"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        size_range(text)


def test_rates_and_times() -> None:
    assert parse_bits_per_s("10Gbit") == parse_bits_per_s("10 gbit/s") == 10**10
    assert (parse_ns("20us"), parse_ns("20 µs"), parse_ns("0ns"), parse_ns("2s")) == (20000, 20000, 0, 2 * 10**9)
    for parse, text in ((parse_bits_per_s, "10GB"), (parse_ns, "20"), (parse_ns, "1.5ns")):
        with pytest.raises(ConfigError):
            parse(text)
