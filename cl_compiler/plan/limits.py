"""What fits: the smallest budget for a problem, the largest problem for a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import networkx as nx

from cl_compiler.errors import BudgetError
from cl_compiler.lang.program import Schedule
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.space import Option, Point, Space, at, sizes_of, space_of
from cl_compiler.plan.types import Problem, Request
from cl_compiler.units import format_bytes

CEILING = 1 << 40
"""Rows beyond which ``max_batch`` does not look."""


def max_batch(
    request: Request,
    sweep_plan: SweepPlan | None = None,
    hardware_graph: nx.DiGraph | None = None,
) -> int:
    """The largest M whose plan fits the budget; D and M : N stay as they are.

    Returns:
        rows, 0 where not even one fits.

    Raises:
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
    """
    return largest_batch(space_of(request, sweep_plan, hardware_graph))


def largest_batch(space: Space) -> int:
    """``max_batch`` of a prepared request."""
    options = [space.option(s) for s in space.schedules()]
    batch = largest(
        lambda rows: any(_least_bytes(space, o, rows) <= space.limit_bytes for o in options)
    )
    return batch - batch % space.request.row_step


def least_bytes(request: Request, sweep_plan: SweepPlan | None = None) -> Callable[[int], int]:
    """Of rows (columns in proportion): the bytes of the smallest plan, whatever the budget.

    Raises:
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
    """
    space = space_of(request, sweep_plan, None)
    options = [space.option(s) for s in space.schedules()]
    return lambda rows: min(_least_bytes(space, option, rows) for option in options)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all smaller ones do; 0 where not even 1 does."""
    low, high = 0, 1
    while high < CEILING and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def scaled(problem: Problem, rows: int) -> Problem:
    """The problem with so many rows, and columns in proportion."""
    return replace(problem, M=rows, N=max(1, math.ceil(problem.N * rows / problem.M)))


def _least_bytes(space: Space, option: Option, rows: int) -> int:
    """Bytes of a schedule with its smallest tile."""
    sizes = sizes_of(space.request, scaled(space.request.problem, rows), space.machine)
    tile = option.smallest_tile(sizes)
    if option.facts.kept_tile is None:
        return option.memory.peak_bytes({**sizes, **at(tile, 0)})
    # Where a schedule keeps some of several tiles, it keeps at least one; ``dense`` has but one.
    several = int(option.schedule != "dense")
    return option.memory.peak_bytes({**sizes, **at(tile, 1, scratch=several)})


def smallest(space: Space, schedule: Schedule) -> Point:
    """The point of a schedule with the fewest bytes."""
    option = space.option(schedule)
    tile = option.smallest_tile(space.sizes)
    kept = 0 if option.facts.kept_tile is None else 1
    return space.point(schedule, tile, kept)


def fits_at_all(space: Space) -> bool:
    """Whether any schedule has a plan within the budget."""
    return any(smallest(space, s).peak_bytes <= space.limit_bytes for s in space.schedules())


def budget_error(space: Space) -> BudgetError:
    """Say what was asked for, what it needs and what would fit."""
    request, problem = space.request, space.request.problem
    points = [smallest(space, s) for s in space.schedules()]
    least = min(p.peak_bytes for p in points)
    size = f"M=N={problem.M}" if problem.M == problem.N else f"M={problem.M}, N={problem.N}"
    limit = space.limit_bytes
    obstacle, remedy = f"budget {format_bytes(limit)}", f"Give at least memory_budget={least}"
    if limit < request.budget.device_bytes:
        obstacle = f"the device has {format_bytes(limit)}"
        remedy = "Take a device with more memory"
    schedule = "" if request.schedule == "auto" else f" with schedule {request.schedule!r}"
    batch = largest_batch(space)
    smaller = f", or a smaller batch: the largest batch that fits is M={batch:,}"
    fitting = smaller if batch else "; no batch fits, however small"
    return BudgetError(
        f"{request.loss.name} at {size}, D={problem.D}, {problem.dtype}{schedule} needs at least "
        f"{format_bytes(least)} ({least} bytes); {obstacle}. {remedy}{fitting}.",
        least if limit == request.budget.device_bytes else 0,
    )


__all__ = [
    "budget_error",
    "fits_at_all",
    "largest",
    "largest_batch",
    "max_batch",
    "scaled",
    "smallest",
]
