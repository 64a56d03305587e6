"""Which templates print a plan: Triton's on one GPU where they serve it, PyTorch's otherwise."""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.codegen.render import render
from cl_compiler.codegen.triton.panel import with_panel
from cl_compiler.codegen.triton.render import render_triton
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.lang.program import build_program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.search import choose_plan
from cl_compiler.plan.types import Plan, Request


def plan_and_print(request: Request, sweeps: SweepPlan, variant: str) -> tuple[Plan, str]:
    """The plan of a request, and the text of the file that runs it.

    On a GPU with the schedule left open, Triton's ``spill`` goes before whatever PyTorch could do.

    Raises:
        BudgetError, ScheduleError: no plan exists; the message says why.
    """
    spec = request.hardware
    if spec.kind == "cpu" or spec.world_size > 1:
        plan = choose_plan(_widened(request), sweeps)
        return plan, render(plan, build_program(sweeps, plan.schedule), variant)
    wanted = "spill" if request.schedule == "auto" else request.schedule
    plan = choose_plan(replace(request, schedule=wanted), sweeps)
    program = build_program(sweeps, plan.schedule)
    reason = obstacle(plan, program)
    if not reason:
        plan = with_panel(replace(plan, template="triton"), spec, program)
        plan = _noted(plan, f"Triton kernels for {spec.arch}")
        return plan, render_triton(plan, program, variant, spec.arch)
    plan = _noted(choose_plan(_widened(request), sweeps), f"PyTorch's tiles are emitted: {reason}")
    return plan, render(plan, build_program(sweeps, plan.schedule), variant, device="cuda")


def _widened(request: Request) -> Request:
    """With products that PyTorch's tiles can have: in fp32 where Triton's would be split."""
    return replace(request, precision="ieee") if request.precision == "bf16x3" else request


def _noted(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(note, *plan.notes))


__all__ = ["plan_and_print"]
