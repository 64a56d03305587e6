"""``tune=True``: the planner's best few candidates, measured where the loss will run.

The planner ranks by rates; a machine also has habits.  Here its candidates run, forward and
backward, in turns and on data as training has them, and the fastest is what the cache keeps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cl_compiler.errors import ArgumentError, CompilerError
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.types import Candidate, Plan, Request
from cl_compiler.units import format_seconds

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MOST", "Measured", "Tuning", "place", "tune"]

MOST = 8
"""Candidates that are measured."""
LONGEST_S = 0.5
"""Predicted seconds of one call; of larger problems fewer rows and columns are measured."""
FEWEST_TILES = 4
"""Of the largest candidate along each axis, so that fewer rows are still many tiles."""
START = {"logit_scale": 1 / 0.07, "logit_bias": -10.0}
"""What training starts from; any other parameter of a loss is 1."""


@dataclass(frozen=True)
class Measured:
    """One candidate: median ``seconds`` of a forward and a backward, or the error that it met."""

    plan: Plan
    source: str
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Tuning:
    """What was measured at ``rows`` x ``cols``, the fastest first, failures last."""

    rows: int
    cols: int
    measured: tuple[Measured, ...]

    @property
    def best(self) -> Measured:
        return self.measured[0]

    @property
    def rank_correlation(self) -> float:
        """Spearman's, of predicted and measured seconds; NaN of fewer than three candidates."""
        ran = [m for m in self.measured if not m.error]
        if len(ran) < 3:
            return math.nan
        predicted, seconds = _ranks([m.plan.seconds for m in ran]), _ranks([m.seconds for m in ran])
        return statistics.correlation(predicted, seconds)

    @property
    def plan(self) -> Plan:
        """The fastest plan, with what was measured among its notes and rejected candidates."""
        best = self.best

        def reason(m: Measured) -> str:
            times = f"{m.seconds / best.seconds:.2f} times as long"
            return m.error or f"measured: {format_seconds(m.seconds)}, {times}"

        slower = tuple(
            Candidate(
                m.plan.schedule,
                m.plan.tile,
                m.plan.kept_tiles,
                m.plan.peak_bytes,
                m.plan.seconds,
                reason(m),
            )
            for m in self.measured[1:]
        )
        note = (
            f"the fastest of {len(self.measured)} measured at {self.rows}x{self.cols}: "
            f"{format_seconds(best.seconds)} for a forward and a backward"
        )
        if not math.isnan(self.rank_correlation):
            note += f"; predicted and measured order: Spearman {self.rank_correlation:.2f}"
        return replace(best.plan, rejected=slower, notes=(note, *best.plan.notes))


def tune(
    request: Request,
    sweeps: SweepPlan,
    name: str,
    *,
    most: int = MOST,
    repeats: int = 5,
    longest_s: float = LONGEST_S,
    advance: Callable[[], None] = lambda: None,
) -> Tuning:
    """Measure a request's candidates on this machine.

    Args:
        request: loss, machine, budget and problem.
        sweeps: the loss in sweeps.
        name: of the variant, as its file says it.
        most: candidates.
        repeats: repetitions of each, in turns.
        longest_s: of one call, by the plan; see ``LONGEST_S``.
        advance: called whenever one measurement ends.

    Raises:
        BudgetError, ScheduleError, HardwareError: nothing fits; the message says why.
        ArgumentError: the machine that was planned for is not here.
        CompilerError: no candidate ran; the message has the errors.
    """
    from cl_compiler.codegen.backend import candidates_of, print_plan
    from cl_compiler.runtime.loader import load_source, sizes_as_they_were
    from cl_compiler.runtime.measure import interleave

    device = _device(request)
    plans = candidates_of(request, sweeps, most)
    rows, cols = _measured_size(request, plans, longest_s)
    inputs = random_inputs(request, rows, cols, device)
    calls, sources = {}, []
    for index, plan in enumerate(plans):
        sources.append(print_plan(plan, request, sweeps, name))
        here = _at_size(plan, rows, cols)
        text = sources[-1] if here == plan else print_plan(here, request, sweeps, name)
        calls[str(index)] = _step(load_source(text, f"tune-{index}"), inputs, device)
    with sizes_as_they_were():
        timings = interleave(calls, repeats, clock=_clock(device), advance=lambda _: advance())
    measured = []
    for index, (plan, source) in enumerate(zip(plans, sources, strict=True)):
        timing = timings[str(index)]
        seconds = math.inf if timing.error or timing.median_s is None else timing.median_s
        measured.append(Measured(plan, source, seconds, timing.error))
    if all(m.error for m in measured):
        raise CompilerError(
            f"{request.loss.name}: none of {len(measured)} candidates ran on {device}; "
            f"the first said: {measured[0].error}"
        )
    return Tuning(rows, cols, tuple(sorted(measured, key=lambda m: m.seconds)))


