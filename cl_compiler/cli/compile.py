"""``cl-compiler compile``: a loss into the cache, and into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import working, write, write_json
from cl_compiler.cli.requests import Question, ask, request_of

if TYPE_CHECKING:
    from cl_compiler.runtime.function import LoadedVariant

__all__ = ["compile_", "compile_question", "save"]


def compile_(
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
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the source here.", show_default=False),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Compile a loss ahead of time, into the cache that `compile_loss` looks in.

    The file needs nothing but PyTorch: with --out it can be copied into another project.
    """
    question = ask(
        hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D, dtype=dtype,
        precision=precision, schedule=schedule, positives=positives, gradients=gradients,
        slots=slots, bank=bank, operands=operand,
    )  # fmt: skip
    variant = compile_question(question)
    if out is not None:
        save(variant.source, out)
    if json:
        from cl_compiler.plan.record import plan_to_json

        described = {"path": variant.source_path, "cached": variant.cached}
        write_json({**described, "plan": plan_to_json(variant.plan)})
        return
    found = "already compiled" if variant.cached else "compiled"
    write(f"{found}: {variant.source_path or 'in memory only, the cache cannot be used'}")
    if out is not None:
        write(f"written: {out}")


def compile_question(question: Question) -> LoadedVariant:
    """The variant that answers a question: from the cache, or compiled into it.

    Raises:
        typer.BadParameter: an option's text cannot be read.
        CompilerError: there is no such variant; the message says why.
    """
    steps = ("PyTorch", "the machine and the loss", "plan, program and text")
    with working("compiling", steps) as step:
        step()
        from cl_compiler.api import Specialiser
        from cl_compiler.runtime.function import CallSignature

        step()
        request = request_of(question)
        sizes = request.problem
        call = CallSignature(
            M=sizes.M,
            N=sizes.N,
            D=sizes.D,
            dtype=sizes.dtype,
            widths=tuple(sorted(sizes.operands.items())),
            slots=sizes.slots,
            bank=sizes.bank,
            positives=request.positives,
            needs=request.needs,
        )
        specialise = Specialiser(
            request.loss, request.hardware, request.budget, request.precision, request.schedule
        )
        step()
        return specialise(call)


def save(text: str, path: Path) -> None:
    """Write generated text where the user wants it.

    Raises:
        typer.BadParameter: it cannot be written there.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
