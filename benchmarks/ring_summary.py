"""What ``benchmarks.rings`` found: how far predictions are off, and what is hidden."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from benchmarks.ring_configurations import Configuration

HIDDEN = 1.2
"""Products over what is sent, in every step of the ring, from which nothing should wait."""


def configuration_of(result: dict[str, Any]) -> Configuration:
    """What a result was measured of."""
    known = {field.name for field in fields(Configuration)}
    return Configuration(**{name: value for name, value in result.items() if name in known})


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Relative errors of the predictions of all, and of each kind with what overlap costs there."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(_kind(configuration_of(result)), []).append(result)
    return {"all": _spreads(results), **{name: _spreads(of) for name, of in kinds.items()}}


def _kind(c: Configuration) -> str:
    sent = "operands and gradients" if c.gradients else "operands"
    wires = ", own wires" if c.own_wires else ""
    return f"{c.schedule}, {sent}, {'one chunk' if c.chunks == 1 else 'in chunks'}{wires}"


def _spreads(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hidden = [r for r in results if configuration_of(r).least_ratio >= HIDDEN]
    return {
        "configurations": len(results),
        "error": _spread([abs(r["predicted_s"] / r["measured_s"] - 1) for r in results]),
        "error_of_the_fastest": _spread(
            [abs(r["predicted_s"] / r["fastest_s"] - 1) for r in results]
        ),
        "hidden": len(hidden),
        "over_products": _spread([r["measured_s"] / r["products_s"] - 1 for r in hidden]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    if not ordered:
        return {}
    at = -(-9 * len(ordered) // 10) - 1
    return {"median": statistics.median(ordered), "p90": ordered[at], "max": ordered[-1]}


__all__ = ["HIDDEN", "configuration_of", "summary"]
