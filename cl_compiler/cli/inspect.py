"""``cl-compiler inspect``: generated source, two plans side by side, pictures of the graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import working, write, write_code, write_json, write_table
from cl_compiler.cli.ranks import on_its_ranks
from cl_compiler.cli.requests import Question, ask, changed, check_path, refuse_others, request_of

if TYPE_CHECKING:
    from cl_compiler.plan.types import Plan, Request

__all__ = ["inspect"]

_PICTURES = (".png", ".svg", ".pdf")


def inspect(
    ctx: typer.Context,
    variant: Annotated[
        str,
        typer.Argument(
            metavar="VARIANT",
            help="A name from `cl-compiler cache list`; without one, what the options ask for.",
            show_default=False,
        ),
    ] = "",
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
    diff: Annotated[
        list[str] | None,
        typer.Option(
            "--diff",
            help="Compare with another plan: option=value, such as schedule=recompute or "
            "budget=1GiB. May be repeated; all of them make the one other plan.",
        ),
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(
            "--graph",
            help="Draw the loss graph to this .png, .svg or .pdf, and the hardware graph with the "
            "plan's tiles beside it (NAME-hardware).",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Show generated source, compare two plans, or draw the graphs.

    Works for every preset, without a GPU; nothing is executed.
    """
    if variant:
        refuse_others(ctx, {"variant", "json"}, f"{variant} is in the cache and shown as it is")
        _show_cached(variant, json)
        return
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, deterministic=deterministic, positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    other = changed(question, diff) if diff else None
    shown: dict[str, Any] = {}
    if graph is not None:
        shown |= _draw(question, graph, json)
    if other is not None:
        shown |= _compare(question, other, json)
    elif graph is None:
        shown |= _show(question, json)
    if json:
        write_json(shown)


def _show(question: Question, json: bool) -> dict[str, Any]:
    from cl_compiler.plan.record import plan_to_json

    plan, name, source = _generate(question)
    if not json:
        write_code(source, "python")
    return {"name": name, "plan": plan_to_json(plan), "source": source}


def _generate(question: Question) -> tuple[Plan, str, str]:
    """(plan, name, source): rendered here, and neither executed nor kept."""
    with working("generating", ("the machine and the loss", "plan, program and text")) as step:
        from cl_compiler.plan.record import plan_from_json
        from cl_compiler.variants import build_variant, key_of

        step()
        request = on_its_ranks(request_of(question))
        described, key = key_of(request)
        step()
        built = build_variant(request, described, key.variant)
        return plan_from_json(built.plan), built.name, built.source


def _show_cached(variant: str, json: bool) -> None:
    from cl_compiler.cache import list_entries

    found = [e for e in list_entries() if variant in (f"{e.loss}-{e.digest}", e.digest)]
    if not found:
        raise typer.BadParameter(
            f"{variant}: no such variant in the cache; `cl-compiler cache list` names all of them"
        )
    folder = found[0].path
    source = (folder / "kernels.py").read_text(encoding="utf-8")
    if json:
        import json as text

        plan = text.loads((folder / "plan.json").read_text(encoding="utf-8"))
        write_json({"name": folder.name, "plan": plan, "source": source})
    else:
        write_code(source, "python")


def _compare(question: Question, other: Question, json: bool) -> dict[str, Any]:
    from cl_compiler.cli.diff import difference_table, source_diff
    from cl_compiler.plan.record import plan_to_json

    before, name, source = _generate(question)
    after, other_name, other_source = _generate(other)
    changes = source_diff((name, source), (other_name, other_source))
    if not json:
        write_table(difference_table(before, after))
        write_code(changes, "diff")
    return {
        "before": {"name": name, "plan": plan_to_json(before)},
        "after": {"name": other_name, "plan": plan_to_json(after)},
        "source_diff": changes,
    }


def _draw(question: Question, path: Path, json: bool) -> dict[str, Any]:
    check_path("--graph", path, _PICTURES)
    hardware_path = path.with_stem(f"{path.stem}-hardware")
    with working("drawing", ("plan", "loss graph", "hardware graph")) as step:
        from cl_compiler.cli.draw import draw_loss_graph
        from cl_compiler.cli.draw_hardware import draw_hardware_graph
        from cl_compiler.codegen.backend import plan_of
        from cl_compiler.hardware.graph import hardware_graph
        from cl_compiler.lang.graph import loss_graph
        from cl_compiler.lang.sweeps import plan_sweeps

        step()
        request: Request = on_its_ranks(request_of(question))
        sweeps = plan_sweeps(request.loss, request.positives, request.needs)
        machine = hardware_graph(request.hardware)
        chosen = plan_of(request, sweeps)
        step()
        draw_loss_graph(loss_graph(sweeps), request.problem, path)
        step()
        draw_hardware_graph(machine, chosen, hardware_path)
    if not json:
        write(f"loss graph: {path}\nhardware graph: {hardware_path}")
    return {"loss_graph": str(path), "hardware_graph": str(hardware_path)}
