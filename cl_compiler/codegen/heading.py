"""What an emitted file says of itself at its top: the plan, and what its names mean."""

from __future__ import annotations

import re

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.stages import StagePrinter
from cl_compiler.codegen.symbols import view_text
from cl_compiler.lang.program import Program
from cl_compiler.lang.text import describe
from cl_compiler.lang.whole import nll_of
from cl_compiler.plan.types import Plan
from cl_compiler.units import format_bytes


def glossary(printer: StagePrinter, statements: str) -> list[tuple[str, str]]:
    """(identifier, meaning) of the names that a reader meets in ``statements``."""
    plan, names = printer.plan, printer.names
    met = set(re.findall(r"\w+", statements))
    length = {"rows": "M", "cols": "N", "rows2": "M", "cols2": "N", "slots": "K", "bank": "Q"}
    result = []
    for name, leaf in plan.leaves.items():
        if leaf.kind == "similarity":
            left, right = view_text(leaf.left), view_text(leaf.right)
            scale = f"{leaf.scale} * " if leaf.scale else ""
            result.append((name, f"{scale}{left} @ {right}.T, one tile at a time"))
        if leaf.kind == "similarity_at_positive" and names(name) in met:
            result.append((names(name), "[M] the same at each row's positive"))
    for node in plan.nodes:
        if plan.is_full(node.name):
            red = plan.by_name[node.name]
            (axis,) = plan.leaves[node.name].axes
            text = f"[{length[axis]}] {_rename(describe(red).partition(' = ')[2], names)}"
            nll = names.table.get(nll_of(node.name).name)
            if nll:
                result.append((nll, f"{text}, less the logit of the positive"))
            if names(node.name) in met or not nll:
                result.append((names(node.name), text))
    return result


def _rename(text: str, names: Names) -> str:
    text = re.sub(r"\bis_self_\w+", "is_self", text)
    return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: names.table.get(m.group(), m.group()), text)


def header(plan: Plan, program: Program) -> list[tuple[str, str]]:
    """(key, text) of what was planned for which problem on which machine."""
    p = plan.problem
    kept = f"; {plan.kept_tiles} tiles kept" if program.keeps_tiles else ""
    accumulate = "fp64" if p.dtype == "float64" else "fp32"
    by = " by oneDNN" if plan.library == "onednn" else ""
    arguments = ", ".join(program.plan.ir.parameters)
    return [
        ("loss", f"{plan.loss_name}({arguments}); positives: {plan.positives}"),
        (
            "hardware",
            f"{plan.hardware_name}   {p.dtype} in, {plan.precision} products{by}, "
            f"{accumulate} accumulate",
        ),
        (
            "problem",
            f"up to M={p.M} N={p.N} D={p.D}; gradients: {', '.join(sorted(plan.needs)) or 'none'}",
        ),
        ("schedule", f"{plan.schedule}{kept}"),
        (
            "tiles",
            "   ".join(f"{level.level} {level.tile}" for level in plan.levels) or f"{plan.tile}",
        ),
        (
            "memory",
            f"predicted peak {format_bytes(plan.peak_bytes)} of "
            f"{format_bytes(plan.budget.device_bytes)}",
        ),
    ]


__all__ = ["glossary", "header"]
