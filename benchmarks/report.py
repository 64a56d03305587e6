"""Tables of a benchmark's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims import Claim
from cl_compiler.cli.output import Table, bytes_or_dash
from cl_compiler.units import format_seconds

__all__ = ["case_table", "claim_table"]

Entry = Mapping[str, Any]


def case_table(cases: Sequence[Entry]) -> Table:
    """One row per provider of every case."""
    rows = []
    for case in cases:
        of, title = case["case"], case["key"]
        dense = case["rows"].get("dense", {}).get("median_s")
        pairs = of["M"] * of["N"]
        for name, row in case["rows"].items():
            rows.append((title, *_provider(name, row, dense, pairs)))
            title = ""
    heads = ("case", "provider", "time", "ns/pair", "dense/it", "of GEMM", "live", "process",
             "noise")  # fmt: skip
    return Table("Forward and backward", heads, tuple(rows), frozenset(range(2, 8)))


def _provider(name: str, row: Entry, dense: float | None, pairs: int) -> tuple[str, ...]:
    plan = row.get("plan")
    label = name
    if plan is not None:
        label += f" ({plan['schedule']} {plan['tile'][0]}x{plan['tile'][1]})"
    seconds = row.get("median_s")
    if row["error"] or seconds is None:
        return (label, "", "", "", "", "", "", row["error"])
    fraction = row.get("gemm_fraction")
    return (
        label,
        format_seconds(seconds),
        f"{seconds / pairs * 1e9:.1f}",
        f"{dense / seconds:.2f}" if dense else "",
        f"{fraction:.2f}" if fraction else "",
        bytes_or_dash(row["live_bytes"]),
        bytes_or_dash(row["process_bytes"]),
        f"{row['dirty']}/{len(row['seconds'])} disturbed" if row["dirty"] else "",
    )


def claim_table(claims: Sequence[Claim]) -> Table:
    """One row per promise."""
    rows = tuple(
        (
            claim.text,
            claim.where,
            f"{'>=' if claim.at_least else '<='} {claim.bound:.3g}",
            "-" if claim.measured is None else f"{claim.measured:.3g}",
            claim.verdict,
        )
        for claim in claims
    )
    heads = ("promise", "where", "bound", "measured", "")
    return Table("Promises", heads, rows, frozenset({2, 3}))
