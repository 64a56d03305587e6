"""The plan of a request for a group of ranks, and the text of the file that every rank runs."""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.types import Plan, Request


def plan_and_print_ring(request: Request, sweeps: SweepPlan, variant: str) -> tuple[Plan, str]:
    """The plan of a request, and the text of the file that runs it.

    Raises:
        BudgetError, ScheduleError: no plan exists; the message says why.
    """
    if request.precision == "bf16x3":  # PyTorch's tiles have no such products
        request = replace(request, precision="ieee")
    plan, program = choose_cluster_plan(request, sweeps)
    device = "cpu" if request.hardware.kind == "cpu" else "cuda"
    assert plan.cluster is not None
    text = render_ring(
        plan,
        program,
        variant,
        cluster_schedule=plan.cluster.schedule,
        chunk=plan.cluster.chunk,
        ranks_of_node=plan.cluster.node,
        device=device,
    )
    return plan, text


__all__ = ["plan_and_print_ring"]
