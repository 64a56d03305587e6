"""``cl-compiler simulate``: a loss on a cluster that need not exist."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table
from cl_compiler.cli.ranks import Budgets, Ranks, Speeds, in_words, on_ranks, ranks_of, table_of
from cl_compiler.cli.requests import ask, request_of
from cl_compiler.cli.simulate_report import draw, write_page
from cl_compiler.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from cl_compiler.lang.sweeps import SweepPlan
    from cl_compiler.plan.shards import RankShares
    from cl_compiler.plan.simulate import Run
    from cl_compiler.plan.types import ClusterPlan, Plan, Request

__all__ = ["simulate"]

_GANTT_RANKS = 8


def simulate(
    hardware: opt.Hardware = "h100x8",
    budget: opt.Budget = None,
    loss: opt.Loss = "clip",
    problem: opt.ProblemText = opt.DEFAULT_PROBLEM,
    dtype: opt.DType = "bfloat16",
    precision: opt.Precision = "auto",
    positives: opt.Positives = "auto",
    gradients: opt.Gradients = "auto",
    slots: opt.Slots = 0,
    bank: opt.Bank = 0,
    operand: opt.Widths = None,
    ranks: Annotated[
        int, typer.Option("--ranks", help="Of one machine of the named kind, in place of a preset.")
    ] = 0,
    gantt: Annotated[
        Path | None,
        typer.Option("--gantt", help="Draw the fastest schedule's first ranks to a .png or .svg."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page: the tables, and a chart of every schedule."),
    ] = None,
    speeds: Speeds = None,
    budgets: Budgets = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Also the largest batch within the budget.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Run every cluster schedule of a loss on a described cluster, event by event.

    The problem is that of all ranks together, spread evenly, or as --speeds and --budgets advise.
    Seconds rest on the rates of the preset, or of `cl-compiler calibrate`.
    """
    differing = ranks_of(speeds, budgets, budget)
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=None, N=None, D=None,
        dtype=dtype, precision=precision, schedule="auto", positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    with working("simulating", ["plans", "events"]) as step:
        step()
        whole = request_of(question)
        asked = on_ranks(whole, ranks, differing)
        step()
        found, refused = _simulated(
            asked,
            whole.problem.M,
            0 if gantt is None and page is None else _GANTT_RANKS,
            differing,
            max_batch,
        )
    best = min(found, key=lambda name: found[name].run.seconds) if found else ""
    title = f"{loss} on {asked.hardware.name}"
    if gantt is not None and best:
        draw(found[best].run, f"{title}: {best}", gantt)
    if json:
        _write_json(asked, found, refused, best)
    else:
        _write_text(asked, found, refused, best, differing)
    if page is not None:
        notes = [f"not {name}: {why}" for name, why in refused.items()]
        notes += [_fastest(found[best])] if best else []
        runs = [(name, of.run) for name, of in found.items()]
        write_page(page, f"{title}: {_shards(asked)}", _tables(asked, found), notes, runs)


@dataclass(frozen=True)
class _Found:
    """One schedule: its plan and run; the largest batch that fits.

    Where ranks differ, ``shares`` are advised and ``uneven`` is their run; ``even`` that of even
    shards, if they fit.
    """

    plan: Plan
    run: Run
    even: Run | None = None
    uneven: Run | None = None
    shares: RankShares | None = None
    largest: int | None = None

    @property
    def cluster(self) -> ClusterPlan:
        assert self.plan.cluster is not None
        return self.plan.cluster


def _write_json(
    asked: Request,
    found: dict[str, _Found],
    refused: dict[str, str],
    best: str,
) -> None:
    advised = _advised(found)
    write_json(
        {
            "hardware": asked.hardware.name,
            "ranks": asked.group_size,
            "fastest": best or None,
            "schedules": {name: _record(of) for name, of in found.items()},
            "refused": refused,
            "other_losses_bytes": dict(_others(asked)),
            **({} if advised is None else {"advised_rows": _record(advised)["advised_rows"]}),
        }
    )


def _write_text(
    asked: Request,
    found: dict[str, _Found],
    refused: dict[str, str],
    best: str,
    ranks: Ranks | None,
) -> None:
    write(f"{asked.loss.name} on {asked.hardware.name}: {_shards(asked)}\n")
    schedules, others = _tables(asked, found)
    write_table(schedules)
    for name, why in refused.items():
        write(f"not {name}: {why}")
    if not best:
        return
    write(f"\nfastest: {best}, {_fastest(found[best])}")
    of = _advised(found)
    if ranks is not None and of is not None:
        assert of.uneven is not None and of.shares is not None
        even = "; even shards do not fit"
        if of.even is not None:
            even = f", {format_seconds(of.even.seconds)} with even shards"
        write(
            f"ranks that differ: {of.cluster.schedule} takes {format_seconds(of.uneven.seconds)} "
            f"with rows {in_words(of.shares.rows)}{even}"
        )
        if ranks.budgets:
            asks = format_bytes(of.shares.plan.peak_bytes)
            write(f"memory_budget of all of them, so that each keeps within its own: {asks}\n")
            columns = ("ranks", "speed", "rows", "memory", "budget")
            rows = tuple(table_of(ranks, of.shares))
            write_table(Table("", columns, rows, frozenset(range(1, 5))))
    write_table(others)


def _shards(asked: Request) -> str:
    share = asked.problem
    return (
        f"{asked.group_size} ranks with shards of {share.M} x {share.N}, D={share.D} {share.dtype}"
    )


