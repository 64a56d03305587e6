"""Bytes, seconds and rates: what is read and what is printed."""

from __future__ import annotations

import pytest

from cl_compiler.errors import ArgumentError
from cl_compiler.units import (
    counted,
    exact_bytes,
    format_bytes,
    format_flops,
    format_rate,
    format_seconds,
    parse_bytes,
)


def test_one_is_not_many():
    found = [counted(n, "chunk") for n in (0, 1, 2, 1234)]
    assert found == ["0 chunks", "1 chunk", "2 chunks", "1,234 chunks"]


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("2gb", 2_000_000_000),
        ("2 GB", 2_000_000_000),
        ("1_000 kB", 1_000_000),
        (".5KiB", 512),
        ("16EiB", 16 * 2**60),
        ("9007199254740993", 2**53 + 1),
        (0.25 * 2**30, 2**28),
    ],
)
def test_an_amount_of_memory_is_read_exactly(amount: str | int | float, expected: int) -> None:
    assert parse_bytes(amount) == expected


@pytest.mark.parametrize(
    ("amount", "obstacle"),
    [
        ("2G", "could mean GiB or GB"),
        ("2 parsecs", "'parsecs' is not a unit"),
        ("-5MiB", "not a number followed by a unit"),
        ("", "not a number followed by a unit"),
        ("MiB", "not a number followed by a unit"),
        ("1..5MiB", "not a number followed by a unit"),
        (-1, "negative"),
        (-0.5, "negative"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (True, "truth value"),
        (None, "NoneType is not a size"),
    ],
)
def test_what_is_no_amount_of_memory_is_refused_with_a_fix(amount: object, obstacle: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_bytes(amount)  # type: ignore[arg-type]
    message = str(caught.value)
    assert repr(amount) in message and obstacle in message and "512MiB" in message


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 * 2**20, "512.0 MiB"),
        (2**20 - 1, "1.0 MiB"),
        (int(14.2 * 2**30), "14.2 GiB"),
        (3 * 2**70, "3072.0 EiB"),
        (-(2**21), "-2.0 MiB"),
        (float("inf"), "inf B"),
    ],
)
def test_bytes_are_printed_in_binary_units(count: int | float, text: str) -> None:
    assert format_bytes(count) == text


def test_printed_bytes_are_read_back() -> None:
    for power in range(0, 60, 7):
        assert parse_bytes(format_bytes(2**power)) == 2**power


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3.4e-6, "3.4 µs"),
        (2.5e-8, "25.0 ns"),
        (0.0123, "12.3 ms"),
        (0.99999, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3600 + 125, "1 h 02 min"),
        (3599.9, "1 h 00 min"),
        (-0.5, "-500.0 ms"),
        (float("inf"), "inf s"),
    ],
)
def test_durations_are_printed_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_rates_are_printed_in_decimal_units() -> None:
    assert format_rate(12.34e9) == "12.3 GB/s"
    assert format_rate(999.96e6) == "1.0 GB/s"
    assert format_flops(75e9) == "75.0 GFLOP/s"
    assert format_flops(989.4e12) == "989.4 TFLOP/s"
    assert format_flops(0) == "0 FLOP/s"


@pytest.mark.parametrize(
    ("count", "text"),
    [(64 << 20, "64.0 MiB"), ((64 << 20) + 1, "67108865 B"), (700, "700 B"), (0, "0 B")],
)
def test_bytes_that_lose_nothing(count, text):
    assert exact_bytes(count) == text
