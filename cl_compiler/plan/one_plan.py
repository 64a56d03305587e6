"""One plan for ranks whose shards and memory differ, and the shards that it leaves room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.lang.program import Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.limits import scaled
from cl_compiler.plan.memory import GRADIENTS, RETURNED
from cl_compiler.plan.share import Share, memory_of
from cl_compiler.plan.types import MemoryBudget, Plan, Request

GroupPlanner = Callable[[Request, SweepPlan], tuple[Plan, Program]]
"""Plans a request of a group; raises BudgetError where nothing fits."""
OF_ROWS = (GRADIENTS, RETURNED)
"""What is in proportion to a rank's own rows; tiles and what is on its way are not."""
ROUNDS = 16
"""Of looking for shards and a plan that fit each other, at most."""


def advised_rows(
    total: int, speeds: Sequence[float], most: Sequence[int] = (), *, step: int = 1
) -> tuple[int, ...]:
    """Shards for ranks of different speed and memory, ``total`` rows in all.

    In a step every rank multiplies its shard by one that passes by, and the slowest sets the pace,
    so rows are in proportion to speed; a rank that is full leaves its part to the others.

    Args:
        total: rows of all ranks.
        speeds: of each rank, in any unit.
        most: rows that fit on each rank; left out, any number does.
        step: every rank has a multiple of it, as has ``total``.

    Raises:
        ArgumentError: a speed is no positive number, or the rows do not fit.
    """
    if not speeds or not all(math.isfinite(s) and s > 0 for s in speeds):
        raise ArgumentError(f"speeds={list(speeds)}: give a positive number for every rank.")
    if most and len(most) != len(speeds):
        raise ArgumentError(
            f"{len(speeds)} speeds and {len(most)} limits of rows: give one of each for every rank."
        )
    most = [step * (n // step) for n in most]
    if most and sum(most) < total:
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
    rows = [step * math.floor(share / step) for share in shares]
    # what rounding left over goes where most of a row is missing
    order = sorted(range(len(rows)), key=lambda r: (rows[r] - shares[r], r))
    for r in order[: (total - sum(rows)) // step]:
        rows[r] += step
    return tuple(rows)


@dataclass(frozen=True)
class RankShares:
    """Shards for ranks that differ, and what all of them run.

    ``plan``: of the largest shard; its budget is what every rank asks for, so that each of them
    stays within its own.  ``rows``, ``peak_bytes``: of each rank.
    """

    plan: Plan
    program: Program
    rows: tuple[int, ...]
    peak_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Short:
    """A rank that has too little memory for its shard: ``bytes_`` at least, and ``without_rows``
    what passes by and the tiles alone; 0 where nobody knows."""

    rank: int
    bytes_: int
    without_rows: int


def limited(
    request: Request,
    sweeps: SweepPlan,
    total: int,
    speeds: Sequence[float],
    budgets: Sequence[int],
    by_budget: Mapping[int, int],
    plan_of: GroupPlanner,
) -> RankShares | Short | None:
    """Shards of which none has more rows than a rank with its budget can have; None: there are
    none; or the rank that has no room even without rows."""
    most = [by_budget[b] for b in budgets]
    for _ in range(ROUNDS):
        if sum(n - n % request.row_step for n in most) < total:
            break
        rows = advised_rows(total, speeds, most, step=request.row_step)
        found = common_plan(request, sweeps, rows, budgets, plan_of)
        if isinstance(found, RankShares):
            return found
        # this rank has too little room for the tiles of the others: fewer rows
        rank, room = found.rank, budgets[found.rank] - found.without_rows
        if room < 0 or not rows[rank]:
            return found
        fitting = rows[rank] * 7 // 8
        if found.without_rows:  # bytes are in proportion to rows, beside what others take
            fitting = rows[rank] * room // max(found.bytes_ - found.without_rows, 1)
        most[rank] = min(fitting, rows[rank] - 1)
    return None


def within(request: Request, device_bytes: int) -> Request:
    return replace(request, budget=MemoryBudget(device_bytes, request.budget.host_bytes))


def common_plan(
    request: Request,
    sweeps: SweepPlan,
    rows: Sequence[int],
    budgets: Sequence[int],
    plan_of: GroupPlanner,
) -> RankShares | Short:
    """What all ranks can run with these shards; else the rank that has least room for it."""
    widest = max(range(len(rows)), key=lambda r: (rows[r], -budgets[r]))
    budget = budgets[widest]
    asked = replace(request, problem=scaled(request.problem, max(rows[widest], 1)))
    least: RankShares | None = None
    for _ in range(ROUNDS):
        try:
            plan, program = plan_of(within(asked, budget), sweeps)
        except BudgetError as error:
            return least or Short(widest, error.least_bytes, 0)
        peaks = _peaks(request, sweeps, plan, program, rows)
        over = [peak - most for peak, most in zip(peaks, budgets, strict=True)]
        if max(over) <= 0:
            return RankShares(plan, program, tuple(rows), peaks)
        if least is None:  # what takes least of all tells soon whether there is a plan between
            least = _least_plan(asked, sweeps, plan_of, rows)
            over_least = [p - most for p, most in zip(least.peak_bytes, budgets, strict=True)]
            tightest = max(range(len(rows)), key=over_least.__getitem__)
            if over_least[tightest] > 0:
                (none,) = _peaks(request, sweeps, least.plan, least.program, [0])
                return Short(tightest, least.peak_bytes[tightest], none)
        budget = plan.peak_bytes - max(over)
        if budget < 1:
            break
    assert least is not None
    return least


def _least_plan(
    asked: Request, sweeps: SweepPlan, plan_of: GroupPlanner, rows: Sequence[int]
) -> RankShares:
    """What takes the fewest bytes of a rank with the widest shard."""
    try:
        plan, program = plan_of(within(asked, 1), sweeps)
    except BudgetError as error:
        plan, program = plan_of(within(asked, error.least_bytes), sweeps)
    return RankShares(plan, program, tuple(rows), _peaks(asked, sweeps, plan, program, rows))


def _peaks(
    request: Request, sweeps: SweepPlan, plan: Plan, program: Program, rows: Sequence[int]
) -> tuple[int, ...]:
    """Bytes of each rank at its peak; of kernels, what they are at most."""
    assert plan.cluster is not None
    cluster, found = plan.cluster, dict[int, int]()
    for n in set(rows):
        asked = replace(request, problem=scaled(request.problem, max(n, 1)))
        if plan.template == "torch":
            cut = (cluster.schedule, cluster.chunk, cluster.node, cluster.resident)
            share = Share(asked, sweeps, program, *cut)
            _, items = memory_of(share, plan.tile)
            found[n] = sum(count for _, count in items)
        else:
            of_rows = sum(count for what, count in plan.memory if what in OF_ROWS)
            found[n] = plan.peak_bytes - math.floor(of_rows * (1 - n / plan.problem.M))
    return tuple(found[n] for n in rows)


__all__ = [
    "GroupPlanner",
    "RankShares",
    "Short",
    "advised_rows",
    "common_plan",
    "limited",
    "within",
]
