"""How many rows a rank can have, and how many it should have where ranks differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cl_compiler.errors import ArgumentError, BudgetError, ScheduleError
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import CLUSTER_SCHEDULES, HOST
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cluster import choose_cluster_plan, group_fits, nearest
from cl_compiler.plan.limits import largest, scaled
from cl_compiler.plan.memory import GRADIENTS, RETURNED
from cl_compiler.plan.share import Share, memory_of
from cl_compiler.plan.simulate import simulate
from cl_compiler.plan.types import MemoryBudget, Plan, Request
from cl_compiler.units import format_bytes

GroupPlanner = Callable[[Request, SweepPlan], tuple[Plan, Program]]
"""Plans a request of a group; raises BudgetError where nothing fits."""
GroupFits = Callable[[Request, SweepPlan], Callable[[int], bool]]
"""Whether a planner would plan a request of a group with so many rows on each rank."""
OF_ROWS = (GRADIENTS, RETURNED)
"""What is in proportion to a rank's own rows; tiles and what is on its way are not."""
ROUNDS = 16
"""Of looking for shards and a plan that fit each other, at most."""
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

    Columns stay in proportion, D as it is.  The largest batch is as many times the ranks.

    Args:
        request: of one rank, with ``group_size``; a schedule, or "auto" for the best of them.
        sweeps: the loss in sweeps.
        fits_of: says which rows can be planned.
        enough: rows beyond which nobody looks; 0: there are none.

    Raises:
        ScheduleError: the loss cannot use the schedule.
    """
    fits = fits_of(request, sweeps)
    return enough if enough and fits(enough) else largest(fits)


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
    if most and len(most) != len(speeds):
        raise ArgumentError(
            f"{len(speeds)} speeds and {len(most)} limits of rows: give one of each for every rank."
        )
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
    rows = [math.floor(share) for share in shares]
    # what rounding left over goes where most of a row is missing
    order = sorted(range(len(rows)), key=lambda r: (rows[r] - shares[r], r))
    for r in order[: total - sum(rows)]:
        rows[r] += 1
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
class _Short:
    """A rank that has too little memory for its shard: ``bytes_`` at least, and ``without_rows``
    what passes by and the tiles alone; 0 where nobody knows."""

    rank: int
    bytes_: int
    without_rows: int


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
    rows = advised_rows(total, speeds)
    found: RankShares | _Short | None = _common_plan(request, sweeps, rows, budgets, plan_of)
    if isinstance(found, RankShares) and found.plan.budget.device_bytes >= max(budgets):
        return found  # as much as the richest rank makes use of, fits on all of them
    by_budget = _rows_by_budget(request, sweeps, budgets, fits_of, total)
    if not isinstance(found, RankShares):
        found = _limited(request, sweeps, total, speeds, budgets, by_budget, plan_of)
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
        other = _limited(request, sweeps, total, speeds, budgets, limits, plan_of)
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
    problem = scaled(request.problem, -(-total // left))
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
        found = _limited(request, sweeps, total, speeds, budgets, by_budget, plan_of)
        fits = isinstance(found, RankShares)
        low, high = (total, high) if fits else (low, total - 1)
        total = (low + high + 1) // 2
    return low


def _rows_by_budget(
    request: Request,
    sweeps: SweepPlan,
    budgets: Sequence[int],
    fits_of: GroupFits,
    enough: int = 0,
) -> dict[int, int]:
    """The most rows that a rank with each budget can have."""
    return {
        b: largest_shard(_within(request, b), sweeps, fits_of, enough) for b in sorted(set(budgets))
    }


def _limited(
    request: Request,
    sweeps: SweepPlan,
    total: int,
    speeds: Sequence[float],
    budgets: Sequence[int],
    by_budget: Mapping[int, int],
    plan_of: GroupPlanner,
) -> RankShares | _Short | None:
    """Shards of which none has more rows than a rank with its budget can have; None: there are
    none; or the rank that has no room even without rows."""
    most = [by_budget[b] for b in budgets]
    for _ in range(ROUNDS):
        if sum(most) < total:
            break
        rows = advised_rows(total, speeds, most)
        found = _common_plan(request, sweeps, rows, budgets, plan_of)
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


def _within(request: Request, device_bytes: int) -> Request:
    return replace(request, budget=MemoryBudget(device_bytes, request.budget.host_bytes))


def _common_plan(
    request: Request,
    sweeps: SweepPlan,
    rows: Sequence[int],
    budgets: Sequence[int],
    plan_of: GroupPlanner,
) -> RankShares | _Short:
    """What all ranks can run with these shards; else the rank that has least room for it."""
    widest = max(range(len(rows)), key=lambda r: (rows[r], -budgets[r]))
    budget = budgets[widest]
    asked = replace(request, problem=scaled(request.problem, max(rows[widest], 1)))
    least: RankShares | None = None
    for _ in range(ROUNDS):
        try:
            plan, program = plan_of(_within(asked, budget), sweeps)
        except BudgetError as error:
            return least or _Short(widest, error.least_bytes, 0)
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
                return _Short(tightest, least.peak_bytes[tightest], none)
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
        plan, program = plan_of(_within(asked, 1), sweeps)
    except BudgetError as error:
        plan, program = plan_of(_within(asked, error.least_bytes), sweeps)
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
