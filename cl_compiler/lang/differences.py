"""Which vectors tiles of fp32 need in fp64: those that gradients subtract from each other.

A logsumexp of l, rounded to fp32, is off by up to 2^-24·l.  In weights exp(logit - l) that is a
factor of a whole row, where the dense formula subtracts the largest logit, which is exact, and
divides by the sum: so there tiles subtract l in two parts, rounded, and what rounding took, from
logits that are bit for bit those that were summed.  And a loss that takes log(e^l - e^p), or
logaddexp(l, p), weighs its rows by functions of l - p, whose error is as large however close l and
p are; the dense formula has the sums themselves, each right to 2^-24 of its own.  So what is as
small as a difference of two statistics is made of statistics in fp64.

A scalar's gradient may be a few totals over all pairs, of which little is left, where the dense
formula adds up what is left of each pair: so the rows' and columns' sums that such totals are made
of are fp64.  All other sums are fp32 as in the dense formula, and so is all that a tile reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

from cl_compiler.lang.ir import Let, Reduction, axes_of
from cl_compiler.lang.rewrite import remainder
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Compute, Diagonal, Mode, TileProgram, VectorRef

POSITIVES_AT_ONCE = 64
"""Rows whose products with their positives are read off one small tile, where they are to be what
tiles have there bit for bit; fewer would be multiplied by another kernel."""
SUMMED_AT_ONCE = 1 << 16
"""Elements of the only tile there is that are copied to fp64 to be added up; or one row's."""


def wide_vectors(plan: SweepPlan, programs: Iterable[TileProgram]) -> frozenset[str]:
    """Names of vectors to keep in fp64: statistics, positives, and what is made of them.

    Args:
        plan: a loss, its gradients and sweeps.
        programs: of all its passes; what one of them reads as it stands is as wide as a tile.
    """
    programs = tuple(programs)
    read = {name for code in programs for name in _read(code)}
    wide = (subtracted(plan) | cancelling(plan) | _split(plan, programs)) - read
    for node in plan.nodes:
        if plan.is_full(node.name) or node.name in read or not plan.leaves[node.name].axes:
            continue
        if any(s.name in wide for s in _symbols(node)):
            wide.add(node.name)
    return frozenset(wide)


def _statistics(plan: SweepPlan) -> set[str]:
    """Logits of a row or a column: logsumexps, positives, and both along the other axis."""
    known = {n for n, leaf in plan.leaves.items() if leaf.kind == "similarity_at_positive"}
    for node in plan.nodes:
        if isinstance(node, Reduction):
            moved = node.monoid in ("to_rows", "to_cols") and node.operand.is_Symbol
            if (node.monoid == "logsumexp" and plan.is_full(node.name)) or (
                moved and str(node.operand) in known
            ):
                known.add(node.name)
    return known


def subtracted(plan: SweepPlan) -> set[str]:
    """Statistics of which some derivative of a vector's definition depends on statistics."""
    known = _statistics(plan)
    found: set[str] = set()
    for node in reversed(plan.ir.reductions):
        moved = node.monoid in ("to_rows", "to_cols") and node.name in found
        if moved and str(node.operand) in known:
            found.add(str(node.operand))
        for expr in node.expressions:
            if plan.is_full(node.name) or len(axes_of(expr, plan.leaves)) > 1:
                continue
            for symbol in expr.free_symbols:
                if symbol.name in known:
                    others = {s.name for s in sp.diff(expr, symbol).free_symbols} & known
                    found |= {symbol.name, *others} if others else set()
    return found


def cancelling(plan: SweepPlan) -> set[str]:
    """Sums over tiles that a scalar's gradient adds up to several totals, or takes from others."""
    found: set[str] = set()
    if plan.gradient is None:
        return found
    sums = {
        n.name for n in plan.gradient.steps if isinstance(n, Reduction) and plan.is_full(n.name)
    }
    for expr in plan.gradient.parameters.values():
        if len(sp.Add.make_args(expr)) > 1:
            found |= plan.closure([expr], plan.is_full) & sums
    return found


def splits_logsumexps(plan: SweepPlan, mode: Mode) -> bool:
    """Whether tiles subtract logsumexps in two parts: rounded, and what rounding took.

    They do with running maxima.  In bounded mode a weight is an exponential times an inverse sum,
    so there they do where logits are less a logsumexp themselves, and where rows are weighed by
    differences of logsumexps.
    """
    sums = [n for n in plan.nodes if isinstance(n, Reduction) and n.monoid == "logsumexp"]
    if not any(plan.is_full(n.name) for n in sums):
        return False
    return mode == "running" or is_nested(plan) or bool(subtracted(plan))


def is_nested(plan: SweepPlan) -> bool:
    """Whether logits of a logsumexp over tiles are made of another one."""
    full = [n for n in plan.nodes if isinstance(n, Reduction) and plan.is_full(n.name)]
    sums = [n for n in full if n.monoid == "logsumexp"]
    names = {n.name for n in sums}
    return any(s.name in names for n in sums for s in n.operand.free_symbols)


def reads_positives(plan: SweepPlan) -> bool:
    """Whether gradients are made of similarities at the positives."""
    if plan.gradient is None:
        return False
    exprs: list[sp.Expr] = []
    for made in (plan.gradient.positives, plan.gradient.vectors, plan.gradient.parameters):
        exprs += made.values()
    for step in plan.gradient.steps:
        exprs += [step.expr] if isinstance(step, Let) else step.expressions
    names = {s.name for e in exprs for s in e.free_symbols}
    return any(plan.leaves[n].kind == "similarity_at_positive" for n in names)


def _split(plan: SweepPlan, programs: Iterable[TileProgram]) -> set[str]:
    """Logsumexps that are added to tiles in two parts."""
    exprs = [e for code in programs for e, _ in code.hoisted.values() if e.has(remainder)]
    names = {s.name for e in exprs for s in e.free_symbols}
    return {n for n in names & _statistics(plan) if plan.is_full(n)}


def _symbols(node: Let | Reduction) -> frozenset[sp.Symbol]:
    symbols = node.expr.free_symbols if isinstance(node, Let) else node.free_symbols
    return frozenset(symbols)


def _read(code: TileProgram) -> set[str]:
    """Vectors that a tile's instructions read under their own names."""
    names: set[str] = set()
    for i in code.instructions:
        if isinstance(i, Compute):
            names |= {a.name for a in i.args if isinstance(a, VectorRef)}
        if isinstance(i, Diagonal):
            names |= {s.name for s in i.expr.free_symbols}
            names |= {r.name for _, r in i.reads if isinstance(r, VectorRef)}
    return names | {g.row_scale for g in code.gradients if g.row_scale}


__all__ = [
    "POSITIVES_AT_ONCE",
    "SUMMED_AT_ONCE",
    "cancelling",
    "is_nested",
    "reads_positives",
    "splits_logsumexps",
    "subtracted",
    "wide_vectors",
]
