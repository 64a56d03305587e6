"""``cl-compiler compile``: a loss into the cache, and into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import working, write, write_json
from cl_compiler.cli.ranks import on_its_ranks
from cl_compiler.cli.requests import Question, ask, request_of

if TYPE_CHECKING:
    from cl_compiler.cache import Entry

__all__ = ["compile_", "compile_question", "save"]


def compile_(
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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the source here.", show_default=False),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Compile a loss ahead of time, into the cache that `compile_loss` looks in.

    The file needs nothing but PyTorch: with --out it can be copied into another project. Nothing is
    executed, so this works without PyTorch and for machines that are elsewhere.
    """
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, deterministic=deterministic, positives=positives,
        gradients=gradients, slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    entry = compile_question(question)
    if out is not None:
        save(entry.source, out)
    path = None if entry.path is None else str(entry.path)
    if json:
        write_json({"path": path, "cached": entry.hit, "plan": dict(entry.plan)})
        return
    write(
        f"{'already compiled' if entry.hit else 'compiled'}: "
        f"{path or 'in memory only, as the cache is not used'}"
    )
    for note in entry.plan["notes"]:
        write(f"note: {note}")
    if out is not None:
        write(f"written: {out}")


def compile_question(question: Question) -> Entry:
    """The variant that answers a question: from the cache, or compiled into it; not executed.

    Raises:
        typer.BadParameter: an option's text cannot be read.
        CompilerError: there is no such variant; the message says why.
    """
    with working("compiling", ("the machine and the loss", "plan, program and text")) as step:
        step()
        from cl_compiler.variants import fetch_variant

        request = on_its_ranks(request_of(question))
        step()
        return fetch_variant(request)


def save(text: str, path: Path) -> None:
    """Write generated text where the user wants it.

    Raises:
        typer.BadParameter: it cannot be written there.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
