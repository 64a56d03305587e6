"""Which templates print a plan: a ring's on a group of ranks; of one device Triton's on a GPU where
they serve it, PyTorch's otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cl_compiler.codegen.render import render
from cl_compiler.codegen.ring.backend import fits_group, plan_and_print_ring, plan_group
from cl_compiler.codegen.triton.panel import kernel_plan, nearby_panels, smallest_bytes
from cl_compiler.codegen.triton.render import render_triton
from cl_compiler.codegen.triton.retain import retained
from cl_compiler.codegen.triton.support import obstacle, obstacle_of_machine
from cl_compiler.codegen.triton.workload import Workload
from cl_compiler.errors import ScheduleError
from cl_compiler.lang.base_two import in_base_two
from cl_compiler.lang.program import SCHEDULES, Schedule
from cl_compiler.lang.schedules import build_program, valid_schedules
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan import limits
from cl_compiler.plan.cluster import group_least_bytes
from cl_compiler.plan.precision import FP8, SPLIT
from cl_compiler.plan.search import choose_plan, nearby_plans
from cl_compiler.plan.shards import largest_shard
from cl_compiler.plan.space import check_one_device
from cl_compiler.plan.types import Candidate, Plan, Request, Tile
from cl_compiler.units import format_bytes

ON_REQUEST: tuple[Schedule, ...] = ("recompute",)
"""Triton serves them, but nothing has shown when they are the faster ones."""


def plan_and_print(request: Request, sweeps: SweepPlan, variant: str) -> tuple[Plan, str]:
    """The plan of a request, and the text of the file that runs it.

    Raises:
        as ``plan_of``.
    """
    if request.group_size:
        return plan_and_print_ring(request, sweeps, variant)
    plan = plan_of(request, sweeps)
    return plan, print_plan(plan, request, sweeps, variant)


def print_plan(plan: Plan, request: Request, sweeps: SweepPlan, variant: str) -> str:
    """The text of the file that runs one of a request's plans."""
    program = build_program(sweeps, plan.schedule)
    if plan.exponential == "exp2":
        program = in_base_two(program)
    if plan.strip:
        program = in_strips(program)
    if plan.template == "triton":
        return render_triton(plan, program, variant, request.hardware.arch)
    return render(plan, program, variant, device="cuda" if _is_gpu(request) else "cpu")


def candidates_of(request: Request, sweeps: SweepPlan, most: int) -> tuple[Plan, ...]:
    """Plans worth measuring, the fastest by prediction first: of every schedule the best, and its
    tile or panel made longer or shorter.

    Raises:
        as ``plan_of``.
    """
    if not _is_gpu(request):
        return nearby_plans(_widened(request), most, sweeps)
    workloads = _workloads(request, sweeps)[0].values()
    plans = [plan for w in workloads for plan in nearby_panels(w)]
    if not plans:
        _refuse_eight_bits(request, "no kernels have such products within the budget")
        return nearby_plans(_widened(request), most, sweeps)
    return tuple(sorted(plans, key=lambda p: p.seconds)[:most])


def plan_of(request: Request, sweeps: SweepPlan) -> Plan:
    """The plan by which a request is printed.

    On a GPU what Triton serves goes before whatever PyTorch could do.

    Raises:
        BudgetError, ScheduleError: no plan exists; the message says why.
        HardwareError: the machine has no rate for the way in which products are computed.
        ArgumentError: the problem lacks the number of slots or the length of the bank.
    """
    if request.group_size:
        return plan_group(request, sweeps)[0]
    if not _is_gpu(request):
        _refuse_eight_bits(request, "only a GPU's kernels have such products")
        return choose_plan(_widened(request), sweeps)
    found, reasons = _kernel_plans(request, sweeps)
    if found:
        chosen = min(found, key=lambda s: found[s].seconds)
        plan = found[chosen]
        return replace(plan, rejected=(*_others(chosen, found, reasons), *plan.rejected))
    order = (request.schedule, *SCHEDULES[1:], *SCHEDULES)
    reason = next(reasons[s] for s in order if s in reasons)
    _refuse_eight_bits(request, reason)
    plan = choose_plan(_widened(request), sweeps)
    return replace(plan, notes=(f"PyTorch's tiles are emitted: {reason}", *plan.notes))


