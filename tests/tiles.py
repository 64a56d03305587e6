"""Run a loss through the emitted tiles with a given schedule and tile size, without the planner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cl_compiler.codegen.render import render
from cl_compiler.lang.base_two import in_base_two
from cl_compiler.lang.program import Schedule
from cl_compiler.lang.schedules import build_program, valid_schedules
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Tile
from cl_compiler.runtime.loader import forget_sizes, load_source
from tests.zoo_case import Case, Sample

ROW_TILE, COL_TILE = 3, 4
"""Small enough that samples of a few rows have interior, edge and ragged tiles."""


def emit(
    case: Case,
    schedule: Schedule = "spill",
    *,
    dtype: str = "float64",
    tile: Tile | None = None,
    kept_tiles: int = 2,
    needs: frozenset[str] | None = None,
    width: int = 6,
    precision: str = "ieee",
    library: str = "blas",
    exponential: str = "exp",
    strip: int = 0,
) -> str:
    """The text of the file for one case."""
    needs = case.needs if needs is None else needs
    sweeps = plan_sweeps(case.loss, case.positives, needs)
    program = build_program(sweeps, schedule)
    if exponential == "exp2":
        program = in_base_two(program)
    if library == "onednn":
        program = in_strips(program)
        strip = strip or 64
    tile = Tile(ROW_TILE, COL_TILE) if tile is None else tile
    if any(p.symmetric for p in program.passes):
        tile = Tile(tile.rows, tile.rows)
    if schedule == "dense":
        tile, kept_tiles = Tile(1024, 1024), 1
    plan = Plan(
        case.loss.name,
        "test",
        Problem(64, 64, width, dtype),
        case.positives,
        needs,
        precision,  # type: ignore[arg-type]
        MemoryBudget(1 << 30),
        schedule,
        tile,
        kept_tiles,
        (),
        (),
        0,
        0.0,
        4.0,
        library=library,  # type: ignore[arg-type]
        exponential=exponential,  # type: ignore[arg-type]
        strip=strip,
    )
    return render(plan, program, "test")


def schedules_of(case: Case) -> list[Schedule]:
    """The schedules that a case can use."""
    plan = plan_sweeps(case.loss, case.positives, case.needs)
    return [s for s, reason in valid_schedules(plan).items() if not reason]


@dataclass(frozen=True)
class Result:
    """What a run through the tiles gave: value, and gradients by name."""

    value: Tensor
    gradients: dict[str, Tensor]
    outputs: dict[str, Tensor]


def run(source: str, sample: Sample, grad_output: float = 1.0) -> Result:
    """Load a file, call its Function on a sample and differentiate."""
    module = load(source)
    leaves = sample.leaves
    values = {**sample.tensors, **sample.parameters, **sample.ids}
    results = module.Loss.apply(*(values[name] for name in module.ARGUMENTS))
    value = results[0]
    names = list(module.GRADIENTS)
    given = [leaves[n] for n in names]  # none, where the loss ignores all that needs a gradient
    grads = torch.autograd.grad(value * grad_output, given) if given else ()
    outputs = dict(zip(module.OUTPUTS, results[1:], strict=True))
    return Result(value.detach(), dict(zip(names, grads, strict=True)), outputs)


def load(source: str) -> ModuleType:
    """The module of a generated text; how many came before changes nothing."""
    forget_sizes()
    return load_source(source, "test")


def errors(result: Result, sample: Sample) -> Mapping[str, float]:
    """Errors against the float64 reference: the value's, and each gradient's in norm.

    A gradient that is tiny beside the others is measured against a thousandth of the largest; where
    all vanish (one row, one column), against 1e-6 of the terms that cancel, which are of order 1
    times the parameters that scale them.
    """
    reference = sample.reference()
    wanted = sample.gradients(reference)
    expected = float(reference.detach())
    floor = 1e-3 * max(float(g.norm()) for g in wanted.values())
    scales = [abs(float(p.detach())) for p in sample.parameters.values()]
    cancelling = 1e-6 * max([1.0, *scales])
    found = {"value": abs(float(result.value) - expected) / max(1.0, abs(expected))}
    for name, want in wanted.items():
        got = result.gradients.get(name, torch.zeros_like(want)).double()
        found[name] = float((got - want).norm()) / max(float(want.norm()), floor, cancelling)
    return found
