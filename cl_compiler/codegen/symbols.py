"""What a plan's symbols stand for in text: tables and small questions that printers share."""

from __future__ import annotations

from collections.abc import Iterable

from cl_compiler.codegen.names import Names
from cl_compiler.lang.ir import Leaf, Reduction
from cl_compiler.lang.lower import TIE_TOLERANCE, inverse_of, shift_of
from cl_compiler.lang.program import Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Mode

LENGTH = {
    "rows": "rows",
    "cols": "cols",
    "rows2": "rows",
    "cols2": "cols",
    "bank": "bank",
    "slots": "slots",
}


def symbol_table(plan: SweepPlan) -> dict[str, Leaf]:
    """The plan's leaves, with the shifts and inverse sums of its logsumexps."""
    table = dict(plan.leaves)
    table[TIE_TOLERANCE.name] = Leaf(TIE_TOLERANCE.name, "count", ())
    for node in plan.nodes:
        if isinstance(node, Reduction) and node.monoid == "logsumexp":
            axes = plan.leaves[node.name].axes
            table[inverse_of(node.name).name] = Leaf(inverse_of(node.name).name, "adjoint", axes)
            table[shift_of(node.name).name] = Leaf(shift_of(node.name).name, "adjoint", ())
    return table


def operand_scale(plan: SweepPlan, operand: str) -> str:
    """The parameter that scales every similarity of an operand: applied once, at the end.

    "" if none does, "mixed" if they differ (then each product carries its own).
    """
    scales = {
        leaf.scale or ""
        for name, leaf in plan.leaves.items()
        if leaf.kind == "similarity"
        and any(v is not None and v.operand == operand for v in (leaf.left, leaf.right))
        and plan.gradient is not None
        and (name in plan.gradient.similarities or name in plan.gradient.positives)
    }
    return "mixed" if len(scales) > 1 else next(iter(scales), "")


def finalise(
    program: Program, red: Reduction, mode: Mode, names: Names, parts: dict[str, str]
) -> Iterable[tuple[str, str]]:
    """(symbol, text) of what follows from a reduction's accumulators."""
    match red.monoid:
        case "logsumexp" if mode == "bounded":
            shift = names(shift_of(shift_owner(program, red)).name)
            yield red.name, f"torch.log({parts['sum']}) + {shift}"
            yield inverse_of(red.name).name, f"_inverse({parts['sum']})"
        case "logsumexp":
            yield red.name, f"_finish_logsumexp({parts['max']}, {parts['sum']})"
        case "softmean" if mode == "bounded":
            partner = names(f"sum_{softmean_partner(program, red)}")
            suffix = "[i:i1]" if parts["sum"].endswith("[i:i1]") else ""
            yield red.name, f"_ratio({parts['sum']}, {partner}{suffix})"
        case "softmean":
            yield red.name, f"_ratio({parts['weighted']}, {parts['sum']})"


def shift_owner(program: Program, red: Reduction) -> str:
    """The logsumexp that names the shift of this reduction's exponential."""
    logits = red.operand if red.monoid == "logsumexp" else red.logits
    return next(r.name for r in program.logsumexps if r.operand == logits)


def softmean_partner(program: Program, red: Reduction) -> str:
    """The logsumexp of a softmean's logits."""
    return next(
        r.name
        for r in program.logsumexps
        if (r.operand, r.where, r.over) == (red.logits, red.where, red.over)
    )
