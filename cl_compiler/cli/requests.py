"""Text from the command line → the planner's ``Request``, without PyTorch.

A ``Question`` is what the options say; ``request_of`` reads it.  The request is the one that
``compile_loss`` would make; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import typer

from cl_compiler.cli.options import DEFAULT_PROBLEM

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec
    from cl_compiler.lang.ir import LossIR
    from cl_compiler.lang.resolve import Positives
    from cl_compiler.plan.types import DType, MemoryBudget, Problem, Request

__all__ = [
    "BUDGET_SHARE",
    "Question",
    "ask",
    "budget_of",
    "changed",
    "problem_of",
    "request_of",
]

BUDGET_SHARE = 0.25
"""Of the free memory, where no budget is given: what ``compile_loss`` takes."""
"""What ``compile_loss`` takes."""


@dataclass(frozen=True)
class Question:
    """What was asked for, as text; sizes of 0 are those of ``problem``."""

    hardware: str = "auto"
    budget: str | None = None
    loss: str = "clip"
    problem: str = DEFAULT_PROBLEM
    M: int = 0
    N: int = 0
    D: int = 0
    dtype: str = "float32"
    precision: str = "auto"
    schedule: str = "auto"
    positives: str = "auto"
    gradients: str = "auto"
    slots: int = 0
    bank: int = 0
    operands: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def ask(
    *,
    M: int | None,
    N: int | None,
    D: int | None,
    operands: list[str] | None,
    **texts: str | int | None,
) -> Question:
    """A question from a command's options.

    Raises:
        typer.BadParameter: a size or a width is not what its option takes.
    """
    for name, value in (("--M", M), ("--N", N), ("--D", D)):
        if value is not None and value < 1:
            raise typer.BadParameter(f"{name} {value}: sizes are at least 1")
    widths = {}
    for text in operands or ():
        name, _, width = text.partition("=")
        if not (name.isidentifier() and width.isdigit()):
            raise typer.BadParameter(f"--operand {text!r}: write its name and width, guide_x=384")
        widths[name] = int(width)
    return Question(M=M or 0, N=N or 0, D=D or 0, operands=widths, **texts)  # type: ignore[arg-type]


def changed(question: Question, changes: Iterable[str]) -> Question:
    """The question with some of its options replaced.

    Args:
        question: what is changed.
        changes: texts such as ``schedule=recompute``, named like the options.

    Raises:
        typer.BadParameter: there is no such option, or its value is no number.
    """
    values: dict[str, str | int] = {}
    names = {f.name for f in fields(Question)} - {"operands"}
    for text in changes:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--")
        if not equals or name not in names:
            raise typer.BadParameter(
                f"--diff {text!r}: write option=value with one of {', '.join(sorted(names))}"
            )
        is_number = isinstance(getattr(question, name), int)
        if is_number and not value.isdigit():
            raise typer.BadParameter(f"--diff {text!r}: {name} is a whole number")
        values[name] = int(value) if is_number else value
        if name == "problem":
            values |= {"M": 0, "N": 0, "D": 0}
    return replace(question, **values)  # type: ignore[arg-type]


def problem_of(question: Question) -> Problem:
    """The sizes that were asked for.

    Raises:
        typer.BadParameter: the text has no sizes.
        ArgumentError: the dtype is unknown.
    """
    from cl_compiler.plan.types import Problem

    numbers = re.split(r"\s*[xX*,]\s*", question.problem.strip())
    if len(numbers) not in (2, 3) or not all(re.fullmatch(r"\d[\d_]*", n) for n in numbers):
        raise typer.BadParameter(
            f"--problem {question.problem!r}: write MxNxD, such as {DEFAULT_PROBLEM}, or MxD"
        )
    rows, *_, features = sizes = [int(n) for n in numbers]
    cols = sizes[1] if len(sizes) == 3 else question.M or rows
    return Problem(
        question.M or rows,
        question.N or cols,
        question.D or features,
        cast("DType", question.dtype),
        operands=dict(question.operands),
        slots=question.slots,
        bank=question.bank,
    )


def budget_of(text: str | None, hardware: HardwareSpec, *, is_here: bool) -> MemoryBudget:
    """The budget that was asked for, or a share of the memory.

    Args:
        text: bytes, or device=…,host=….
        hardware: whose memory is shared out when nothing is asked for.
        is_here: the hardware is this machine, so what others use is not free.

    Raises:
        ArgumentError, BudgetError: the text is no budget.
    """
    from cl_compiler.hardware.cpu import free_memory_bytes
    from cl_compiler.plan.types import MemoryBudget

    if text is None:
        measured = is_here and hardware.kind == "cpu"
        free_bytes = free_memory_bytes() if measured else hardware.device_memory_bytes
        return MemoryBudget(max(1, rounded_down(int(free_bytes * BUDGET_SHARE))))
    if "=" not in text:
        return MemoryBudget.parse(text)
    parts = [part.partition("=") for part in text.split(",")]
    return MemoryBudget.parse({name.strip(): amount.strip() for name, _, amount in parts})


def rounded_down(count: int) -> int:
    """The count with its four leading bits alone.

    Free memory changes from one second to the next; a budget that did would make every command
    plan, and cache, something new.
    """
    shift = max(0, count.bit_length() - 4)
    return count >> shift << shift


def request_of(question: Question) -> Request:
    """Everything that a plan depends on.

    Raises:
        typer.BadParameter: an option's text cannot be read.
        CompilerError: what was asked for does not exist.
    """
    from cl_compiler.cli.user_loss import find_loss
    from cl_compiler.hardware import load_hardware
    from cl_compiler.plan.types import Request

    loss = find_loss(question.loss)
    hardware = load_hardware(question.hardware)
    problem = problem_of(question)
    positives = positives_of(question.positives, loss, problem)
    _check_sizes(problem, loss, positives)
    return Request(
        loss,
        hardware,
        budget_of(question.budget, hardware, is_here=question.hardware == "auto"),
        problem,
        positives,
        gradients_of(question.gradients, loss),
        precision_of(question.precision, problem, hardware),
        question.schedule,
    )


def precision_of(text: str, problem: Problem, hardware: HardwareSpec) -> str:
    """How similarities are multiplied: what ``compile_loss`` makes of its argument.

    Raises:
        typer.BadParameter: the templates do not multiply like that.
        CompilerError: these inputs, or this machine, have no such products.
    """
    from cl_compiler.plan.precision import PRECISIONS, products_of

    if text not in PRECISIONS:
        raise typer.BadParameter(f"--precision {text!r}: use one of {', '.join(PRECISIONS)}")
    return products_of(text, problem.dtype, hardware)


def _check_sizes(problem: Problem, loss: LossIR, positives: Positives) -> None:
    """Whether the sizes are those of something that the loss can be called with.

    Raises:
        typer.BadParameter: they are not.
    """
    if loss.is_single_set and problem.M != problem.N:
        raise typer.BadParameter(
            f"{loss.name} compares one set with itself, so M = N; got M={problem.M} N={problem.N}"
        )
    if loss.uses_positives and positives == "diagonal" and problem.M > problem.N:
        raise typer.BadParameter(
            f"row i's positive is column i, so N is at least M; got M={problem.M} N={problem.N}. "
            "With --positives ids any column may be positive"
        )
    unknown = set(problem.operands) - {op.name for op in loss.operands}
    if unknown:
        raise typer.BadParameter(f"--operand {', '.join(sorted(unknown))}: not in {loss.name}")
    axes = {axis for op in loss.operands for axis in op.axes}
    for axis, size in (("slots", problem.slots), ("bank", problem.bank)):
        if axis in axes and not size:
            raise typer.BadParameter(f"{loss.name} has {axis}: give their number with --{axis}")


def positives_of(text: str, loss: LossIR, problem: Problem) -> Positives:
    """Which pairs are positive; "auto" is what a call without ids has.

    Raises:
        typer.BadParameter: the loss has no such positives.
    """
    if loss.is_single_set:
        known: tuple[Positives, ...] = ("views", "ids")
    else:
        square = loss.uses_positives and problem.M == problem.N
        known = ("paired", "diagonal", "ids") if square else ("diagonal", "ids")
    if text == "auto":
        return known[0]
    for kind in known:
        if kind == text:
            return kind
    sizes = f"M={problem.M} N={problem.N}"
    raise typer.BadParameter(
        f"--positives {text!r}: {loss.name} at {sizes} takes {' or '.join(known)}"
    )


def gradients_of(text: str, loss: LossIR) -> frozenset[str]:
    """Names whose gradients are wanted.

    Raises:
        typer.BadParameter: the loss has nothing of that name.
    """
    known = {op.name for op in loss.operands if not op.stop} | set(loss.parameters)
    if text == "auto":
        return frozenset(known)
    if text == "none":
        return frozenset()
    inputs = {name for name, leaf in loss.leaves.items() if leaf.kind == "input"}
    wanted = frozenset(name.strip() for name in text.split(","))
    if not wanted <= known | inputs:
        missing = ", ".join(sorted(wanted - known - inputs))
        raise typer.BadParameter(
            f"--gradients {text!r}: {loss.name} has no {missing}; it has "
            f"{', '.join(sorted(known | inputs))}"
        )
    return wanted
