"""``differentiate``: every gradient of a resolved loss, as expressions over tiles and vectors.

Reverse sweep over the reductions.  The adjoint A of a reduction q is one vector.  What q adds to an
inner statistic r is A · d(operand)/dr summed over the axes that r lacks; factors that do not vary
along a summed axis leave the sum, so that where possible the sum does not depend on A and can be
taken while the forward sweep has the tile in its hands.  Equal sums are one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from types import MappingProxyType

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import (
    COLS,
    ROWS,
    GradientIR,
    Leaf,
    Let,
    LossIR,
    Reduction,
    axes_of,
    check_pair,
    may_be_infinite,
    ordered,
    reduction_axes,
)

_LEAF_KINDS = ("similarity", "similarity_at_positive", "input", "norm", "parameter")


class _Reverse:
    def __init__(self, ir: LossIR) -> None:
        self.ir = ir
        self.leaves: dict[str, Leaf] = dict(ir.leaves)
        self.steps: list[Let | Reduction] = []
        self.sums: dict[tuple[str, sp.Expr, sp.Expr], sp.Symbol] = {}

    def let(self, name: str, expr: sp.Expr) -> sp.Expr:
        if expr.is_number or isinstance(expr, sp.Symbol):
            return expr
        leaf = Leaf(name, "adjoint", ordered(axes_of(expr, self.leaves)))
        self.leaves[name] = leaf
        self.steps.append(Let(name, expr))
        return leaf.symbol

    def sum_over(self, axis: str, operand: sp.Expr, where: sp.Expr) -> sp.Symbol:
        key = (axis, operand, where)
        if key not in self.sums:
            for known in self.ir.reductions:
                if (known.monoid, known.over, known.operand, known.where) == ("sum", *key):
                    self.sums[key] = self.leaves[known.name].symbol
                    return self.sums[key]
            red = Reduction(f"t{len(self.sums)}", "sum", axis, operand, where)
            full = reduction_axes(red, self.leaves)
            check_pair(full, f"{self.ir.name}: a gradient")
            self.leaves[red.name] = leaf = Leaf(red.name, "reduction", ordered(full - {axis}))
            self.steps.append(red)
            self.sums[key] = leaf.symbol
        return self.sums[key]

    def spread(
        self, red: Reduction, adjoint: sp.Expr, local: sp.Expr, where: sp.Expr, to: frozenset[str]
    ) -> sp.Expr:
        """``adjoint · local`` where the mask holds, summed over the axes that ``to`` lacks."""
        missing = reduction_axes(red, self.leaves) - to
        order = [a for a in (red.over,) if a in missing]
        order += [a for a in ordered(missing) if a != red.over]
        body = adjoint * local
        for axis in order:
            masked = axis in axes_of(where, self.leaves)
            varying: list[sp.Expr] = []
            fixed: list[sp.Expr] = []
            for factor in sp.Mul.make_args(body):
                stays = masked and may_be_infinite(factor, self.leaves)
                stays = stays or axis in axes_of(factor, self.leaves)
                (varying if stays else fixed).append(factor)
            if not varying and not masked:
                total: sp.Expr = self.count(axis)
            else:
                total = self.sum_over(axis, sp.Mul(*varying), where if masked else fn.ONE)
                where = fn.ONE if masked else where
            body = sp.Mul(*fixed) * total
        return body if where == 1 else fn.select(where, body, fn.ZERO)

    def count(self, axis: str) -> sp.Symbol:
        name = f"n_{axis.rstrip('2')}"
        self.leaves.setdefault(name, Leaf(name, "count", ()))
        return self.leaves[name].symbol

    def local_terms(self, red: Reduction) -> list[tuple[sp.Expr, sp.Expr, sp.Expr]]:
        """(expression, d red / d expression, mask) for what a reduction reads."""
        symbol = self.leaves[red.name].symbol
        match red.monoid:
            case "logsumexp":
                return [(red.operand, fn.softmax_weight(red.operand, symbol), red.where)]
            case "sum":
                return [(red.operand, fn.ONE, red.where)]
            case "max":
                hit = fn.mask_and(red.where, fn.equal(red.operand, symbol))
                ties = self.sum_over(red.over, fn.ONE, hit)
                return [(red.operand, 1 / fn.maximum(ties, fn.ONE), hit)]
            case "softmean":
                assert red.logits is not None
                lse = next(
                    self.leaves[r.name].symbol
                    for r in self.ir.reductions
                    if (r.monoid, r.over, r.operand, r.where)
                    == ("logsumexp", red.over, red.logits, red.where)
                )
                weight = fn.softmax_weight(red.logits, lse)
                return [
                    (red.operand, weight, red.where),
                    (red.logits, weight * (red.operand - symbol), red.where),
                ]
            case _:
                raise AssertionError(red.monoid)


def differentiate(
    ir: LossIR,
    needs: frozenset[str],
    dots: Mapping[str, tuple[tuple[str, Fraction], ...]] = MappingProxyType({}),
    *,
    one_to_one: bool = False,
) -> GradientIR:
    """Gradients of ``ir.value`` with respect to ``needs``: operands, inputs and parameters.

    ``ir`` must be resolved.  ``dots`` (see ``fold_scales``) names what is read off afterwards; the
    similarities' gradients are then with respect to the scaled similarity.  ``one_to_one``: every
    column is the positive of exactly one row.

    Raises:
        LossDefinitionError: a gradient would need triples.
    """
    work = _Reverse(ir)
    targets = {
        name: leaf
        for name, leaf in ir.leaves.items()
        if leaf.kind in _LEAF_KINDS and _is_needed(leaf, needs)
    }
    adjoints = {r.name: [sp.diff(ir.value, ir.leaves[r.name].symbol)] for r in ir.reductions}
    gradients = {n: [sp.diff(ir.value, leaf.symbol)] for n, leaf in targets.items()}
    active = _active(ir, targets)
    for red in reversed(ir.reductions):
        total = sp.Add(*adjoints[red.name])
        if total == 0 or red.name not in active:
            continue
        adjoint = work.let(f"a_{red.name}", total)
        if red.monoid in ("to_rows", "to_cols"):
            varies = bool(axes_of(adjoint, work.leaves))
            if red.monoid == "to_rows":
                back = fn.to_cols(adjoint) if varies or not one_to_one else adjoint
            else:  # every row has a positive, so a scalar read there stays a scalar
                back = fn.to_rows(adjoint) if varies else adjoint
            source = COLS if red.monoid == "to_rows" else ROWS
            terms = [(red.operand, back, fn.ONE)]
            adjoint = fn.ONE
        else:
            terms = work.local_terms(red)
        for expr, local, where in terms:
            for symbol in sorted(expr.free_symbols, key=str):
                into = gradients if symbol.name in targets else adjoints
                if symbol.name not in into or (into is adjoints and symbol.name not in active):
                    continue
                derivative = sp.diff(expr, symbol)
                if derivative == 0:
                    continue
                to = frozenset(ir.leaves[symbol.name].axes)
                if red.monoid in ("to_rows", "to_cols"):
                    into[symbol.name].append(_sum_vector(work, local * derivative, source, to))
                else:
                    into[symbol.name].append(
                        work.spread(red, adjoint, local * derivative, where, to)
                    )
    result = {name: sp.Add(*terms) for name, terms in gradients.items()}

    def of(kind: str) -> Mapping[str, sp.Expr]:
        return MappingProxyType(
            {n: e for n, e in result.items() if targets[n].kind == kind and e != 0}
        )

    vectors = {**of("input"), **of("norm")}
    positives = {n.removesuffix("_pos"): e for n, e in of("similarity_at_positive").items()}
    return GradientIR(
        leaves=MappingProxyType(work.leaves),
        steps=_used(work.steps, result.values()),
        similarities=of("similarity"),
        positives=MappingProxyType(positives),
        vectors=MappingProxyType(vectors),
        parameters=of("parameter"),
        dots=dots,
    )


def _used(steps: list[Let | Reduction], results: Iterable[sp.Expr]) -> tuple[Let | Reduction, ...]:
    """The steps that some result reads: a dead one could cost a sweep."""
    needed = {s.name for e in results for s in e.free_symbols}
    kept = []
    for step in reversed(steps):
        if step.name in needed:
            kept.append(step)
            symbols = step.expr.free_symbols if isinstance(step, Let) else step.free_symbols
            needed |= {s.name for s in symbols}
    return tuple(reversed(kept))


def _sum_vector(work: _Reverse, expr: sp.Expr, axis: str, to: frozenset[str]) -> sp.Expr:
    """Sum what holds for every element of ``axis`` where the target is a scalar."""
    if axis in to:
        return expr
    if axis not in axes_of(expr, work.leaves):
        return expr * work.count(axis)
    return work.sum_over(axis, expr, fn.ONE)


def _is_needed(leaf: Leaf, needs: frozenset[str]) -> bool:
    if leaf.kind in ("input", "parameter"):
        return leaf.name in needs
    views = [v for v in (leaf.left, leaf.right) if v is not None]
    return any(v.operand in needs and not v.stop for v in views)


def _active(ir: LossIR, targets: Mapping[str, Leaf]) -> set[str]:
    """Reductions through which some target influences the value."""
    active: set[str] = set()
    for red in ir.reductions:
        if any(s.name in active or s.name in targets for s in red.free_symbols):
            active.add(red.name)
    return active
