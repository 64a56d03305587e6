"""The Triton back end called directly, so that panels are timed that the planner did not take."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from torch import Tensor

from benchmarks.gpu.cases import Contest
from benchmarks.providers import Skipped
from cl_compiler.codegen.triton.panel import plan_with
from cl_compiler.codegen.triton.render import render_triton
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.codegen.triton.workload import Workload
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.resolve import Positives
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.types import MemoryBudget, Problem, Request, Tile
from cl_compiler.runtime.loader import load_source

__all__ = ["triton_loss"]

DEFAULT_PANEL = Tile(8192, 8192)
BUDGET = MemoryBudget(1 << 40)
"""Nothing is planned here, so nothing may be refused for its size."""


def triton_loss(panel: str, contest: Contest, leaves: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The forward of a loss in panels of so many rows and columns.

    Args:
        panel: "8448x65536"; "" for the default.
        contest: its loss, sizes and dtype.
        leaves: inputs by name.

    Raises:
        Skipped: there is no GPU, or the back end does not serve the loss.
    """
    if leaves["logit_scale"].device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise Skipped("Triton needs a GPU")
    loss, problem = find(contest.loss), Problem(contest.M, contest.N, contest.D, contest.dtype)  # type: ignore[arg-type]
    positives: Positives = "views" if loss.is_single_set else "diagonal"
    sweeps = plan_sweeps(loss, positives, frozenset(leaves))
    program = build_program(sweeps, "spill")
    hardware = load_hardware("auto")
    precision = "bf16" if contest.dtype == "bfloat16" else "ieee"
    request = Request(loss, hardware, BUDGET, problem, positives, frozenset(leaves), precision,
                      "spill")  # fmt: skip
    tile = _tile(panel)
    if any(pass_.symmetric for pass_ in program.passes):
        tile = Tile(tile.rows, tile.rows)
    reason = obstacle(problem, program)
    if reason:
        raise Skipped(reason)
    arch = hardware.arch if hardware.kind == "cuda" else "sm_90"
    plan = plan_with(Workload(request, program, arch), tile)
    module = load_source(render_triton(plan, program, f"bench-{tile}", arch), f"bench-{tile}")

    def forward() -> Tensor:
        value: Tensor = module.Loss.apply(*(leaves[name] for name in module.ARGUMENTS))[0]
        return value

    return forward


def _tile(panel: str) -> Tile:
    if not panel:
        return DEFAULT_PANEL
    rows, cols = panel.split("x")
    return Tile(int(rows), int(cols))
