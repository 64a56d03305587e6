"""``cl-compiler bench``: a compiled loss beside the dense formula, at the user's size.

The compact sibling of ``python -m benchmarks.cpu``, which lives in the repository only: this one
works wherever the package is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, bytes_or_dash, working, write, write_json, write_table
from cl_compiler.cli.requests import refuse_others
from cl_compiler.errors import HardwareError

if TYPE_CHECKING:
    from torch import Tensor

    from cl_compiler.hardware.spec import HardwareSpec
    from cl_compiler.lang.ir import LossIR
    from cl_compiler.plan.types import MemoryBudget, Problem
    from cl_compiler.runtime.function import CompiledLoss
    from cl_compiler.runtime.measure import Timing

__all__ = ["Comparison", "Row", "bench", "compare", "step_of"]

PARAMETERS: Mapping[str, float] = {"logit_scale": 1 / 0.07, "logit_bias": -10.0}
"""What CLIP and SigLIP start from; any other parameter of a loss starts from 1."""


@dataclass(frozen=True)
class Row:
    """One alternative.

    Attributes:
        seconds: median per forward and backward; None if it could not run.
        seconds_all: every repetition.
        live_bytes: peak of live tensors, inputs not included.
        process_bytes: growth of the process's high-water mark.
        error: why it could not run.
    """

    name: str
    seconds: float | None
    seconds_all: tuple[float, ...]
    live_bytes: int | None
    process_bytes: int | None
    error: str = ""


@dataclass(frozen=True)
class Comparison:
    """What was measured, beside what was predicted.

    Attributes:
        clock: "cpu" for one thread, "wall" for several.
        planned_threads: that the machine's description, and so the prediction, stands for.
        largest_error: of the gradients, against the dense baseline's, relative.
    """

    loss: str
    M: int
    N: int
    D: int
    dtype: str
    threads: int
    clock: str
    schedule: str
    tile: str
    budget_bytes: int
    predicted_bytes: int
    predicted_seconds: float
    planned_threads: int
    largest_error: float | None
    disturbed: str
    rows: tuple[Row, ...]

    @property
    def dense(self) -> Row:
        return self.rows[0]

    @property
    def compiled(self) -> Row:
        return self.rows[1]


def bench(
    ctx: typer.Context,
    hardware: opt.Hardware = "auto",
    budget: opt.Budget = None,
    loss: opt.Loss = "clip",
    problem: opt.ProblemText = "4096x4096x512",
    M: opt.Rows = None,
    N: opt.Cols = None,
    D: opt.Features = None,
    dtype: opt.DType = opt.DEFAULT_DTYPE,
    precision: opt.Precision = "auto",
    schedule: opt.Schedule = "auto",
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            "-t",
            min=1,
            help="Of PyTorch. [default: all of its threads]",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", "-r", min=1, help="Repetitions of each, interleaved.")
    ] = 5,
    compare_files: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Measure nothing: show FILES of the repository's benchmarks as tables, ratios, "
            "a verdict and figures.",
        ),
    ] = False,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Results files, with --compare.", metavar="[FILES]..."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the figures. [default: beside the first file]",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Measure a compiled loss and the dense formula side by side: forward and backward.

    Losses without such a formula, your own among them, are compared with the reference: what their
    maths says, evaluated densely in float64.

    One thread is timed in CPU time, several in wall time. Memory is what a step takes beyond its
    inputs, gradients included.
    """
    if compare_files or files or out is not None:
        if compare_files:
            read = {"compare_files", "files", "out"}
            refuse_others(ctx, read, "--compare shows files and measures nothing")
        _show_files(compare_files, files or [], out)
        return
    from cl_compiler.api import refusal_of
    from cl_compiler.cli.requests import ask, budget_of, hardware_of, problem_of
    from cl_compiler.cli.user_loss import find_loss

    question = ask(hardware=hardware, budget=budget, loss=loss, problem=problem, M=M, N=N, D=D,
                   dtype=dtype, precision=precision, schedule=schedule, operands=None)  # fmt: skip
    machine = hardware_of(hardware)
    refusal = refusal_of(machine)
    if machine.kind != "cpu":
        refusal = (
            f"{machine.name} has GPUs, and this command measures on the CPU. In the repository, "
            "`python -m benchmarks.gpu` measures GPUs"
        )
    if refusal:
        raise HardwareError(f"--hardware {hardware}: {refusal}")
    steps = ["dense, memory", "compiled, memory"]
    steps += ["dense", "compiled"] * (repeats + 1)
    with working(f"measuring {loss}", steps) as advance:
        found = compare(
            find_loss(loss),
            problem_of(question),
            budget_of(budget, machine, is_here=hardware == "auto"),
            hardware=machine,
            precision=precision,
            schedule=schedule,
            threads=threads,
            repeats=repeats,
            advance=advance,
        )
    if json:
        write_json(asdict(found))
    else:
        _print(found)


