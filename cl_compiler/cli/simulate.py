"""``cl-compiler simulate``: a loss on a cluster that need not exist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table
from cl_compiler.cli.requests import ask, request_of
from cl_compiler.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from cl_compiler.plan.simulate import Run
    from cl_compiler.plan.types import Plan, Request

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
    json: opt.Json = False,
) -> None:
    """Run every cluster schedule of a loss on a described cluster, event by event.

    The problem is that of all ranks together, spread evenly. Seconds rest on the rates of the
    preset, or of `cl-compiler calibrate`.
    """
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=None, N=None, D=None,
        dtype=dtype, precision=precision, schedule="auto", positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    with working("simulating", ["plans", "events"]) as step:
        step()
        asked = _on_ranks(request_of(question), ranks)
        step()
        found, refused = _simulated(asked, 0 if gantt is None else _GANTT_RANKS)
    best = min(found, key=lambda name: found[name][1].seconds) if found else ""
    if gantt is not None and best:
        draw(found[best][1], f"{loss} on {asked.hardware.name}: {best}", gantt)
    if json:
        write_json(
            {
                "hardware": asked.hardware.name,
                "ranks": asked.group_size,
                "fastest": best or None,
                "schedules": {name: _record(*pair) for name, pair in found.items()},
                "refused": refused,
                "other_losses_bytes": dict(_others(asked)),
            }
        )
        return
    share = asked.problem
    write(
        f"{loss} on {asked.hardware.name}: {asked.group_size} ranks with shards of "
        f"{share.M} x {share.N}, D={share.D} {share.dtype}\n"
    )
    write_table(_table(found))
    for name, why in refused.items():
        write(f"not {name}: {why}")
    if best:
        cluster = found[best][0].cluster
        assert cluster is not None
        hides = f"from {cluster.hiding_rows} rows per rank on" if cluster.hiding_rows else "-"
        write(f"\nfastest: {best}, bound by {found[best][1].bound_by}; hides its exchange {hides}")
        rows = tuple((name, format_bytes(count)) for name, count in _others(asked))
        title = "\nwhat other losses take on one rank, by their formulas"
        write_table(Table(title, ("loss", "memory"), rows, frozenset({1})))


def _on_ranks(request: Request, ranks: int) -> Request:
    """The request of one rank of the cluster."""
    from cl_compiler.hardware.ranks import one_device, with_ranks

    hardware = request.hardware
    if ranks:
        if ranks < 1:
            raise typer.BadParameter(f"--ranks {ranks}: give at least 1")
        hardware = with_ranks(one_device(hardware), ranks, ranks)
    count = hardware.world_size
    m, n = (-(-length // count) for length in (request.problem.M, request.problem.N))
    return replace(
        request,
        hardware=hardware,
        problem=replace(request.problem, M=m, N=n),
        precision="ieee" if request.precision == "bf16x3" else request.precision,
        group_size=count,
    )


def _simulated(
    request: Request, drawn_ranks: int
) -> tuple[dict[str, tuple[Plan, Run]], dict[str, str]]:
    from cl_compiler.errors import CompilerError
    from cl_compiler.lang.ring import CLUSTER_SCHEDULES
    from cl_compiler.lang.sweeps import plan_sweeps
    from cl_compiler.plan.cluster import choose_cluster_plan
    from cl_compiler.plan.simulate import simulate as run

    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    found: dict[str, tuple[Plan, Run]] = {}
    refused: dict[str, str] = {}
    for schedule in CLUSTER_SCHEDULES:
        try:
            plan, program = choose_cluster_plan(replace(request, schedule=schedule), sweeps)
        except CompilerError as error:
            refused[schedule] = str(error)
            continue
        found[schedule] = plan, run(plan, program, request.hardware, drawn_ranks=drawn_ranks)
    return found, refused


def _record(plan: Plan, run: Run) -> dict[str, Any]:
    assert plan.cluster is not None
    return {
        "seconds": run.seconds,
        "forward_s": run.forward_s,
        "waiting_s": run.waiting_s,
        "peak_bytes": plan.peak_bytes,
        "sent_bytes": plan.cluster.forward_bytes + plan.cluster.backward_bytes,
        "chunk_rows": plan.cluster.chunk,
        "hiding_rows": plan.cluster.hiding_rows,
    }


def _table(found: dict[str, tuple[Plan, Run]]) -> Table:
    rows = []
    for name, (plan, run) in found.items():
        assert plan.cluster is not None
        sent = plan.cluster.forward_bytes + plan.cluster.backward_bytes
        rows.append(
            (
                name,
                str(plan.cluster.chunk),
                format_bytes(plan.peak_bytes),
                format_bytes(sent),
                format_seconds(run.forward_s),
                format_seconds(run.seconds),
                f"{run.waiting_s / run.seconds:.1%}",
            )
        )
    columns = ("schedule", "chunk", "memory", "sent", "forward", "step", "waiting")
    return Table("", columns, tuple(rows), frozenset(range(1, 7)))


def _others(request: Request) -> list[tuple[str, int]]:
    from cl_compiler.plan.other_losses import dense_bytes, inf_cl_bytes, local_rows_bytes

    p, ranks = request.problem, request.group_size
    sizes = (p.M * ranks, p.D, ranks, 4)
    return [
        ("whole matrix on every rank (CLIP)", round(dense_bytes(*sizes))),
        ("rows of the matrix (OpenCLIP)", round(local_rows_bytes(*sizes))),
        ("Inf-CL", round(inf_cl_bytes(*sizes))),
    ]


def draw(run: Run, title: str, path: Path) -> None:
    """A Gantt chart: three lines a rank, for products, sends and waiting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = {"compute": "#2f6ea5", "send": "#7fb069", "gradient": "#c0622b", "wait": "#d0d3d8"}
    ranks = 1 + max((e.rank for e in run.events), default=0)
    figure = Figure(figsize=(10, 1.2 + 0.5 * ranks))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for what, colour in colours.items():
        bars = [e for e in run.events if e.what == what]
        lane = {"compute": 0.0, "wait": 0.0}.get(what, 0.45)
        axes.barh(
            [e.rank + lane for e in bars],
            [1e3 * (e.end_s - e.start_s) for e in bars],
            left=[1e3 * e.start_s for e in bars],
            height=0.4,
            color=colour,
            label=what,
        )
    axes.set(xlabel="ms", ylabel="rank", title=title)
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize=7)
    figure.savefig(path, dpi=150, bbox_inches="tight")
