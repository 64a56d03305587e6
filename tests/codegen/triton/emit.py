"""Emit a loss as Triton with a given tile, without the planner."""

from __future__ import annotations

from functools import cache

from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.codegen.triton.render import render_triton
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.lang.program import Program, Schedule
from cl_compiler.lang.schedules import build_program, valid_schedules
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Tile
from tests import losses_zoo as zoo
from tests.zoo_case import Case

SMALL = CoreTile(16, 16, 16, 1, 1)
"""The smallest tile of matrix instructions: samples of tens of rows have whole and ragged ones."""
RESIDENT = CoreTile(16, 16, 32, 1, 1, 32, resident=True)
"""The same, as deep as samples are wide."""
PANEL = Tile(16, 32)
REAL = Tile(8192, 8192)


def plan_of(
    case: Case,
    dtype: str,
    width: int,
    panel: Tile,
    needs: frozenset[str] | None = None,
    precision: str = "ieee",
    schedule: Schedule = "spill",
) -> tuple[Plan, Program]:
    """The plan and the program of a case under a schedule."""
    needs = case.needs if needs is None else needs
    program = build_program(plan_sweeps(case.loss, case.positives, needs), schedule)
    if any(p.symmetric for p in program.passes):
        panel = Tile(panel.cols, panel.cols)
    plan = Plan(
        case.loss.name,
        "test",
        Problem(64, 64, width, dtype),  # type: ignore[arg-type]
        case.positives,
        needs,
        precision,
        MemoryBudget(1 << 30),
        schedule,
        panel,
        0,
        (),
        (),
        0,
        0.0,
        4.0,
        template="triton",
    )
    return plan, program


def emit(
    case: Case,
    *,
    dtype: str = "float32",
    width: int = 20,
    arch: str = "sm_90",
    panel: Tile = PANEL,
    core: CoreTile | None = SMALL,
    needs: frozenset[str] | None = None,
    precision: str = "ieee",
    schedule: Schedule = "spill",
) -> str:
    """The text of the file for one case."""
    plan, program = plan_of(case, dtype, width, panel, needs, precision, schedule)
    return render_triton(plan, program, "test", arch, core)


@cache
def served(schedule: Schedule = "spill") -> dict[str, Program]:
    """The zoo's cases that the back end claims, by name, as programs."""
    programs = {case.name: program_of(case, schedule) for case in zoo.cases()}
    return {name: program for name, program in programs.items() if program is not None}


def program_of(case: Case, schedule: Schedule) -> Program | None:
    """The program of a case of fp32 under a schedule that the back end claims for it."""
    if valid_schedules(plan_sweeps(case.loss, case.positives, case.needs))[schedule]:
        return None
    plan, program = plan_of(case, "float32", 20, PANEL, schedule=schedule)
    return None if obstacle(plan.problem, program) else program
