"""``cl-compiler tune``: the planner's candidates measured here, the fastest into the cache."""

from __future__ import annotations

import time
import warnings

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import working, write, write_json, write_report
from cl_compiler.cli.requests import ask, request_of

__all__ = ["tune"]


def tune(
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
    json: opt.Json = False,
) -> None:
    """Measure a few plans on this machine and keep the fastest.

    `compile_loss(..., tune=True)` with the same arguments finds it in the cache. Larger problems
    are measured with fewer rows. Needs PyTorch, and the machine that is planned for.
    """
    try:
        import torch
    except ImportError:
        typer.echo("tune runs what it measures: install PyTorch", err=True)
        raise typer.Exit(1) from None
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, deterministic=deterministic, positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    with working("tuning", ("the machine and the loss", "candidates")) as step:
        step()
        from cl_compiler.plan.record import plan_from_json
        from cl_compiler.plan.report import explain
        from cl_compiler.runtime.busy import CpuTimes, foreign_cores, in_the_way
        from cl_compiler.variants import fetch_variant

        request = request_of(question)
        step()
        before, start = CpuTimes.now(), time.perf_counter()
        entry = fetch_variant(request, tuned=True)
        foreign = foreign_cores(before, CpuTimes.now(), time.perf_counter() - start)
    kept = "" if entry.path is None else f"remove {entry.path.parent}, and "
    so = f"the fastest may be another; {kept}tune again when the machine is quiet"
    others = "" if entry.hit else in_the_way(foreign, torch.get_num_threads(), so)
    if others:
        warnings.warn(others, stacklevel=2)
    path = None if entry.path is None else str(entry.path)
    if json:
        write_json({"path": path, "cached": entry.hit, "plan": dict(entry.plan)})
        return
    write_report(explain(plan_from_json(entry.plan)))
    where = path or "in memory only, as the cache is not used"
    write(f"\n{'tuned before' if entry.hit else 'kept'}: {where}")
