"""Which vectors tiles of fp32 need in fp64: those that gradients subtract from each other.

A logsumexp of l, rounded to fp32, is off by up to 2^-24·l.  In weights exp(logit - l) that is what
the logit's own rounding does.  But a loss that takes log(e^l - e^p), or logaddexp(l, p), weighs its
rows by functions of l - p, whose error is as large however close l and p are; the dense formula has
the sums themselves, each right to 2^-24 of its own.  So what is as small as a difference of two
statistics is made of statistics in fp64.  Sums are fp32 as in the dense formula, and so is all that
a tile reads.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

from cl_compiler.lang.ir import Let, Reduction, axes_of
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Compute, Diagonal, TileProgram, VectorRef


def wide_vectors(plan: SweepPlan, programs: Iterable[TileProgram]) -> frozenset[str]:
    """Names of vectors to keep in fp64: statistics, positives, and what is made of them.

    Args:
        plan: a loss, its gradients and sweeps.
        programs: of all its passes; what one of them reads as it stands is as wide as a tile.
    """
    read = {name for code in programs for name in _read(code)}
    wide = subtracted(plan) - read
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


__all__ = ["subtracted", "wide_vectors"]
