"""The plan of a request for a group of ranks, and the text of the file that every rank runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cl_compiler.codegen.ring.planning import kernel_planner, kernels_fit
from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.codegen.ring.target import kernel_obstacle
from cl_compiler.codegen.triton.support import obstacle_of_machine
from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import CANONICAL
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cluster import choose_cluster_plan, group_fits
from cl_compiler.plan.precision import FP8
from cl_compiler.plan.types import Plan, Request


def plan_and_print_ring(request: Request, sweeps: SweepPlan, variant: str) -> tuple[Plan, str]:
    """The plan of a request, and the text of the file that runs it.

    On GPUs what Triton serves goes before whatever PyTorch could do.

    Raises:
        BudgetError, ScheduleError: no plan exists; the message says why.
    """
    plan, program = plan_group(request, sweeps)
    on_cpu = request.hardware.kind == "cpu"
    assert plan.cluster is not None
    text = render_ring(
        plan,
        program,
        variant,
        cluster_schedule=plan.cluster.schedule,
        chunk=plan.cluster.chunk,
        ranks_of_node=plan.cluster.node,
        resident=plan.cluster.resident,
        device="cpu" if on_cpu else "cuda",
        arch=request.hardware.arch if plan.template == "triton" else "",
    )
    return plan, text


def plan_group(request: Request, sweeps: SweepPlan) -> tuple[Plan, Program]:
    """The plan by which a request is printed, with the program that it runs.

    Raises:
        BudgetError, ScheduleError: no plan exists; the message says why.
    """
    reason = "" if request.hardware.kind == "cpu" else _obstacle(request)
    refusal: BudgetError | ScheduleError | None = None
    if request.hardware.kind != "cpu" and not reason:
        try:
            return choose_cluster_plan(request, sweeps, kernel_planner(request.hardware.arch))
        except (BudgetError, ScheduleError) as error:
            reason, refusal = str(error), error
    if request.precision == FP8:
        raise ScheduleError(
            f"{request.loss.name} on a group with precision {FP8!r}: {reason}. "
            "Use precision='auto'."
        )
    try:
        plan, program = choose_cluster_plan(_in_tiles(request), sweeps)
    except BudgetError as error:  # kernels may take less than the smallest of PyTorch's tiles
        least = refusal.least_bytes if isinstance(refusal, BudgetError) else 0
        if refusal is not None and 0 < least < error.least_bytes:
            raise refusal from None
        raise
    if reason:
        plan = replace(plan, notes=(f"PyTorch's tiles are emitted: {reason}", *plan.notes))
    return plan, program


def fits_group(request: Request, sweeps: SweepPlan) -> Callable[[int], bool]:
    """Of rows on every rank, columns in proportion: whether ``plan_group`` has a plan.

    Raises:
        ScheduleError: the loss cannot use the schedule.
    """
    in_tiles = group_fits(_in_tiles(request), sweeps)
    if request.hardware.kind == "cpu" or _obstacle(request):
        return in_tiles
    in_kernels = group_fits(request, sweeps, kernels_fit(request.hardware.arch))
    return lambda rows: in_kernels(rows) or in_tiles(rows)


def _in_tiles(request: Request) -> Request:
    """PyTorch's tiles have no products of split operands."""
    return replace(request, precision="ieee") if request.precision == "bf16x3" else request


def _obstacle(request: Request) -> str:
    """Why a group cannot compute in Triton kernels; "" where it can."""
    if request.schedule == CANONICAL:
        return "kernels fold statistics tile by tile, not chunk by chunk in global order"
    reason = obstacle_of_machine(request.hardware.arch)
    return reason or kernel_obstacle(request.problem, request.precision)


__all__ = ["fits_group", "plan_and_print_ring", "plan_group"]
