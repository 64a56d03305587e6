"""What a plan's symbols stand for in text: tables and small questions that printers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import sympy as sp

from cl_compiler.codegen.names import Names
from cl_compiler.lang.ir import Leaf, Let, Reduction, View, axes_of
from cl_compiler.lang.lower import TIE_TOLERANCE, inverse_of, shift_of
from cl_compiler.lang.program import Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.lang.whole import scale_gradients

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


def view_text(view: View | None) -> str:
    """An operand, or the first columns of one."""
    assert view is not None
    return view.operand if view.prefix is None else f"{view.operand}[:, :{view.prefix}]"


class PythonNumbers:
    """Which scalars emitted code holds as Python numbers rather than as tensors.

    Axis lengths and shifts, and what arithmetic makes of them where no division by zero can occur:
    Python raises where a tensor would be infinite.
    """

    def __init__(
        self, plan: SweepPlan, hoisted: Mapping[str, tuple[sp.Expr, tuple[str, ...]]] | None = None
    ) -> None:
        self.hoisted = hoisted or {}
        self.known = {
            name
            for name, leaf in symbol_table(plan).items()
            if leaf.kind == "count" or name.startswith("shift_")
        }
        self.lengths: dict[sp.Symbol, sp.Expr] = {}
        """Names of such scalars in terms of axis lengths."""
        for node in plan.nodes:
            if isinstance(node, Let) and self(node.expr):
                self.known.add(node.name)
                symbol = plan.leaves[node.name].symbol
                self.lengths[symbol] = node.expr.xreplace(self.lengths)

    def __call__(self, expr: sp.Expr) -> bool:
        if isinstance(expr, sp.Symbol):
            if expr.name in self.hoisted:
                return self(self.hoisted[expr.name][0])
            return expr.name in self.known
        if expr.is_number:
            return bool(expr.is_finite)
        if isinstance(expr, sp.Pow) and expr.exp.is_Integer:
            nonzero = (
                isinstance(expr.base, sp.Symbol) and expr.base.xreplace(self.lengths).is_nonzero
            )
            return bool(nonzero or expr.exp > 0) and self(expr.base)
        return isinstance(expr, (sp.Add, sp.Mul)) and all(self(a) for a in expr.args)


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


def scaled_in_products(program: Program, operand: str) -> bool:
    """Whether every product into an operand's gradient carries the scale of its similarity.

    Otherwise it is applied once, at the end.  In a product it costs nothing, but where the gradient
    of the scale itself is read off the operand's gradient, that must have no scale yet.
    """
    plan = program.plan
    scale = operand_scale(plan, operand)
    if scale in ("", "mixed") or not program.is_whole:
        return scale == "mixed"
    assert plan.gradient is not None
    return scale not in plan.gradient.dots or scale in scale_gradients(plan).values()


def finalise(
    program: Program, red: Reduction, mode: Mode, names: Names, parts: dict[str, str]
) -> Iterable[tuple[str, str]]:
    """(symbol, text) of what follows from a reduction's accumulators."""
    double = ".double()" if red.name in program.wide else ""
    match red.monoid:
        case _ if mode == "whole":
            return
        case "logsumexp" if mode == "bounded":
            shift = names(shift_of(shift_owner(program, red)).name)
            yield red.name, f"torch.log({parts['sum']}{double}) + {shift}"
            inverse = "torch.reciprocal" if red.where == 1 else "_inverse"
            yield inverse_of(red.name).name, f"{inverse}({parts['sum']})"
        case "logsumexp":
            both = f"{parts['max']}{double}, {parts['sum']}{double}"
            yield red.name, f"_finish_logsumexp({both})"
        case "softmean" if mode == "bounded":
            partner = names(f"sum_{softmean_partner(program, red)}")
            suffix = "[i:i1]" if parts["sum"].endswith("[i:i1]") else ""
            yield red.name, f"_ratio({parts['sum']}, {partner}{suffix})"
        case "softmean":
            yield red.name, f"_ratio({parts['weighted']}, {parts['sum']})"


def is_wide(program: Program, expr: sp.Expr) -> bool:
    """Whether a vector is in fp64 though tiles are not."""
    return any(s.name in program.wide for s in expr.free_symbols)


def narrowed(program: Program, expr: sp.Expr, text: str, leaves: Mapping[str, Leaf]) -> str:
    """The text of a vector or scalar as tiles and callers read it."""
    if not is_wide(program, expr) or not axes_of(expr, leaves):
        return text
    return f"({text}).to(DTYPE)"


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


def prefixed(text: str, view: View) -> str:
    """Restrict to a prefix of the columns, merging with a row slice if there is one."""
    if view.prefix is None:
        return text
    if text.endswith("]"):
        return f"{text[:-1]}, :{view.prefix}]"
    return f"{text}[:, :{view.prefix}]"
