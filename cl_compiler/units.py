"""Parse and print bytes, seconds, rates and counts.

Every other module holds plain numbers in base units (bytes, seconds, bytes/s, FLOP/s); text with a
unit exists only where a person writes a request or reads a report.
"""

from __future__ import annotations

import math
import operator
import re
from numbers import Real

from cl_compiler.errors import ArgumentError

__all__ = [
    "counted",
    "exact_bytes",
    "format_bytes",
    "format_flops",
    "format_rate",
    "format_seconds",
    "parse_bytes",
]

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_FACTOR = {unit.lower(): 1024**power for power, unit in enumerate(_BINARY_UNITS)} | {
    unit.lower(): 1000**power for power, unit in enumerate(_DECIMAL_UNITS)
}
_AMOUNT = re.compile(r"\s*(?P<number>\d[\d_]*(\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*")


def counted(number: int, what: str, several: str = "") -> str:
    """ "1 variant", "2 variants", "1,024 variants"; ``several``: its plural, if not with an s."""
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def parse_bytes(amount: str | int | float) -> int:
    """Read an amount of memory as a whole number of bytes.

    Args:
        amount: an integer of bytes, or text such as ``"512MiB"``, ``"1.5 GB"`` or ``"4096"``;
            binary units (KiB, MiB, GiB, …) are powers of 1024, decimal ones (kB, MB, GB, …) of
            1000, and case does not matter.  A float counts bytes too; fractions are dropped.

    Returns:
        bytes, at least 0.

    Raises:
        ArgumentError: the text is no amount of memory, or the amount is negative or not finite.
    """
    if isinstance(amount, str):
        return _parse_text(amount)
    if isinstance(amount, bool):
        raise _refused(amount, "a truth value is not a size")
    try:
        count = operator.index(amount)  # type: ignore[arg-type]
    except TypeError:
        if not isinstance(amount, Real):
            raise _refused(amount, f"{type(amount).__name__} is not a size") from None
        if not math.isfinite(amount):
            raise _refused(amount, "it is not finite") from None
        count = int(amount)
    if amount < 0:
        raise _refused(amount, "it is negative")
    return count


def _parse_text(text: str) -> int:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise _refused(text, "it is not a number followed by a unit")
    number, unit = match["number"].replace("_", ""), match["unit"].lower()
    factor = 1 if unit == "" else _FACTOR.get(unit)
    if factor is None:
        letter = unit[0].upper()
        ambiguous = len(unit) == 1 and unit in "kmgtpe"
        raise _refused(
            text,
            f"{match['unit']!r} could mean {letter}iB or {letter}B"
            if ambiguous
            else f"{match['unit']!r} is not a unit of memory",
        )
    # Integers stay exact: a float would round byte counts above 2**53.
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def _refused(amount: object, obstacle: str) -> ArgumentError:
    return ArgumentError(
        f"cannot read {amount!r} as an amount of memory: {obstacle}; "
        'write bytes as an integer, or text such as "512MiB" (1024-based) or "512MB" (1000-based)'
    )


def format_bytes(count: int | float) -> str:
    """Print bytes with a 1024-based unit: ``536870912`` becomes ``"512.0 MiB"``."""
    return _scaled(count, 1024, _BINARY_UNITS, "B")


def exact_bytes(count: int) -> str:
    """Print bytes with a unit where that loses none of them, else as they are: ``"64.0 MiB"``,
    ``"67108865 B"``."""
    text = format_bytes(count)
    return text if parse_bytes(text) == count else f"{count} B"


def format_rate(bytes_per_s: float) -> str:
    """Print a bandwidth in bytes/s with a 1000-based unit: ``"12.3 GB/s"``."""
    return _scaled(bytes_per_s, 1000, tuple(f"{unit}/s" for unit in _DECIMAL_UNITS), "B/s")


def format_flops(flops_per_s: float) -> str:
    """Print a rate in FLOP/s with a 1000-based unit: ``"75.0 GFLOP/s"``."""
    units = tuple(f"{prefix}FLOP/s" for prefix in ("", "k", "M", "G", "T", "P", "E"))
    return _scaled(flops_per_s, 1000, units, "FLOP/s")


def format_seconds(seconds: float) -> str:
    """Print a duration: ``"12.3 ms"``, ``"3.4 µs"``, ``"2 min 05 s"``, ``"1 h 02 min"``."""
    if not math.isfinite(seconds):
        return f"{seconds} s"
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds == 0:
        return "0 s"
    whole = round(seconds)
    if whole >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if round(seconds, 1) >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    for unit, factor in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if round(seconds * factor, 1) < 1000:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds:.1f} s"


def _scaled(value: float, base: int, units: tuple[str, ...], plain: str) -> str:
    """Divide ``value`` by ``base`` until one decimal place of it is below ``base``."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} {plain}"
    power = 0
    # Compare what will be printed, so that 1048575 bytes read "1.0 MiB", never "1024.0 KiB".
    while power + 1 < len(units) and round(abs(value) / base**power, 1 if power else 0) >= base:
        power += 1
    digits = 1 if power or value != int(value) else 0
    return f"{value / base**power:.{digits}f} {units[power]}"
