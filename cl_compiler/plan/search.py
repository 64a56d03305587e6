"""choose_plan: map a loss onto a machine.

Every schedule that the loss can use is tried with every tile; what exceeds the budget is dropped
and the fastest taken.  Differences below ``RESOLUTION`` mean nothing to the model: among such plans
the one with the fewest bytes is taken.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from cl_compiler.lang.base_two import has_exp2
from cl_compiler.lang.program import SCHEDULES, Schedule
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cost import PARTS
from cl_compiler.plan.limits import budget_error, smallest
from cl_compiler.plan.machine import rates_in_words
from cl_compiler.plan.mapping import map_levels, notes_of
from cl_compiler.plan.space import STEP, Point, RingProgram, Space, space_of
from cl_compiler.plan.types import Candidate, Plan, Request, Tile
from cl_compiler.units import format_bytes

RESOLUTION = 1e-3
"""Relative difference of predicted seconds below which two plans count as equally fast."""
PREFERENCE: tuple[Schedule, ...] = ("dense", "spill", "panel", "retain", "recompute")
"""Which of two plans with equal seconds and equal bytes is taken: the one with fewer passes."""


def choose_plan(
    request: Request,
    sweep_plan: SweepPlan | None = None,
    hardware_graph: nx.DiGraph | None = None,
    ring: RingProgram | None = None,
) -> Plan:
    """The fastest plan that fits the budget.

    Args:
        request: loss, machine, budget and problem.
        sweep_plan: the loss in sweeps, if the caller has it already.
        hardware_graph: the machine as a graph; None builds it from the request's hardware.
        ring: what the requested schedule does, where it is not what it does on one device.

    Raises:
        BudgetError: nothing fits; the message names the smallest budget that would do, and the
            largest batch that fits.
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
        HardwareError: the machine has no rate for the way in which products are computed.
        ArgumentError: the problem lacks the number of slots or the length of the bank.
    """
    space = space_of(request, sweep_plan, hardware_graph, ring)
    best = _best_of_each(space)
    if not best:
        raise budget_error(space)
    chosen = select(_with_room(space, best.values()))
    return _plan(space, chosen, _rejected(space, chosen, best))


def plan_with_tile(
    request: Request, tile: Tile, sweep_plan: SweepPlan, ring: RingProgram | None = None
) -> Plan:
    """The plan of the requested schedule with a tile that is given, whether it fits or not.

    ``ring``: as ``choose_plan``.

    Raises:
        ScheduleError, HardwareError, ArgumentError: as ``choose_plan``.
    """
    space = space_of(request, sweep_plan, None, ring)
    (schedule,) = space.schedules()
    return _plan(space, space.point(schedule, tile, 1), ())


def plan_candidates(
    request: Request,
    sweep_plan: SweepPlan | None = None,
    hardware_graph: nx.DiGraph | None = None,
) -> tuple[Plan, ...]:
    """The best plan of every schedule that fits, the fastest first.

    Raises:
        as ``choose_plan``.
    """
    space = space_of(request, sweep_plan, hardware_graph)
    best = _best_of_each(space)
    if not best:
        raise budget_error(space)
    return tuple(
        _plan(space, p, ())
        for p in sorted(_with_room(space, best.values()), key=lambda p: p.seconds)
    )


def nearby_plans(
    request: Request, most: int, sweep_plan: SweepPlan | None = None
) -> tuple[Plan, ...]:
    """The best plan of every schedule that fits, and those with tiles that are twice as long or
    half as long either way; at most ``most`` of them, the fastest by prediction first.

    Raises:
        as ``choose_plan``.
    """
    space = space_of(request, sweep_plan, None)
    best = _best_of_each(space)
    if not best:
        raise budget_error(space)
    points = list(best.values())
    for point in best.values():
        around = [c for c in _neighbours(space, point) if c.peak_bytes <= space.limit_bytes]
        points += [space.point(c.schedule, c.tile, c.kept_tiles) for c in around]
    points = sorted(_with_room(space, points), key=lambda p: p.seconds)
    return tuple(_plan(space, p, ()) for p in points[:most])


def select(points: list[Point]) -> Point:
    """The fastest of some points; of equally fast ones that with the fewest bytes."""
    fastest = min(p.seconds for p in points)
    near = [p for p in points if p.seconds <= fastest * (1 + RESOLUTION)]
    return min(
        near,
        key=lambda p: (p.peak_bytes, PREFERENCE.index(p.schedule), p.tile.rows, p.tile.cols),
    )


def _best_of_each(space: Space) -> dict[Schedule, Point]:
    best = {}
    for schedule in space.schedules():
        if points := _with_room(space, space.points(schedule)):
            best[schedule] = select(points)
    return best


def _with_room(space: Space, points: Iterable[Point]) -> list[Point]:
    """Those that leave the allocator room, if there are any; else all."""
    found = list(points)
    return [p for p in found if space.leaves_room(p)] or found


def _rejected(space: Space, chosen: Point, best: dict[Schedule, Point]) -> tuple[Candidate, ...]:
    """Why each other schedule, and each neighbouring tile, was not taken."""
    result = []
    for schedule in SCHEDULES:
        if schedule == chosen.schedule:
            continue
        if schedule in best:
            point = best[schedule]
            result.append(_candidate(point, _worse(space, point, chosen)))
        elif space.reasons[schedule]:
            result.append(Candidate(schedule, Tile(0, 0), 0, 0, 0.0, space.reasons[schedule]))
        elif space.request.schedule != "auto":
            result.append(Candidate(schedule, Tile(0, 0), 0, 0, 0.0, "not requested"))
        else:
            point = smallest(space, schedule)
            result.append(_candidate(point, _too_big(space, point)))
    return (*result, *_neighbours(space, chosen))


def _neighbours(space: Space, chosen: Point) -> list[Candidate]:
    """The chosen tile doubled and halved each way."""
    option = space.option(chosen.schedule)
    extent, tile = option.extent(space.sizes), chosen.tile
    around = [
        Tile(tile.rows // 2, tile.cols),
        Tile(tile.rows * 2, tile.cols),
        Tile(tile.rows, tile.cols // 2),
        Tile(tile.rows, tile.cols * 2),
    ]
    if option.facts.needs_square_tiles:
        around = [Tile(tile.rows // 2, tile.cols // 2), Tile(tile.rows * 2, tile.cols * 2)]
    if chosen.schedule == "dense":  # one tile, whatever its shape
        around = []
    result = []
    for other in around:
        other = Tile(min(other.rows, extent.rows), min(other.cols, extent.cols))
        if other == tile or (option.facts.spans_rows and other.cols != tile.cols):
            continue
        if not (_is_allowed(other.rows, extent.rows) and _is_allowed(other.cols, extent.cols)):
            continue
        counts = option.kept_counts(space.sizes, option.bytes_by_phase, other, space.limit_bytes)
        point = space.point(chosen.schedule, other, counts[-1] if counts else 1)
        fits = point.peak_bytes <= space.limit_bytes
        reason = _worse(space, point, chosen) if fits else _too_big(space, point)
        result.append(_candidate(point, reason))
    return result


def _is_allowed(side: int, length: int) -> bool:
    return side == length or (side > 0 and side % STEP == 0)


def _worse(space: Space, point: Point, chosen: Point) -> str:
    """The room that a candidate leaves too little of, or where the time goes that it loses."""
    if space.leaves_room(chosen) and not space.leaves_room(point):
        kept = space.allocator_bytes(point)
        return f"leaves too little for an allocator, which may keep {format_bytes(round(kept))}"
    ratio = point.seconds / chosen.seconds - 1
    if ratio <= RESOLUTION:
        more = point.peak_bytes - chosen.peak_bytes
        return f"as fast, {format_bytes(more)} more" if more > 0 else "as fast"
    lost = [a - b for a, b in zip(point.parts, chosen.parts, strict=True)]
    return f"{ratio:.1%} slower: {PARTS[lost.index(max(lost))]}"


def _too_big(space: Space, point: Point) -> str:
    over = point.peak_bytes - space.limit_bytes
    return f"does not fit: {format_bytes(over)} above the budget"


def _candidate(point: Point, reason: str) -> Candidate:
    return Candidate(
        point.schedule, point.tile, point.kept_tiles, point.peak_bytes, point.seconds, reason
    )


def _plan(space: Space, point: Point, rejected: tuple[Candidate, ...]) -> Plan:
    request, option = space.request, space.option(point.schedule)
    values = space.values(option, point.tile, point.kept_tiles)
    phase, memory = option.memory.breakdown(values)
    exp2 = has_exp2(option.facts.program)
    sizes = space.sizes
    unit = 2.0 * sizes["M"] * sizes["N"] * sizes["D"]
    return Plan(
        loss_name=request.loss.name,
        hardware_name=space.machine.spec.name,
        problem=request.problem,
        positives=request.positives,
        needs=request.needs,
        precision=request.precision,
        budget=request.budget,
        schedule=point.schedule,
        tile=point.tile,
        kept_tiles=point.kept_tiles,
        levels=map_levels(space, point),
        memory=memory,
        peak_bytes=point.peak_bytes,
        seconds=point.seconds,
        units=option.cost.flops(values) / unit,
        notes=notes_of(space, point),
        rejected=rejected,
        seconds_by_part=tuple(
            (what, s) for what, s in zip(PARTS, point.parts, strict=True) if s > 0
        ),
        peak_phase=phase,
        library="onednn" if option.by_onednn else "blas",
        exponential="exp2" if exp2 else "exp",
        strip=space.machine.strip_columns(point.tile) if option.facts.in_strips else 0,
        rates=rates_in_words(
            space.machine.spec,
            request.problem.dtype,
            request.precision,
            onednn=option.by_onednn,
            exp2=exp2,
        ),
    )


__all__ = [
    "RESOLUTION",
    "choose_plan",
    "nearby_plans",
    "plan_candidates",
    "plan_with_tile",
    "select",
]