def place() -> str:
    """Where measurements hold: device, threads and versions."""
    import torch

    from cl_compiler.hardware.cpu import cpu_facts

    parts = [f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", cpu_facts().model]
    if torch.cuda.is_available():
        import triton

        parts += [torch.cuda.get_device_name(), f"triton {triton.__version__}"]
    return ", ".join(parts)


def random_inputs(request: Request, rows: int, cols: int, device: Any) -> dict[str, Tensor]:
    """Every argument of a loss by name, as training has them: unit rows, each with its positive.

    Shapes are those of the problem, at so many rows and columns.
    """
    import torch

    from cl_compiler.runtime.measure import planted_pairs

    problem, loss = request.problem, request.loss
    lengths = {"rows": rows, "cols": cols, "slots": problem.slots, "bank": problem.bank}
    dtype = getattr(torch, problem.dtype)
    generator = torch.Generator(device).manual_seed(0)
    values: dict[str, Tensor] = {}
    if loss.is_single_set:
        x, y = planted_pairs(rows // 2, rows - rows // 2, problem.D, dtype, device=device)
        values["z"] = torch.cat([x, y])
    else:
        values["x"], values["y"] = planted_pairs(rows, cols, problem.D, dtype, device=device)
    for op in loss.operands:
        if op.name not in values:
            shape = [*(lengths[a] for a in op.axes), problem.operands.get(op.name, problem.D)]
            drawn = torch.randn(*shape, generator=generator, device=device)
            values[op.name] = torch.nn.functional.normalize(drawn, dim=-1).to(dtype)
    for leaf in loss.leaves.values():
        if leaf.kind == "input":
            shape = [lengths[a] for a in leaf.axes]
            values[leaf.name] = torch.rand(*shape, generator=generator, device=device)
    for parameter in loss.parameters:
        values[parameter] = torch.tensor(START.get(parameter, 1.0), device=device)
    if request.positives == "ids":
        ids = torch.arange(max(rows, cols), device=device) // 2
        values |= {"ids": ids[:rows], "row_ids": ids[:rows], "col_ids": ids[:cols]}
    for name in request.needs:
        values[name].requires_grad_()
    return values


def _ranks(values: list[float]) -> list[float]:
    """The place of each value in ascending order; equal ones share their places' mean."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def _step(module: Any, inputs: Mapping[str, Tensor], device: Any) -> Callable[[], None]:
    """A forward and a backward, complete on the device; the candidates before change nothing."""
    import torch

    from cl_compiler.runtime.loader import forget_sizes

    arguments = [inputs[name] for name in module.ARGUMENTS]
    wanted = [inputs[name] for name in module.GRADIENTS]

    def step() -> None:
        forget_sizes()
        value = module.Loss.apply(*arguments)[0]
        if wanted:
            torch.autograd.grad(value, wanted)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _measured_size(request: Request, plans: tuple[Plan, ...], longest_s: float) -> tuple[int, int]:
    """Rows and columns of what is measured: those of the problem, or fewer in proportion."""
    problem = request.problem
    predicted = min(p.seconds for p in plans)
    share = min(1.0, math.sqrt(longest_s / predicted)) if predicted > 0 else 1.0
    tiles = [p.tile for p in plans if p.schedule != "dense"]
    least = FEWEST_TILES * max((max(t.rows, t.cols) for t in tiles), default=1)
    share = min(1.0, max(share, least / min(problem.M, problem.N)))
    if request.loss.is_single_set:
        rows = max(2, round(problem.M * share) // 2 * 2)
        return rows, rows
    rows = max(1, round(problem.M * share))
    return rows, max(rows, round(problem.N * share))


def _at_size(plan: Plan, rows: int, cols: int) -> Plan:
    """The plan with as large a share of its tiles kept as it keeps of the whole problem."""
    share = rows * cols / (plan.problem.M * plan.problem.N)
    if not plan.kept_tiles or share == 1:
        return plan
    return replace(plan, kept_tiles=max(1, round(plan.kept_tiles * share)))


def _device(request: Request) -> Any:
    import torch

    if request.hardware.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ArgumentError(
            f"tuning for {request.hardware.name}: it runs what it measures, and there is no GPU "
            "here. Tune on the machine itself, or compile without tune."
        )
    return torch.device("cuda", torch.cuda.current_device())


def _clock(device: Any) -> str:
    """One thread is timed in CPU time, which other processes do not lengthen."""
    import torch

    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"