def _fastest(of: _Found) -> str:
    hides = f"from {of.cluster.hiding_rows} rows per rank on" if of.cluster.hiding_rows else "-"
    return f"bound by {of.run.bound_by}; hides its exchange {hides}"


def _advised(found: dict[str, _Found]) -> _Found | None:
    """The fastest with shards for ranks that differ."""
    uneven = [of for of in found.values() if of.uneven is not None]
    return min(uneven, key=lambda of: of.uneven.seconds if of.uneven else math.inf, default=None)


def _simulated(
    request: Request, total: int, drawn_ranks: int, ranks: Ranks | None, max_batch: bool
) -> tuple[dict[str, _Found], dict[str, str]]:
    from cl_compiler.codegen.ring.backend import plan_group
    from cl_compiler.errors import CompilerError
    from cl_compiler.lang.ring import CLUSTER_SCHEDULES
    from cl_compiler.lang.sweeps import plan_sweeps
    from cl_compiler.plan.shards import largest_shard

    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    found: dict[str, _Found] = {}
    refused: dict[str, str] = {}
    for schedule in CLUSTER_SCHEDULES:
        asked = replace(request, schedule=schedule)
        try:
            of = _one(asked, sweeps, total, drawn_ranks, ranks)
        except CompilerError as error:
            refused[schedule] = str(error)
            continue
        if max_batch:
            of = replace(of, largest=largest_shard(asked, sweeps, plan_group) * request.group_size)
        found[schedule] = of
    return found, refused


def _one(
    asked: Request, sweeps: SweepPlan, total: int, drawn_ranks: int, ranks: Ranks | None
) -> _Found:
    """One schedule, planned and run.

    Raises:
        CompilerError: the loss or the ranks cannot use it.
    """
    from cl_compiler.codegen.ring.backend import plan_group
    from cl_compiler.errors import BudgetError
    from cl_compiler.plan.shards import shares_of_ranks
    from cl_compiler.plan.simulate import simulate as run

    hardware = asked.hardware
    if ranks is None:
        plan, program = plan_group(asked, sweeps)
        return _Found(plan, run(plan, program, hardware, drawn_ranks=drawn_ranks))
    speeds = ranks.relative_speeds
    shares = shares_of_ranks(asked, sweeps, total, ranks.speeds, ranks.budgets, plan_group)
    plan, program, rows = shares.plan, shares.program, shares.rows
    uneven = run(plan, program, hardware, speeds=speeds, shards=rows, drawn_ranks=drawn_ranks)
    try:
        plan, program = plan_group(asked, sweeps)
    except BudgetError:
        alone = run(plan, program, hardware, shards=rows, drawn_ranks=drawn_ranks)
        return _Found(plan, alone, None, uneven, shares)
    even = run(plan, program, hardware, speeds=speeds)
    return _Found(plan, run(plan, program, hardware, drawn_ranks=drawn_ranks), even, uneven, shares)


def _record(of: _Found) -> dict[str, Any]:
    record: dict[str, Any] = {
        "seconds": of.run.seconds,
        "forward_s": of.run.forward_s,
        "waiting_s": of.run.waiting_s,
        "peak_bytes": of.plan.peak_bytes,
        "sent_bytes": of.cluster.forward_bytes + of.cluster.backward_bytes,
        "chunk_rows": of.cluster.chunk,
        "hiding_rows": of.cluster.hiding_rows,
    }
    if of.uneven is not None and of.shares is not None:
        record |= {
            "advised_rows": list(of.shares.rows),
            "advised_shards_s": of.uneven.seconds,
            "even_shards_s": None if of.even is None else of.even.seconds,
            "peak_bytes_of_ranks": list(of.shares.peak_bytes),
            "memory_budget_bytes": of.shares.plan.peak_bytes,
        }
    return record if of.largest is None else record | {"max_batch": of.largest}


def _tables(asked: Request, found: dict[str, _Found]) -> tuple[Table, Table]:
    rows = []
    for name, of in found.items():
        sent = of.cluster.forward_bytes + of.cluster.backward_bytes
        row = (
            name,
            str(of.cluster.chunk),
            format_bytes(of.plan.peak_bytes),
            format_bytes(sent),
            format_seconds(of.run.forward_s),
            format_seconds(of.run.seconds),
            f"{of.run.waiting_s / of.run.seconds:.1%}",
        )
        rows.append(row if of.largest is None else (*row, f"{of.largest:,}"))
    columns: tuple[str, ...] = (
        "schedule", "chunk", "memory", "sent", "forward", "step", "waiting",
    )  # fmt: skip
    if any(of.largest is not None for of in found.values()):
        columns = (*columns, "largest batch")
    others = tuple((name, format_bytes(count)) for name, count in _others(asked))
    title = "\nwhat other losses take on one rank, by their formulas"
    return (
        Table("", columns, tuple(rows), frozenset(range(1, len(columns)))),
        Table(title, ("loss", "memory"), others, frozenset({1})),
    )


def _others(request: Request) -> list[tuple[str, int]]:
    from cl_compiler.plan.other_losses import dense_bytes, inf_cl_bytes, local_rows_bytes

    p, ranks = request.problem, request.group_size
    sizes = (p.M * ranks, p.D, ranks, 4)
    return [
        ("whole matrix on every rank (CLIP)", round(dense_bytes(*sizes))),
        ("rows of the matrix (OpenCLIP)", round(local_rows_bytes(*sizes))),
        ("Inf-CL", round(inf_cl_bytes(*sizes))),
    ]