def _show_files(is_asked: bool, files: list[Path], out: Path | None) -> None:
    if not (is_asked and files):
        raise typer.BadParameter(
            "--compare and the results files belong together: "
            "cl-compiler bench --compare benchmarks/results/FILE.json"
        )
    from cl_compiler.cli.compare import show

    show(files, out or files[0].parent)


def compare(
    loss: LossIR,
    problem: Problem,
    budget: str | int | MemoryBudget | None,
    *,
    hardware: str | HardwareSpec = "auto",
    precision: str = "auto",
    schedule: str = "auto",
    threads: int | None = None,
    repeats: int = 5,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compile a loss and measure it against the dense formula.

    Args:
        loss: a shipped one has a dense formula; another is compared with the reference.
        problem: sizes and dtype of the inputs.
        budget: what ``compile_loss`` takes.
        hardware: what ``compile_loss`` takes.
        precision: what ``compile_loss`` takes.
        schedule: what ``compile_loss`` takes.
        threads: of PyTorch; None for all of its threads.
        repeats: repetitions of each alternative.
        advance: called whenever one measurement ends.

    Raises:
        ArgumentError: the loss needs operands that this command cannot invent.
        BudgetError, ScheduleError, HardwareError: as ``compile_loss``.
    """
    import torch

    from cl_compiler.api import compile_loss
    from cl_compiler.hardware.cpu import cpu_facts, thread_count
    from cl_compiler.runtime.measure import (
        describe,
        interleave,
        measure_memory,
        quiet_shares,
        relative_error,
        thread_limit,
    )

    threads = torch.get_num_threads() if threads is None else threads
    clock = "cpu" if threads == 1 else "wall"
    loss_fn = compile_loss(
        hardware, budget, loss=loss, problem=problem, precision=precision, schedule=schedule
    )
    inputs = _inputs(loss, problem)
    baseline, dense = _dense_step(loss, inputs, problem)
    parts = {baseline: dense, "compiled": step_of(loss_fn, inputs)}
    memory, results, errors = {}, {}, {}
    with thread_limit(threads):
        for name, step in parts.items():
            try:
                memory[name] = measure_memory(step)
                results[name] = [t.grad for t in inputs.values() if t.grad is not None]
            except (RuntimeError, MemoryError, ValueError) as error:
                errors[name] = describe(error)
            for tensor in inputs.values():
                tensor.grad = None
            advance()
        calls = {name: step for name, step in parts.items() if name not in errors}
        timings = interleave(calls, repeats, clock=clock, advance=lambda _: advance())
    plan = loss_fn.plan
    exact = problem.dtype in ("float32", "float64") and len(results) == 2
    difference = relative_error(results["compiled"], results[baseline]) if exact else None
    return Comparison(
        loss=loss.name, M=problem.M, N=problem.N, D=problem.D, dtype=problem.dtype,
        threads=threads, clock=clock, schedule=plan.schedule, tile=str(plan.tile),
        budget_bytes=plan.budget.device_bytes, predicted_bytes=plan.peak_bytes,
        predicted_seconds=plan.seconds, planned_threads=thread_count(cpu_facts().cores),
        largest_error=difference,
        disturbed=quiet_shares(timings),
        rows=tuple(
            _row(name, timings.get(name), memory.get(name), errors.get(name, ""))
            for name in parts
        ),
    )  # fmt: skip


def _row(name: str, timing: Timing | None, memory: Any, error: str) -> Row:
    seconds = () if timing is None else tuple(s.seconds for s in timing.samples)
    return Row(
        name,
        None if timing is None else timing.median_s,
        seconds,
        None if memory is None else memory.live_bytes,
        None if memory is None else memory.process_bytes,
        error or ("" if timing is None else timing.error),
    )


def _inputs(loss: LossIR, problem: Problem) -> dict[str, Tensor]:
    """Leaves that require gradients: operands and parameters by name."""
    import torch

    from cl_compiler.errors import ArgumentError
    from cl_compiler.runtime.measure import planted_pairs

    names = {op.name for op in loss.operands}
    extra = sorted(names - {"x", "y", "z"})
    extra += sorted(n for n, leaf in loss.leaves.items() if leaf.kind == "input")
    if extra:
        raise ArgumentError(
            f"{loss.name} also takes {', '.join(extra)}; bench measures losses of x, y or z and "
            "numbers only. Call the loss from a script, with cl_compiler.runtime.measure."
        )
    dtype = getattr(torch, problem.dtype)
    if "z" in names:
        half = problem.M // 2  # compile_loss refused an odd number
        x, y = planted_pairs(half, half, problem.D, dtype)
        operands = {"z": torch.cat([x, y])}
    else:
        x, y = planted_pairs(problem.M, problem.N, problem.D, dtype)
        operands = {"x": x, "y": y}
    parameters = {n: torch.tensor(PARAMETERS.get(n, 1.0)) for n in loss.parameters}
    return {n: t.requires_grad_() for n, t in (operands | parameters).items()}


def step_of(
    loss_fn: CompiledLoss | Callable[..., Tensor], inputs: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    """A forward and a backward that leave fresh gradients in the inputs."""

    def step() -> Tensor:
        for tensor in inputs.values():
            tensor.grad = None
        found = loss_fn(**inputs)
        value: Tensor = found[0] if isinstance(found, tuple) else found
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    return step


def _dense_step(
    loss: LossIR, inputs: Mapping[str, Tensor], problem: Problem
) -> tuple[str, Callable[[], Tensor]]:
    """(name, call) of the dense baseline; a call that cannot have the memory says so."""
    from cl_compiler.cli.dense import dense_baseline
    from cl_compiler.hardware.cpu import free_memory_bytes
    from cl_compiler.units import format_bytes

    name, formula, bytes_per_pair = dense_baseline(loss, problem.compute_bytes)
    needed, free = int(bytes_per_pair * problem.M * problem.N), free_memory_bytes()

    def refuse() -> Tensor:
        raise ValueError(f"needs about {format_bytes(needed)}, {format_bytes(free)} are free")

    return name, refuse if needed > free else step_of(formula, inputs)


def _print(found: Comparison) -> None:
    from cl_compiler.units import format_bytes, format_seconds

    rows = []
    for row in found.rows:
        if row.error:
            rows.append((row.name, row.error, "", "", ""))
            continue
        ratio = ""
        if row is not found.dense and found.dense.seconds and row.seconds:
            ratio = f"{found.dense.seconds / row.seconds:.2f}x"
        time = "-" if row.seconds is None else format_seconds(row.seconds)
        rows.append(
            (row.name, time, ratio, bytes_or_dash(row.live_bytes), bytes_or_dash(row.process_bytes))
        )
    predicted = (format_seconds(found.predicted_seconds), "", format_bytes(found.predicted_bytes))
    rows.append((f"predicted, {found.planned_threads} threads", *predicted, ""))
    clock = "CPU time" if found.clock == "cpu" else "wall time"
    write_table(
        Table(
            f"{found.loss}, M={found.M} N={found.N} D={found.D} {found.dtype}, forward and "
            f"backward, {found.threads} thread{'s' * (found.threads != 1)}, {clock}",
            ("", "time", "faster", "live tensors", "process"),
            tuple(rows),
            frozenset({1, 2, 3, 4}),
        )
    )
    write(
        f"schedule   {found.schedule}, tiles of {found.tile}, budget "
        f"{format_bytes(found.budget_bytes)}"
    )
    if found.dense.live_bytes and found.compiled.live_bytes:
        saved = found.dense.live_bytes / found.compiled.live_bytes
        write(f"memory     1/{saved:.0f} of {found.dense.name}'s")
    if found.largest_error is not None:
        write(f"agreement  gradients differ by {found.largest_error:.1e} of their largest element")
    write(f"noise      {found.disturbed}")
