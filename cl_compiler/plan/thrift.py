"""Schedules that were not taken, and would need far less memory for little more time.

The fastest that fits the budget is taken, also where it is ahead by a hair and needs most of the
budget: then that is said, with what chooses the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cl_compiler.units import format_bytes

MUCH_LESS, LITTLE_MORE = 0.5, 1.1
"""Of the memory, and of the time, of what is taken: at most."""


@dataclass(frozen=True)
class Cost:
    """What a schedule takes on the rank that holds most, and in a step."""

    peak_bytes: int
    seconds: float


def thrifty(costs: Mapping[str, Cost], taken: str) -> str | None:
    """Of several schedules the best of those that take much less memory than ``taken`` and little
    more time, by bytes times seconds; None: there is none."""
    best = costs[taken]
    others = [
        name
        for name, cost in costs.items()
        if cost.peak_bytes <= MUCH_LESS * best.peak_bytes
        and cost.seconds <= LITTLE_MORE * best.seconds
    ]
    return min(others, key=lambda n: costs[n].peak_bytes * costs[n].seconds, default=None)


def told(name: str, cost: Cost, taken: Cost, how: str) -> str:
    """The line about it; ``how``: what chooses it."""
    ratio, more = taken.peak_bytes / cost.peak_bytes, cost.seconds / taken.seconds - 1
    longer = f"{more:.1%} more time" if more >= 5e-4 else "about the same time"
    return (
        f"{name} would need 1/{ratio:.1f} of the memory ({format_bytes(cost.peak_bytes)}) for "
        f"{longer}: {how} chooses it"
    )


__all__ = ["Cost", "thrifty", "told"]
