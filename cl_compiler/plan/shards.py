"""How many rows a rank can have, and how many it should have where ranks differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.lang.ring import CLUSTER_SCHEDULES, HOST
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cluster import choose_cluster_plan, group_fits, nearest
from cl_compiler.plan.limits import largest, scaled
from cl_compiler.plan.one_plan import (
    GroupPlanner,
    RankShares,
    Short,
    advised_rows,
    common_plan,
    limited,
    within,
)
from cl_compiler.plan.simulate import simulate
from cl_compiler.plan.types import Request
from cl_compiler.units import format_bytes

GroupFits = Callable[[Request, SweepPlan], Callable[[int], bool]]
"""Whether a planner would plan a request of a group with so many rows on each rank."""
RELIEVED = (0.5, 0.25, 0.0)
"""Of the rows that fit on ranks with the least memory, parts that are weighed: the rest of their
memory is for larger tiles and chunks, which are those of all ranks."""


def largest_shard(
    request: Request,
    sweeps: SweepPlan,
    fits_of: GroupFits = group_fits,
    enough: int = 0,
) -> int:
    """The most rows that every rank of a group can have within its budget; 0: not even one.

    Of two views they are even.  Columns stay in proportion, D as it is.  The largest batch is as
    many times the ranks.

    Args:
        request: of one rank, with ``group_size``; a schedule, or "auto" for the best of them.
        sweeps: the loss in sweeps.
        fits_of: says which rows can be planned.
        enough: rows beyond which nobody looks; 0: there are none.

    Raises:
        ScheduleError: the loss cannot use the schedule.
    """
    fits = fits_of(request, sweeps)
    found = enough if enough and fits(enough) else largest(fits)
    return found - found % request.row_step


def shares_of_ranks(
    request: Request,
    sweeps: SweepPlan,
    total: int,
    speeds: Sequence[float],
    budgets: Sequence[int] = (),
    plan_of: GroupPlanner = choose_cluster_plan,
    fits_of: GroupFits = group_fits,
) -> RankShares:
    """Shards in proportion to speed where memory allows, and one plan that fits on every rank.

    All ranks run the same code, so tiles and chunks are those that the tightest rank has room for.
    Of several schedules that is taken whose simulated step is shortest, each with its own shards;
    inputs in host memory only where rows do not fit otherwise.

    Args:
        request: of a rank with an even share; its budget counts where there are no ``budgets``.
        sweeps: the loss in sweeps.
        total: rows of all ranks; columns stay in proportion.
        speeds: of each rank, in any unit.
        budgets: bytes of each rank.
        plan_of: plans a request, or raises BudgetError.
        fits_of: says which rows it can plan.

    Raises:
        ArgumentError: as ``advised_rows``.
        BudgetError: the rows do not fit on these ranks.
        ScheduleError: the loss cannot use the schedule.
    """
    budgets = budgets or [request.budget.device_bytes] * len(speeds)
    if request.schedule == "auto":
        return _of_all_schedules(request, sweeps, total, speeds, budgets, plan_of, fits_of)
    rows = advised_rows(total, speeds, step=request.row_step)
    found: RankShares | Short | None = common_plan(request, sweeps, rows, budgets, plan_of)
    if isinstance(found, RankShares) and found.plan.budget.device_bytes >= max(budgets):
        return found  # as much as the richest rank makes use of, fits on all of them
    by_budget = _rows_by_budget(request, sweeps, budgets, fits_of, total)
    if not isinstance(found, RankShares):
        found = limited(request, sweeps, total, speeds, budgets, by_budget, plan_of)
    if isinstance(found, RankShares):
        return _relieved(found, request, sweeps, speeds, budgets, by_budget, plan_of)
    asked = f"{request.loss.name} with {total} rows and D={request.problem.D}"
    if found is not None:
        rank, least = found.rank, found.without_rows
        raise BudgetError(
            f"{asked}: rank {rank} cannot take part with {format_bytes(budgets[rank])}, not even "
            f"without rows; it needs at least {format_bytes(least)} ({least} bytes). Give it more "
            "memory, or leave it out.",
            least,
        )
    held = ", ".join(f"{format_bytes(b)}: {n} rows" for b, n in by_budget.items())
    raise BudgetError(
        f"{asked} does not fit on ranks with these budgets, which hold at most ({held}); give them "
        "fewer rows, or more memory."
    )


def _relieved(
    found: RankShares,
    request: Request,
    sweeps: SweepPlan,
    speeds: Sequence[float],
    budgets: Sequence[int],
    by_budget: Mapping[int, int],
    plan_of: GroupPlanner,
) -> RankShares:
    """The same, or with fewer rows where memory is least, if tiles and chunks that this leaves room
    for make up for it."""
    total, poor = sum(found.rows), min(budgets)
    most = max(n for n, b in zip(found.rows, budgets, strict=True) if b == poor)
    best, best_s = found, simulated_s(found, request, speeds)
    differ = poor < max(budgets) and request.schedule != HOST
    for part in RELIEVED if differ else ():
        limits = {**by_budget, poor: round(most * part)}
        other = limited(request, sweeps, total, speeds, budgets, limits, plan_of)
        if isinstance(other, RankShares):
            seconds = simulated_s(other, request, speeds)
            if seconds < best_s:
                best, best_s = other, seconds
    return best


def fastest(seconds: Mapping[str, float]) -> str:
    """Of schedules for ranks that differ; inputs in host memory only where nothing else is left."""
    return min(seconds, key=lambda name: (name == HOST, seconds[name]))


def simulated_s(
    shares: RankShares, request: Request, speeds: Sequence[float], whole: float = 0.0
) -> float:
    """Seconds of a step with these shards; the hardware's rates are those of a rank with speed
    ``whole``; left out, of the fastest."""
    hardware, relative = request.hardware, [s / (whole or max(speeds)) for s in speeds]
    return simulate(
        shares.plan, shares.program, hardware, speeds=relative, shards=shares.rows
    ).seconds


def _of_all_schedules(
    request: Request,
    sweeps: SweepPlan,
    total: int,
    speeds: Sequence[float],
    budgets: Sequence[int],
    plan_of: GroupPlanner,
    fits_of: GroupFits,
) -> RankShares:
    """Shards for every schedule by itself, and of them those whose step is shortest."""
    found: dict[str, RankShares] = {}
    seconds: dict[str, float] = {}
    refused: dict[str, BudgetError | ScheduleError] = {}
    for name in CLUSTER_SCHEDULES:
        asked = replace(request, schedule=name)
        try:
            shares = shares_of_ranks(asked, sweeps, total, speeds, budgets, plan_of, fits_of)
        except (BudgetError, ScheduleError) as error:
            refused[name] = error
            continue
        found[name], seconds[name] = shares, simulated_s(shares, asked, speeds)
    if not found:
        raise nearest(refused.values())
    best = fastest(seconds)
    plan, cluster = found[best].plan, found[best].plan.cluster
    assert cluster is not None
    known = dict(cluster.rejected)
    others = [(name, known.get(name, str(why))) for name, why in refused.items()]
    others += [
        (name, f"{s / seconds[best] - 1:.1%} slower")
        if s >= seconds[best]
        else (name, "inputs would have to be in host memory")
        for name, s in seconds.items()
        if name != best
    ]
    plan = replace(plan, cluster=replace(cluster, rejected=tuple(others)))
    return replace(found[best], plan=plan)


def without_poorest(
    request: Request,
    sweeps: SweepPlan,
    total: int,
    speeds: Sequence[float],
    budgets: Sequence[int],
    plan_of: GroupPlanner = choose_cluster_plan,
    fits_of: GroupFits = group_fits,
) -> tuple[int, float] | None:
    """The rank with least memory, and seconds of a step of the others without it; None where all
    have as much, where the others have no room, and on several nodes, which stay alike."""
    hardware, left = request.hardware, len(speeds) - 1
    if len(set(budgets)) < 2 or hardware.nodes > 1:
        return None
    poorest = min(range(len(budgets)), key=lambda r: (budgets[r], speeds[r]))
    device = hardware.device_level
    levels = tuple(replace(x, count=left) if x is device else x for x in hardware.levels)
    step = request.row_step
    problem = scaled(request.problem, step * -(-total // (step * left)))
    asked = replace(
        request, hardware=replace(hardware, levels=levels), group_size=left, problem=problem
    )
    fast, most = ([v for r, v in enumerate(of) if r != poorest] for of in (speeds, budgets))
    try:
        shares = shares_of_ranks(
            asked, sweeps, total, fast, [int(b) for b in most], plan_of, fits_of
        )
    except (BudgetError, ScheduleError):
        return None
    return poorest, simulated_s(shares, asked, fast, max(speeds))


def largest_total(
    request: Request,
    sweeps: SweepPlan,
    speeds: Sequence[float],
    budgets: Sequence[int] = (),
    plan_of: GroupPlanner = choose_cluster_plan,
    fits_of: GroupFits = group_fits,
) -> int:
    """The most rows of all ranks together that ``shares_of_ranks`` finds shards for.

    Every rank is as full as its own memory lets it be, whatever its speed.  Where they can all run
    one plan, that is their sum; else less by what tiles of different size leave free, to within
    1/128.

    Args:
        request: of a rank; its rows are not looked at.
        sweeps: the loss in sweeps.
        speeds: of each rank, in any unit.
        budgets: bytes of each rank; left out, all have the request's.
        plan_of: plans a request, or raises BudgetError.
        fits_of: says which rows it can plan.

    Raises:
        ScheduleError: the loss cannot use the schedule.
    """
    budgets = budgets or [request.budget.device_bytes] * len(speeds)
    by_budget = _rows_by_budget(request, sweeps, budgets, fits_of)
    low, high = 0, sum(by_budget[b] for b in budgets)
    total = high
    while high - low > high // 128:
        found = limited(request, sweeps, total, speeds, budgets, by_budget, plan_of)
        fits = isinstance(found, RankShares)
        low, high = (total, high) if fits else (low, total - 1)
        total = (low + high + 1) // 2
    return low - low % request.row_step


def _rows_by_budget(
    request: Request,
    sweeps: SweepPlan,
    budgets: Sequence[int],
    fits_of: GroupFits,
    enough: int = 0,
) -> dict[int, int]:
    """The most rows that a rank with each budget can have."""
    return {
        b: largest_shard(within(request, b), sweeps, fits_of, enough) for b in sorted(set(budgets))
    }


__all__ = [
    "GroupFits",
    "GroupPlanner",
    "RankShares",
    "advised_rows",
    "fastest",
    "largest_shard",
    "largest_total",
    "shares_of_ranks",
    "simulated_s",
    "without_poorest",
]