def max_batch(request: Request, sweeps: SweepPlan) -> int:
    """The largest M (over all ranks) whose plan fits the budget; D and M : N stay as they are.

    Returns:
        rows, 0 where not even one fits.

    Raises:
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
    """
    if request.group_size:
        return request.group_size * largest_shard(request, sweeps, fits_group)
    batch = 0 if request.precision == FP8 else limits.max_batch(_widened(request), sweeps)

    def fits(rows: int) -> bool:
        problem = limits.scaled(request.problem, rows)
        return bool(_kernel_plans(replace(request, problem=problem), sweeps)[0])

    if _is_gpu(request):
        batch = max(batch, limits.largest(fits))
    return batch - batch % request.row_step


def least_bytes(request: Request, sweeps: SweepPlan) -> Callable[[int], int]:
    """Of rows (columns in proportion): the bytes of the smallest plan of PyTorch's tiles.

    Of a group: of rows on every rank.

    Raises:
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
    """
    if request.group_size:
        return group_least_bytes(_widened(request), sweeps)
    return limits.least_bytes(_widened(request), sweeps)


def _is_gpu(request: Request) -> bool:
    return request.hardware.kind != "cpu"


def _kernel_plans(
    request: Request, sweeps: SweepPlan
) -> tuple[dict[Schedule, Plan], dict[Schedule, str]]:
    """Of each schedule the best plan that Triton serves, or why there is none.

    Raises:
        ScheduleError: the requested schedule is unknown, or the loss cannot use it.
    """
    found: dict[Schedule, Plan] = {}
    workloads, reasons = _workloads(request, sweeps)
    for schedule, workload in workloads.items():
        plan = kernel_plan(workload)
        if plan is not None:
            found[schedule] = plan
            continue
        least, limit = smallest_bytes(workload), workload.limit_bytes
        reasons[schedule] = (
            f"its kernels need {format_bytes(least)}, the budget is {format_bytes(limit)}"
        )
    return found, reasons


def _workloads(
    request: Request, sweeps: SweepPlan
) -> tuple[dict[Schedule, Workload], dict[Schedule, str]]:
    """The schedules that Triton serves, and why it does not serve the others."""
    check_one_device(request, request.hardware.world_size)
    found: dict[Schedule, Workload] = {}
    reasons = {s: r for s, r in valid_schedules(sweeps).items() if r}
    open_ = [s for s in SCHEDULES if s not in reasons] if request.schedule == "auto" else []
    for schedule in ON_REQUEST:
        if schedule in open_:
            open_.remove(schedule)
            reasons[schedule] = "on request only: its kernels were never timed"
    for schedule in open_ or [_requested(request, sweeps)]:
        program = build_program(sweeps, schedule).narrowed
        reason = obstacle_of_machine(request.hardware.arch)
        reason = reason or obstacle(request.problem, program, request.precision)
        if reason:
            reasons[schedule] = reason
        else:
            program = retained(program) if schedule == "retain" else program
            found[schedule] = Workload(request, program, request.hardware.arch)
    return found, reasons


def _requested(request: Request, sweeps: SweepPlan) -> Schedule:
    """Without gradients all tiled schedules are the same sweep."""
    if request.schedule in SCHEDULES and sweeps.gradient_levels:
        return request.schedule
    return choose_plan(request, sweeps).schedule  # says what is wrong with an unknown one


def _others(
    chosen: Schedule, found: dict[Schedule, Plan], reasons: dict[Schedule, str]
) -> list[Candidate]:
    """Why each other schedule was not taken."""
    result = []
    for schedule in SCHEDULES:
        if schedule in found and schedule != chosen:
            plan, best = found[schedule], found[chosen]
            slower = f"{plan.seconds / best.seconds - 1:.1%} slower"
            result.append(Candidate(schedule, plan.tile, 0, plan.peak_bytes, plan.seconds, slower))
        elif schedule != chosen:
            reason = reasons.get(schedule, "not requested")
            result.append(Candidate(schedule, Tile(0, 0), 0, 0, 0.0, reason))
    return result


def _refuse_eight_bits(request: Request, reason: str) -> None:
    """PyTorch's tiles would ignore it."""
    if request.precision == FP8:
        raise ScheduleError(
            f"{request.loss.name} with precision {FP8!r}: {reason}. Use precision='auto'."
        )


def _widened(request: Request) -> Request:
    """With products that PyTorch's tiles can have: in fp32 where Triton's would be split."""
    return replace(request, precision="ieee") if request.precision == SPLIT else request


__all__ = ["candidates_of", "max_batch", "plan_and_print", "plan_of", "print_plan"]
