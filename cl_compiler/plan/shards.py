"""How many rows a rank can have, and how many it should have where ranks differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.limits import largest, scaled
from cl_compiler.plan.types import Request


def largest_shard(
    request: Request,
    sweeps: SweepPlan,
    plan_of: Callable[[Request, SweepPlan], object] = choose_cluster_plan,
) -> int:
    """The most rows that every rank of a group can have within its budget; 0: not even one.

    Columns stay in proportion, D as it is.  The largest batch is as many times the ranks.

    Args:
        request: of one rank, with ``group_size``; a schedule, or "auto" for the best of them.
        sweeps: the loss in sweeps.
        plan_of: plans a request, or raises BudgetError.

    Raises:
        ScheduleError: the loss cannot use the schedule.
    """

    def fits(rows: int) -> bool:
        asked = replace(request, problem=scaled(request.problem, rows))
        try:
            plan_of(asked, sweeps)
        except BudgetError:
            return False
        return True

    return largest(fits)


def advised_rows(total: int, speeds: Sequence[float], most: Sequence[int] = ()) -> tuple[int, ...]:
    """Shards for ranks of different speed and memory, ``total`` rows in all.

    In a step every rank multiplies its shard by one that passes by, and the slowest sets the pace,
    so rows are in proportion to speed; a rank that is full leaves its part to the others.

    Args:
        total: rows of all ranks.
        speeds: of each rank, in any unit.
        most: rows that fit on each rank; left out, any number does.

    Raises:
        ArgumentError: a speed is no positive number, or the rows do not fit.
    """
    if not speeds or not all(math.isfinite(s) and s > 0 for s in speeds):
        raise ArgumentError(f"speeds={list(speeds)}: give a positive number for every rank.")
    if most and (len(most) != len(speeds) or sum(most) < total):
        raise ArgumentError(
            f"{total} rows do not fit on ranks that hold {sum(most)} together; give them fewer, "
            "or a larger budget."
        )
    shares, full = [0.0] * len(speeds), set[int]()
    while True:
        rest = total - sum(most[r] for r in full)
        speed = sum(s for r, s in enumerate(speeds) if r not in full)
        for r, s in enumerate(speeds):
            shares[r] = float(most[r]) if r in full else rest * s / speed
        over = {r for r in range(len(speeds)) if most and r not in full and shares[r] > most[r]}
        if not over:
            break
        full |= over
    rows = [math.floor(share) for share in shares]
    # what rounding left over goes where most of a row is missing
    order = sorted(range(len(rows)), key=lambda r: (rows[r] - shares[r], r))
    for r in order[: total - sum(rows)]:
        rows[r] += 1
    return tuple(rows)


__all__ = ["advised_rows", "largest_shard"]
