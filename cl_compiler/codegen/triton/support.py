"""Which programs the Triton back end serves; for the others, why not."""

from __future__ import annotations

from cl_compiler.codegen.triton.core import capability
from cl_compiler.codegen.triton.eight_bits import obstacle_of_eight_bits
from cl_compiler.codegen.triton.owner import obstacle_of_owners
from cl_compiler.codegen.triton.retain import obstacle_of_retain
from cl_compiler.codegen.triton.row_panels import obstacle_of_panels
from cl_compiler.codegen.triton.slots import obstacle_of_slots
from cl_compiler.lang.program import Program
from cl_compiler.plan.precision import FP8
from cl_compiler.plan.types import Problem

AMD = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
"""Beginnings of AMD's architectures that have matrix instructions."""


def obstacle_of_machine(arch: str) -> str:
    """Why a GPU cannot run Triton kernels; "" where it can."""
    if arch.startswith(AMD) or capability(arch) >= 80:
        return ""
    first = "gfx908" if arch.startswith("gfx") else "sm_80"
    return f"Triton's products begin with {first}, and this GPU is {arch or 'unknown'}"


def obstacle(problem: Problem, program: Program, precision: str = "auto") -> str:
    """Why this plan cannot run as Triton kernels; "" where it can."""
    if problem.dtype == "float64":
        return "float64 has no tensor cores; the torch template runs it on any device"
    if program.schedule not in ("spill", "recompute", "panel", "retain"):
        return f"schedule {program.schedule!r} has no Triton template; use 'spill'"
    if program.schedule == "recompute" and (reason := obstacle_of_owners(program)):
        return reason
    if program.schedule == "panel" and (reason := obstacle_of_panels(program)):
        return reason
    if program.schedule == "retain" and (reason := obstacle_of_retain(problem, program)):
        return reason
    if precision == FP8 and (reason := obstacle_of_eight_bits(program)):
        return reason
    return obstacle_of_slots(program)
