"""What the kernels of a group are printed for, and when there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cl_compiler.codegen.triton.core import (
    Columns,
    CoreTile,
    column_sums,
    core_tiles,
    reads_by_descriptors,
)
from cl_compiler.errors import ScheduleError
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.plan.precision import FP8, rounded_operands
from cl_compiler.plan.types import Plan, Problem


@dataclass(frozen=True)
class Target:
    """What kernels are printed for.

    ``widths``: columns of each operand; ``core``: one tile for every kernel, for tests.
    """

    arch: str
    problem: Problem
    precision: str
    widths: Mapping[str, int]
    descriptors: bool
    columns: Columns
    core: CoreTile | None = None

    @property
    def dot_precision(self) -> str:
        """Of products of fp32 operands; "" for others."""
        return self.precision if self.problem.dtype == "float32" else ""

    def tile(self, pass_: Pass, mode: Mode) -> CoreTile:
        """What one program holds in registers."""
        if self.core is not None:
            return self.core
        return core_tiles(self.problem, self.precision, pass_, (mode,), self.arch)[mode]


def target_of(plan: Plan, program: Program, arch: str, core: CoreTile | None) -> Target:
    """What the kernels of a plan are printed for.

    Raises:
        ScheduleError: kernels do not serve the program; the message says why.
    """
    problem = plan.problem
    reason = kernel_obstacle(problem, plan.precision)
    if reason:
        raise ScheduleError(f"{plan.loss_name} on a group cannot be emitted as Triton: {reason}.")
    widths = {op.name: problem.operands.get(op.name, problem.D) for op in program.plan.ir.operands}
    descriptors = reads_by_descriptors(problem, plan.precision, arch)
    return Target(arch, problem, plan.precision, widths, descriptors, column_sums(arch), core)


def kernel_obstacle(problem: Problem, precision: str) -> str:
    """Why operands of a group cannot be multiplied by Triton kernels; "" where it can."""
    if problem.dtype == "float64":
        return "float64 has no tensor cores"
    if precision == FP8:
        return "groups have no fp8 products"
    if rounded_operands(problem.dtype, precision):
        return f"{problem.dtype} operands are not rounded to {precision} before they travel"
    return ""


__all__ = ["Target", "kernel_obstacle", "target_of"]
