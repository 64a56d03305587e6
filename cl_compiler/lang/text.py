"""Expressions as maths that a person reads: in the loss graph, in ``explain()``, in headers."""

from __future__ import annotations

import sympy as sp
from sympy.printing.str import StrPrinter

from cl_compiler.lang.ir import Let, Reduction

__all__ = ["describe"]

_PAIR = {"greater": ">", "greater_equal": ">=", "equal": "==", "mask_and": "&", "mask_or": "|"}
_CALLS = {"absolute": "abs", "maximum": "max", "softmax_weight": "softmax"}


class _Text(StrPrinter):
    """SymPy's text, with masks as operators and selections as conditional expressions."""

    def _print_Function(self, expr: sp.Expr) -> str:
        name = expr.func.__name__
        args = [str(self.doprint(a)) for a in expr.args]
        if name in _PAIR:
            return f"({args[0]} {_PAIR[name]} {args[1]})"
        match name:
            case "select":
                return f"({args[1]} if {args[0]} else {args[2]})"
            case "mask_not":
                return f"~{args[0]}"
            case "to_rows":
                return f"{args[0]}[positive of row]"
            case "to_cols":
                return f"{args[0]}[row of positive]"
            case "one_minus_exp":
                return f"(1 - exp({args[0]}))"
            case _:
                return f"{_CALLS.get(name, name)}({', '.join(args)})"


def describe(what: sp.Expr | Let | Reduction) -> str:
    """One line of maths: an expression, or ``name = …`` of a vector or a reduction."""
    text = _Text().doprint
    if isinstance(what, Let):
        return f"{what.name} = {text(what.expr)}"
    if not isinstance(what, Reduction):
        return str(text(what))
    if what.monoid in ("to_rows", "to_cols"):
        where = "positive of row" if what.monoid == "to_rows" else "row of positive"
        return f"{what.name} = ({text(what.operand)})[{where}]"
    logits = "" if what.logits is None else f" weighted by softmax({text(what.logits)})"
    mask = "" if what.where == 1 else f" where {text(what.where)}"
    return f"{what.name} = {what.monoid} over {what.over} of {text(what.operand)}{logits}{mask}"
