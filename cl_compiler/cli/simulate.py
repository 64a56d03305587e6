"""``cl-compiler simulate``: a loss on a cluster that need not exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, in_options, working, write, write_json, write_table
from cl_compiler.cli.ranks import (
    Budgets,
    Ranks,
    Speeds,
    if_left_out,
    in_words,
    on_ranks,
    ranks_of,
    step_of,
    table_of,
)
from cl_compiler.cli.requests import ask, check_path, request_of
from cl_compiler.cli.simulate_report import GANTT_SUFFIXES, draw, write_page
from cl_compiler.cli.simulate_runs import Found, simulated, steps
from cl_compiler.errors import instead_of
from cl_compiler.units import exact_bytes, format_bytes, format_seconds

if TYPE_CHECKING:
    from cl_compiler.errors import CompilerError
    from cl_compiler.plan.types import Request

__all__ = ["simulate"]

_GANTT_RANKS = 8


def simulate(
    hardware: opt.Hardware = "h100x8",
    budget: opt.Budget = None,
    loss: opt.Loss = "clip",
    problem: opt.ProblemText = opt.DEFAULT_PROBLEM,
    dtype: opt.DType = opt.DEFAULT_DTYPE,
    precision: opt.Precision = "auto",
    positives: opt.Positives = "auto",
    gradients: opt.Gradients = "auto",
    slots: opt.Slots = 0,
    bank: opt.Bank = 0,
    operand: opt.Widths = None,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            "-s",
            help="auto (each of them), or only ring_owner, ring_travel, all_gather, two_level, "
            "half_ring, both_ways or host.",
        ),
    ] = "auto",
    ranks: Annotated[
        int,
        typer.Option(
            "--ranks",
            help="So many of the named device, on one machine. [default: as the hardware says]",
            show_default=False,
        ),
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
        bool, typer.Option("--max-batch", help="Also the largest batch of each within the budget.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also the plan of the fastest: memory, links, tiles, why."),
    ] = False,
    json: opt.Json = False,
) -> None:
    """Run every cluster schedule of a loss on a described cluster, event by event.

    The problem is that of all ranks together, spread evenly, or as --speeds and --budgets advise.
    Seconds rest on the preset's rates, or on those that a calibration measured.
    """
    from cl_compiler.lang.ring import CANONICAL, CLUSTER_SCHEDULES
    from cl_compiler.plan.shards import fastest

    if schedule not in ("auto", *CLUSTER_SCHEDULES):
        known = instead_of(schedule, ["auto", *CLUSTER_SCHEDULES])
        why = " is not simulated" if schedule == CANONICAL else ""
        raise typer.BadParameter(f"--schedule {schedule!r}{why}: {known}")
    schedules = CLUSTER_SCHEDULES if schedule == "auto" else (schedule,)
    if gantt is not None:
        check_path("--gantt", gantt, GANTT_SUFFIXES)
    if page is not None:
        check_path("--html", page, (".html", ".htm"))
    differing = ranks_of(speeds, budgets, budget)
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=None, N=None, D=None,
        dtype=dtype, precision=precision, schedule="auto", positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    with working("simulating", steps(schedules, max_batch)) as step:
        step()
        whole = request_of(question)
        asked = replace(on_ranks(whole, ranks, differing), schedule=schedule)
        if asked.group_size == 1:
            raise typer.BadParameter(
                f"{asked.hardware.name} is one rank: nothing is exchanged; use `cl-compiler plan`, "
                "or give --ranks 2 or more"
            )
        found, refused = simulated(
            asked,
            schedules,
            whole.problem.M,
            0 if gantt is None and page is None else _GANTT_RANKS,
            differing,
            max_batch,
            step,
        )
    if not found:
        raise _nothing(asked, refused)
    best = fastest({name: of.run.seconds for name, of in found.items()})
    short = dict(found[best].cluster.rejected)
    reasons = {name: short.get(name, _in_short(why)) for name, why in refused.items()}
    title = f"{loss} on {asked.hardware.name}"
    if gantt is not None:
        draw(found[best].run, f"{title}: {best}", gantt)
    if json:
        _write_json(asked, found, reasons, best)
    else:
        write(f"{title}: {_shards(asked, whole.problem.M, differing)}\n")
        _write_text(asked, found, reasons, best, differing, whole.problem.M)
        if explain:
            from cl_compiler.plan.report import explain as in_tables

            of = found[best]
            step_text = step_of(of.run.seconds, of.plan, differing)
            write(in_options(f"\n{in_tables(of.plan, step_text)}"))
    if page is not None:
        notes = _not_taken(reasons)
        notes += [_fastest(found, best), *_thrifty(found, best)]
        notes += [_in_rows(best, found[best])] if differing is not None else []
        runs = [(name, of.run) for name, of in found.items()]
        shards = _shards(asked, whole.problem.M, differing)
        write_page(page, f"{title}: {shards}", _tables(asked, found), notes, runs)


def _write_json(
    asked: Request,
    found: dict[str, Found],
    refused: dict[str, str],
    best: str,
) -> None:
    shares = found[best].shares
    write_json(
        {
            "hardware": asked.hardware.name,
            "ranks": asked.group_size,
            "fastest": best,
            "schedules": {name: _record(of) for name, of in found.items()},
            "refused": refused,
            "other_losses_bytes": dict(_others(asked)),
            **({} if shares is None else {"advised_rows": list(shares.rows)}),
        }
    )


def _write_text(
    asked: Request,
    found: dict[str, Found],
    refused: dict[str, str],
    best: str,
    ranks: Ranks | None,
    total: int,
) -> None:
    from cl_compiler.lang.sweeps import plan_sweeps

    schedules, others = _tables(asked, found)
    write_table(schedules)
    for line in _not_taken(refused):
        write(line)
    of = found[best]
    if refused:
        write("")
    write(_fastest(found, best))
    for line in _thrifty(found, best):
        write(line)
    if ranks is not None and of.shares is not None:
        write(_in_rows(best, of))
        if ranks.budgets:
            asks = exact_bytes(of.plan.peak_bytes)
            write(f"memory_budget of all of them, so that each keeps within its own: {asks}\n")
            columns = ("ranks", "speed", "rows", "memory", "budget")
            rows = tuple(table_of(ranks, of.shares))
            write_table(Table("", columns, rows, frozenset(range(1, 5))))
            sweeps = plan_sweeps(asked.loss, asked.positives, asked.needs)
            write(if_left_out(asked, sweeps, total, ranks, of.run.seconds))
    write_table(others)


def _in_short(why: CompilerError) -> str:
    """Of schedules that do not fit, what each of them needs; its own words otherwise."""
    from cl_compiler.errors import BudgetError

    if isinstance(why, BudgetError) and why.least_bytes:
        needed = format_bytes(why.least_bytes)
        return f"needs at least {needed} on each rank: --budget {why.least_bytes}"
    return in_options(str(why))


def _not_taken(reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with all schedules that it is one for."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"not {', '.join(of)}: {why}" for why, of in names.items()]


def _nothing(asked: Request, refused: dict[str, CompilerError]) -> CompilerError:
    """Why there is no schedule, each by its own reason."""
    from cl_compiler.errors import BudgetError, ScheduleError

    if len(refused) == 1:
        return next(iter(refused.values()))
    short = any(isinstance(why, BudgetError) for why in refused.values())
    reasons = "\n".join(_not_taken({name: _in_short(why) for name, why in refused.items()}))
    kind = BudgetError if short else ScheduleError
    return kind(f"{asked.loss.name} on {asked.hardware.name} has no schedule:\n{reasons}")


def _shards(asked: Request, total: int, ranks: Ranks | None) -> str:
    share = asked.problem
    sizes = f"shards of {share.M} x {share.N}"
    if ranks is not None:
        sizes = f"shards, as they are advised, of {total} rows in all"
    return f"{asked.group_size} ranks with {sizes}, D={share.D} {share.dtype}"


def _in_rows(name: str, of: Found) -> str:
    """The rows that are advised, and what even shards would take."""
    assert of.shares is not None
    even = "even shards do not fit"
    if of.even is not None:
        even = f"{format_seconds(of.even.seconds)} with even shards"
    seconds, rows = format_seconds(of.run.seconds), in_words(of.shares.rows)
    return f"ranks that differ: {name} takes {seconds} with rows {rows}; {even}"


def _fastest(found: dict[str, Found], best: str) -> str:
    """What bounds the schedule that takes least time, or the one that there is."""
    of, title = found[best], f"fastest: {best}, " if len(found) > 1 else f"{best}: "
    hides = f"from {of.cluster.hiding_rows} rows per rank on" if of.cluster.hiding_rows else "-"
    return f"{title}bound by {_bound(of)}; hides its exchange {hides}"


def _bound(of: Found) -> str:
    """What bounds a schedule; of computing, what most of it is, by the plan."""
    from cl_compiler.plan.cluster import NOT_HIDDEN
    from cl_compiler.plan.simulate import COMPUTING

    parts = {what: s for what, s in of.plan.seconds_by_part if what != NOT_HIDDEN}
    if of.run.bound_by != COMPUTING or not parts:
        return of.run.bound_by
    most = max(parts, key=lambda what: parts[what])
    return f"{COMPUTING} ({parts[most] / sum(parts.values()):.0%} {most})"


def _thrifty(found: dict[str, Found], best: str) -> list[str]:
    """A line about a schedule that takes far less memory and little more time, if there is one."""
    from cl_compiler.plan.thrift import Cost, thrifty, told

    costs = {
        name: Cost(of.peak_bytes, of.run.seconds)
        for name, of in found.items()
        if not of.cluster.inputs_in_host
    }
    name = thrifty(costs, best) if best in costs else None
    if name is None:
        return []
    return [told(name, costs[name], costs[best], f"compile_loss(…, schedule={name!r})")]


def _record(of: Found) -> dict[str, Any]:
    record: dict[str, Any] = {
        "seconds": of.run.seconds,
        "forward_s": of.run.forward_s,
        "waiting_s": of.run.waiting_s,
        "peak_bytes": of.peak_bytes,
        "sent_bytes": of.sent_bytes,
        "chunk_rows": of.cluster.chunk,
        "hiding_rows": of.cluster.hiding_rows,
    }
    if of.shares is not None:
        record |= {
            "advised_rows": list(of.shares.rows),
            "advised_shards_s": of.run.seconds,
            "even_shards_s": None if of.even is None else of.even.seconds,
            "peak_bytes_of_ranks": list(of.shares.peak_bytes),
            "memory_budget_bytes": of.shares.plan.peak_bytes,
        }
    return record if of.largest is None else record | {"max_batch": of.largest}


def _tables(asked: Request, found: dict[str, Found]) -> tuple[Table, Table]:
    rows = []
    for name, of in found.items():
        row = [
            name,
            str(of.cluster.chunk),
            format_bytes(of.peak_bytes),
            format_bytes(of.sent_bytes),
            format_seconds(of.run.forward_s),
            format_seconds(of.run.seconds),
            f"{of.run.waiting_s / of.run.seconds:.1%}",
        ]
        if of.shares is not None:
            row.append("does not fit" if of.even is None else format_seconds(of.even.seconds))
        rows.append(tuple(row if of.largest is None else [*row, f"{of.largest:,}"]))
    columns = ["schedule", "chunk", "memory", "sent", "forward", "step", "waiting"]
    differ = any(of.shares is not None for of in found.values())
    if differ:
        columns.append("step, even shards")
    if any(of.largest is not None for of in found.values()):
        columns.append("largest batch")
    others = tuple((name, format_bytes(count)) for name, count in _others(asked))
    title = "\nwhat other losses take on one rank in float32, by their formulas"
    if asked.problem.dtype != "float32":
        title += f" (ours above: {asked.problem.dtype})"
    return (
        Table("", tuple(columns), tuple(rows), frozenset(range(1, len(columns)))),
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
