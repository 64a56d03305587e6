"""``cl-compiler plan``: how a loss would run, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_report, write_table
from cl_compiler.cli.ranks import (
    Budgets,
    Speeds,
    if_left_out,
    on_its_ranks,
    on_ranks,
    ranks_of,
    step_of,
    table_of,
)
from cl_compiler.cli.requests import ask, request_of
from cl_compiler.units import exact_bytes

__all__ = ["plan"]


def plan(
    hardware: opt.Hardware = "auto",
    budget: opt.Budget = None,
    loss: opt.Loss = "clip",
    problem: opt.ProblemText = opt.DEFAULT_PROBLEM,
    M: opt.Rows = None,
    N: opt.Cols = None,
    D: opt.Features = None,
    dtype: opt.DType = opt.DEFAULT_DTYPE,
    precision: opt.Precision = "auto",
    schedule: opt.Schedule = "auto",
    deterministic: opt.Deterministic = False,
    positives: opt.Positives = "auto",
    gradients: opt.Gradients = "auto",
    slots: opt.Slots = 0,
    bank: opt.Bank = 0,
    operand: opt.Widths = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Also find the largest M that fits the budget.")
    ] = False,
    speeds: Speeds = None,
    budgets: Budgets = None,
    json: opt.Json = False,
) -> None:
    """Show how a loss would run: schedule, tiles, bytes, seconds, and what was rejected.

    Nothing is compiled or measured, and any machine can be planned for: preset names are in
    `cl-compiler doctor`. On several devices the problem is that of all of them, and the plan that
    of a rank. With --speeds or --budgets, of every rank one: which of them gets how many rows, and
    the plan of the largest shard.
    """
    differing = ranks_of(speeds, budgets, budget)
    if differing is not None and (schedule != "auto" or max_batch):
        raise typer.BadParameter(
            "--speeds and --budgets plan a group of ranks: leave out --schedule and --max-batch, "
            "which are of one device (`cl-compiler simulate` has every cluster schedule, and the "
            "largest batch)"
        )
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, deterministic=deterministic, positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    steps = ["the machine and the loss", "the search", *(["the largest batch"] * max_batch)]
    with working("planning", steps) as step:
        from cl_compiler.codegen.backend import max_batch as find_largest
        from cl_compiler.codegen.backend import plan_of
        from cl_compiler.codegen.ring.backend import fits_group, plan_group
        from cl_compiler.lang.sweeps import plan_sweeps
        from cl_compiler.plan.record import plan_to_json
        from cl_compiler.plan.report import explain
        from cl_compiler.plan.shards import shares_of_ranks, simulated_s

        step()
        request = request_of(question)
        step()
        sweeps = plan_sweeps(request.loss, request.positives, request.needs)
        shares, left_out, step_s = None, "", 0.0
        if differing is None:
            request = on_its_ranks(request)
        else:
            asked = on_ranks(request, 0, differing)
            total = request.problem.M
            shares = shares_of_ranks(
                asked, sweeps, total, differing.speeds, differing.budgets, plan_group, fits_group
            )
            step_s = simulated_s(shares, asked, differing.speeds)
            left_out = if_left_out(asked, sweeps, total, differing, step_s)
        chosen = plan_of(request, sweeps) if shares is None else shares.plan
        largest, on_devices = None, ""
        if max_batch:
            step()
            largest = find_largest(request, sweeps)
            cluster = chosen.cluster
            if cluster is not None and not cluster.inputs_in_host and schedule == "auto":
                rows = find_largest(replace(request, schedule=cluster.schedule), sweeps)
                if rows < largest:  # as a whole it is that of inputs in host memory
                    on_devices = f"with this plan's schedule, {cluster.schedule}: M = {rows:,}"
    if json:
        if shares is not None:
            of_ranks = {
                "rows_of_ranks": list(shares.rows),
                "peak_bytes_of_ranks": list(shares.peak_bytes),
                "memory_budget_bytes": shares.plan.peak_bytes,
                "step_s": step_s,
            }
            write_json(plan_to_json(chosen) | of_ranks)
            return
        write_json(plan_to_json(chosen) | ({} if largest is None else {"max_batch": largest}))
        return
    write_report(explain(chosen, step_of(step_s, chosen, differing) if shares else ""))
    if differing is not None and shares is not None:
        write()
        columns = ("ranks", "speed", "rows", "memory", "budget")
        write_table(Table("", columns, tuple(table_of(differing, shares)), frozenset(range(1, 5))))
        cluster = shares.plan.cluster
        assert cluster is not None
        write(
            f"memory_budget for all of them: {exact_bytes(shares.plan.peak_bytes)}, "
            f"with schedule {cluster.schedule!r}"
        )
        if left_out:
            write(left_out)
    if largest is not None:
        write(f"\nlargest batch that fits this budget: M = {largest:,}")
        if on_devices:
            write(on_devices)
