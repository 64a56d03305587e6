"""Render a plan as Triton: strict Jinja templates in, formatted Python text out."""

from __future__ import annotations

from cl_compiler.codegen.layout import drop_unused, fit
from cl_compiler.codegen.library import library_products
from cl_compiler.codegen.render import environment, tidy_text
from cl_compiler.codegen.triton.context import build_triton_context
from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.codegen.triton.support import obstacle
from cl_compiler.errors import ScheduleError
from cl_compiler.lang.program import Program
from cl_compiler.plan.types import Plan


def render_triton(
    plan: Plan, program: Program, variant: str, arch: str, core: CoreTile | None = None
) -> str:
    """The text of the file that runs ``plan`` on a GPU of architecture ``arch``.

    ``core``: one tile for every kernel, for tuning and for tests; without it each kernel has the
    tile of ``core_tile``.  The text depends on its arguments only.

    Raises:
        ScheduleError: the back end does not serve the program; the message says why.
    """
    reason = obstacle(plan.problem, program)
    if reason:
        raise ScheduleError(f"{plan.loss_name} cannot be emitted as Triton: {reason}.")
    context = build_triton_context(plan, program, arch, core) | {
        "variant": variant,
        "device": "cuda",
        "products": library_products("cuda", plan.precision),
        "scalar_home": "",
        "beside": "",
        "whole_rows": True,
    }
    text = environment().get_template("triton/loss.py.jinja").render(context)
    return fit(drop_unused(tidy_text(text)))
