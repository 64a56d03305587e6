"""``cl-compiler plan``: how a loss would run, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import working, write, write_json, write_report
from cl_compiler.cli.requests import ask, request_of

__all__ = ["plan"]


def plan(
    hardware: opt.Hardware = "auto",
    budget: opt.Budget = None,
    loss: opt.Loss = "clip",
    problem: opt.ProblemText = opt.DEFAULT_PROBLEM,
    M: opt.Rows = None,
    N: opt.Cols = None,
    D: opt.Features = None,
    dtype: opt.DType = "float32",
    precision: opt.Precision = "auto",
    schedule: opt.Schedule = "auto",
    positives: opt.Positives = "auto",
    gradients: opt.Gradients = "auto",
    slots: opt.Slots = 0,
    bank: opt.Bank = 0,
    operand: opt.Widths = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Also find the largest M that fits the budget.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Show how a loss would run: schedule, tiles, bytes, seconds, and what was rejected.

    Nothing is compiled or measured, and any machine can be planned for: preset names are in
    `cl-compiler doctor`.
    """
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, positives=positives, gradients=gradients,
        slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    steps = ["the machine and the loss", "the search", *(["the largest batch"] * max_batch)]
    with working("planning", steps) as step:
        from cl_compiler.codegen.backend import max_batch as find_largest
        from cl_compiler.codegen.backend import plan_of
        from cl_compiler.lang.sweeps import plan_sweeps
        from cl_compiler.plan.record import plan_to_json
        from cl_compiler.plan.report import explain

        step()
        request = request_of(question)
        step()
        sweeps = plan_sweeps(request.loss, request.positives, request.needs)
        chosen = plan_of(request, sweeps)
        largest = None
        if max_batch:
            step()
            largest = find_largest(request, sweeps)
    if json:
        write_json(plan_to_json(chosen) | ({} if largest is None else {"max_batch": largest}))
        return
    write_report(explain(chosen))
    if largest is not None:
        write(f"\nlargest batch that fits this budget: M = {largest:,}")
