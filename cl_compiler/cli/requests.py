"""Text from the command line → the planner's ``Request``, without PyTorch.

A ``Question`` is what the options say; ``request_of`` reads it.  The request is the one that
``compile_loss`` would make; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import typer

from cl_compiler.cli.options import DEFAULT_DTYPE, DEFAULT_PROBLEM
from cl_compiler.cli.output import in_options
from cl_compiler.errors import ArgumentError, CompilerError, instead_of

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec
    from cl_compiler.lang.ir import LossIR
    from cl_compiler.lang.resolve import Positives
    from cl_compiler.plan.types import DType, MemoryBudget, Problem, Request

__all__ = [
    "Question",
    "ask",
    "budget_of",
    "changed",
    "check_path",
    "hardware_of",
    "problem_of",
    "reading",
    "refuse_others",
    "request_of",
]


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
    dtype: str = DEFAULT_DTYPE
    precision: str = "auto"
    schedule: str = "auto"
    deterministic: bool = False
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


def refuse_others(ctx: typer.Context, read: Collection[str], why: str) -> None:
    """Refuse options that were given and would not be looked at.

    Args:
        ctx: of the command.
        read: names of the parameters that are.
        why: what is done instead.

    Raises:
        typer.BadParameter: there are such options.
    """
    given = [
        max(parameter.opts, key=len)
        for parameter in ctx.command.params
        if parameter.name not in read
        and getattr(ctx.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(f"{why}: leave out {', '.join(given)}, which would have no effect")


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
        values[name] = _read(value, type(getattr(question, name)), f"--diff {text!r}: {name}")
        if name == "problem":
            values |= {"M": 0, "N": 0, "D": 0}
    return replace(question, **values)  # type: ignore[arg-type]


def _read(text: str, kind: type, what: str) -> str | int:
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is bool:
        raise typer.BadParameter(f"{what} is true or false")
    if kind is int and not text.isdigit():
        raise typer.BadParameter(f"{what} is a whole number")
    return int(text) if kind is int else text


def check_path(option: str, path: Path, suffixes: Collection[str] = ()) -> None:
    """Refuse a file that could not be written, before the work.

    Args:
        option: that names it.
        path: of the file.
        suffixes: those that say how it is written; none where any will do.

    Raises:
        typer.BadParameter: its suffix is another one, it is a folder, or its folder is missing.
    """
    if suffixes and path.suffix not in suffixes:
        raise typer.BadParameter(f"{option} {path}: the suffix is one of {', '.join(suffixes)}")
    if path.is_dir():
        raise typer.BadParameter(f"{option} {path}: this is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no such folder")


@contextmanager
def reading(option: str) -> Iterator[None]:
    """What the compiler says about an option's value is about the command line: exit code 2.

    Raises:
        typer.BadParameter: the compiler raised an error; it says the same in the words of options.
    """
    try:
        yield
    except CompilerError as error:
        text = in_options(str(error))
        said = text if text.startswith("--") or not option else f"{option}: {text}"
        raise typer.BadParameter(said) from error


def hardware_of(text: str) -> HardwareSpec:
    """The machine that was asked for.

    Raises:
        typer.BadParameter: there is none of that name, or its file is no description of one.
    """
    from cl_compiler.hardware import load_hardware

    with reading("--hardware"):
        return load_hardware(text)


def problem_of(question: Question) -> Problem:
    """The sizes that were asked for.

    Raises:
        typer.BadParameter: the text has no sizes, or the dtype is unknown.
    """
    from cl_compiler.plan.types import Problem, parse_sizes

    with reading("--problem"):
        rows, *_, features = sizes = parse_sizes(question.problem)
        if min(sizes) < 1:
            raise ArgumentError(f"{question.problem} has a size of 0; sizes are at least 1.")
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
        typer.BadParameter: the text is no budget.
    """
    from cl_compiler.hardware.cpu import free_memory_bytes
    from cl_compiler.plan.types import MemoryBudget

    if text is None:
        measured = is_here and hardware.kind == "cpu"
        return MemoryBudget.share_of(
            free_memory_bytes() if measured else hardware.device_memory_bytes
        )
    with reading("--budget"):
        if "=" not in text:
            return MemoryBudget.parse(text)
        parts = [part.partition("=") for part in text.split(",")]
        return MemoryBudget.parse({name.strip(): amount.strip() for name, _, amount in parts})


def request_of(question: Question) -> Request:
    """Everything that a plan depends on; of several devices, of what all of them do together.

    Raises:
        typer.BadParameter: an option's text cannot be read, or names nothing.
        CompilerError: what was asked for is impossible.
    """
    from cl_compiler.cli.user_loss import find_loss
    from cl_compiler.lang.program import SCHEDULES
    from cl_compiler.lang.ring import CLUSTER_SCHEDULES
    from cl_compiler.plan.problems import check_problem
    from cl_compiler.plan.types import Request

    loss = find_loss(question.loss)
    hardware = hardware_of(question.hardware)
    problem = problem_of(question)
    positives = positives_of(question.positives, loss, problem)
    with reading(""):
        check_problem(problem, loss, positives)
    schedules = SCHEDULES if hardware.world_size == 1 else CLUSTER_SCHEDULES
    if question.schedule not in ("auto", *schedules):
        raise typer.BadParameter(
            f"--schedule {question.schedule!r} on {hardware.name}: "
            f"{instead_of(question.schedule, ['auto', *schedules])}"
        )
    return Request(
        loss,
        hardware,
        budget_of(question.budget, hardware, is_here=question.hardware == "auto"),
        problem,
        positives,
        gradients_of(question.gradients, loss),
        precision_of(question.precision, problem, hardware),
        question.schedule,
        deterministic=question.deterministic,
    )


def precision_of(text: str, problem: Problem, hardware: HardwareSpec) -> str:
    """How similarities are multiplied: what ``compile_loss`` makes of its argument.

    Raises:
        typer.BadParameter: the templates do not multiply like that.
        CompilerError: these inputs, or this machine, have no such products.
    """
    from cl_compiler.plan.precision import PRECISIONS, products_of

    if text not in PRECISIONS:
        raise typer.BadParameter(f"--precision {text!r}: {instead_of(text, PRECISIONS)}")
    return products_of(text, problem.dtype, hardware)


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
