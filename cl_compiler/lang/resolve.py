"""Decide what a positive is, and which parameter is a logit scale.

``resolve`` rewrites a traced loss for one kind of positives:

* ``diagonal``: the positive of row i is column i (N ≥ M; columns beyond M have none);
* ``paired``: the same where M = N, so that every column has a positive too;
* ``views``: of one set of 2b embeddings, rows i and i + b are positives of each other;
* ``ids``: positive where ids are equal; masks become tiles, several positives are averaged.

For the first three every row has exactly one positive, so whatever touches positives only becomes a
vector computed in O(M·D), and no sweep over the matrix is needed for it.  ``paired`` and ``views``
are one to one: no column is without a positive, and no mask or count of such columns remains.

``fold_scales`` then finds parameters that multiply a similarity in its every use; the product is
what a tile holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import COLS, ROWS, Leaf, LossIR, Reduction, axes_of, ordered

Positives = Literal["diagonal", "paired", "views", "ids"]
ONE_TO_ONE: frozenset[Positives] = frozenset({"paired", "views"})
"""Kinds for which rows and their positive columns are a bijection."""
IS_POSITIVE = sp.Symbol("is_positive", real=True)


class _Resolver:
    def __init__(self, ir: LossIR, positives: Positives) -> None:
        self.ir, self.by_ids = ir, positives == "ids"
        self.one_to_one = positives in ONE_TO_ONE
        self.leaves: dict[str, Leaf] = dict(ir.leaves)
        self.reductions: list[Reduction] = []
        self.values: dict[sp.Symbol, sp.Expr] = {}

    def add(self, red: Reduction, axes: Iterable[str]) -> sp.Symbol:
        for known in self.reductions:
            if replace(known, name="") == replace(red, name=""):
                return self.leaves[known.name].symbol
        self.leaves[red.name] = leaf = Leaf(red.name, "reduction", ordered(axes))
        self.reductions.append(red)
        return leaf.symbol

    def move(self, expr: sp.Expr, to: str) -> sp.Expr:
        """Carry a vector to the other axis along the pairing of rows and their positives."""
        monoid = "to_rows" if to == ROWS else "to_cols"
        if self.one_to_one and not axes_of(expr, self.leaves):
            return expr  # a number that every column has
        if isinstance(expr, sp.Symbol) and (to == ROWS or self.one_to_one):
            back = "to_cols" if to == ROWS else "to_rows"
            for red in self.reductions:  # every row has a positive, so there and back is nothing
                if red.name == expr.name and red.monoid == back:
                    return red.operand
        over = COLS if to == ROWS else ROWS
        name = f"p{sum(r.monoid in ('to_rows', 'to_cols') for r in self.reductions)}"
        return self.add(Reduction(name, monoid, over, expr), (to,))  # type: ignore[arg-type]

    def at_row(self, expr: sp.Expr) -> sp.Expr:
        """A pair expression at each row's positive: a row vector."""
        axes = axes_of(expr, self.leaves)
        if COLS not in axes:
            return expr
        if axes == {COLS}:
            return self.move(expr, ROWS)
        if isinstance(expr, sp.Symbol):
            leaf = self.leaves[expr.name]
            if leaf.kind == "is_positive":
                return fn.ONE
            if leaf.kind == "is_self":
                return fn.ZERO
            name = f"{leaf.name}_pos"
            new = replace(leaf, name=name, kind="similarity_at_positive", axes=(ROWS,))
            self.leaves[name] = new
            return new.symbol
        return expr.func(*(self.at_row(a) for a in expr.args))

    def decided(self, expr: sp.Expr) -> sp.Expr:
        """With comparisons decided in which a positive meets its own value.

        What tiles hold and the vector at positives are rounded differently: ``s < p`` would be
        true of some positives themselves, ``max(s) > p`` of some that are the maximum.
        """
        if self.by_ids:
            return expr
        known = {}
        for mask in expr.atoms(fn.greater, fn.greater_equal):
            if not self.reads_positives(mask):
                continue
            if axes_of(mask, self.leaves) != {ROWS, COLS}:
                if self._is_of_itself(mask.xreplace(self._maxima(mask))):
                    known[mask] = mask.xreplace(self._maxima(mask, beside_others=True))
            elif self._is_of_itself(mask):
                self.leaves.setdefault(IS_POSITIVE.name, _is_positive())
                known[mask] = (
                    fn.mask_and(fn.mask_not(IS_POSITIVE), mask)
                    if isinstance(mask, fn.greater)
                    else fn.mask_or(IS_POSITIVE, mask)
                )
        return expr.xreplace(known)

    def _is_of_itself(self, comparison: sp.Expr) -> bool:
        """Whether both sides of a comparison are the same where a pair is a positive."""
        left, right = (self.at_row(a) for a in comparison.args)
        gap = (left - right).replace(fn.stop_gradient, lambda value: value)
        return bool(sp.expand(gap) == 0)

    def _maxima(self, mask: sp.Expr, *, beside_others: bool = False) -> dict[sp.Symbol, sp.Expr]:
        """Maxima that a mask compares, a positive among their elements, as that positive's value.

        ``beside_others``: as the larger of this and of a maximum of all other elements.
        """
        found: dict[sp.Symbol, sp.Expr] = {}
        for red in [r for r in self.reductions if r.monoid == "max"]:
            symbol = self.leaves[red.name].symbol
            pairs = axes_of(red.operand, self.leaves) == {ROWS, COLS}
            paired = red.over == COLS or (red.over == ROWS and self.one_to_one)
            if not (symbol in mask.free_symbols and pairs and paired):
                continue
            if self.at_row(red.where) != 1:
                continue
            axis = ROWS if red.over == COLS else COLS
            found[symbol] = self.on_axis(self.at_row(red.operand), axis)
            if beside_others:
                self.leaves.setdefault(IS_POSITIVE.name, _is_positive())
                where = fn.mask_and(red.where, fn.mask_not(IS_POSITIVE))
                others = replace(red, name=f"{red.name}_others", where=where)
                found[symbol] = fn.maximum(self.add(others, (axis,)), found[symbol])
        return found

    def reads_positives(self, expr: sp.Expr) -> bool:
        """Whether vectors of values at positives, of rows or moved to columns, occur."""
        moved = {r.name for r in self.reductions if r.monoid in ("to_rows", "to_cols")}
        leaves = [self.leaves[s.name] for s in expr.free_symbols]
        return any(leaf.kind == "similarity_at_positive" or leaf.name in moved for leaf in leaves)

    def on_axis(self, row_vector: sp.Expr, axis: str) -> sp.Expr:
        return row_vector if axis == ROWS else self.move(row_vector, COLS)

    def resolve(self, red: Reduction) -> sp.Expr:
        red = replace(
            red,
            operand=self.decided(red.operand.xreplace(self.values)),
            where=self.decided(red.where.xreplace(self.values)),
            logits=None if red.logits is None else self.decided(red.logits.xreplace(self.values)),
        )
        axes = self.ir.leaves[red.name].axes
        target = COLS if red.over == ROWS else ROWS
        if red.monoid == "at_positive":
            if not self.by_ids:
                return self.on_axis(self.at_row(red.operand), target)
            return self.mean_of_positives(red, axes)
        if red.monoid == "sum" and isinstance(red.operand, fn.select) and red.operand.args[2] == 0:
            mask, value, _ = red.operand.args
            red = replace(red, operand=value, where=fn.mask_and(red.where, mask))
        if not self.by_ids and (rest := _without_positive(red.where)) is not None:
            keep, value = self.at_row(rest), self.at_row(red.operand)
            if red.monoid == "sum":
                return self.on_axis(fn.select(keep, value, fn.ZERO), target)
            if keep == 1 and red.over == COLS:
                return value  # one element: its logsumexp, its max, its mean
        if red.monoid == "sum" and red.where == 0:
            return fn.ZERO
        if (
            red.monoid == "sum"
            and red.where == 1
            and (red.over not in axes_of(red.operand, self.leaves))
        ):
            count = Leaf(f"n_{red.over.rstrip('2')}", "count", ())
            self.leaves.setdefault(count.name, count)
            return red.operand * count.symbol
        if red.monoid == "softmean":
            assert red.logits is not None
            self.add(
                Reduction(f"{red.name}_lse", "logsumexp", red.over, red.logits, red.where), axes
            )
        return self.add(red, axes)

    def mean_of_positives(self, red: Reduction, axes: tuple[str, ...]) -> sp.Expr:
        total = self.add(
            Reduction(f"{red.name}_sum", "sum", red.over, red.operand, IS_POSITIVE), axes
        )
        number = self.add(
            Reduction(f"{red.name}_count", "sum", red.over, fn.ONE, IS_POSITIVE), axes
        )
        some = fn.greater(number, fn.ZERO)
        return fn.select(some, total / fn.maximum(number, fn.ONE), fn.ZERO)


def _is_positive() -> Leaf:
    return Leaf(IS_POSITIVE.name, "is_positive", (ROWS, COLS))


def _without_positive(where: sp.Expr) -> sp.Expr | None:
    """The other conjuncts of a mask that includes ``is_positive``; None if it does not."""
    if where == IS_POSITIVE:
        return fn.ONE
    if isinstance(where, fn.mask_and):
        a, b = where.args
        for one, other in ((a, b), (b, a)):
            if (rest := _without_positive(one)) is not None:
                return fn.mask_and(rest, other)
    return None


def resolve(ir: LossIR, positives: Positives) -> LossIR:
    """Replace ``at_positive`` and everything that only touches positives; see the module."""
    work = _Resolver(ir, positives)
    for red in ir.reductions:
        work.values[ir.leaves[red.name].symbol] = work.resolve(red)
    required = [(n, work.decided(e.xreplace(work.values))) for n, e in ir.required]
    resolved = replace(
        ir,
        value=work.decided(ir.value.xreplace(work.values)),
        outputs=tuple((n, work.decided(e.xreplace(work.values))) for n, e in ir.outputs),
        required=tuple((n, e) for n, e in required if not e.is_positive),
        reductions=tuple(work.reductions),
        leaves=MappingProxyType(work.leaves),
    )
    return _drop_unused(resolved)


def _drop_unused(ir: LossIR) -> LossIR:
    """Remove reductions and leaves that nothing reads."""
    needed = set(ir.value.free_symbols)
    for _, expr in (*ir.outputs, *ir.required):
        needed |= expr.free_symbols
    kept = []
    for red in reversed(ir.reductions):
        if ir.leaves[red.name].symbol in needed:
            kept.append(red)
            needed |= red.free_symbols
            if red.monoid == "softmean":  # its logsumexp is its other half
                needed.add(ir.leaves[f"{red.name}_lse"].symbol) if (
                    f"{red.name}_lse" in ir.leaves
                ) else None
    names = {s.name for s in needed} | set(ir.parameters) | {"is_positive"}
    names |= {n.removesuffix("_pos") for n in names}  # the matrix of a value at the positives
    leaves = {n: leaf for n, leaf in ir.leaves.items() if n in names or leaf.kind == "count"}
    return replace(ir, reductions=tuple(reversed(kept)), leaves=MappingProxyType(leaves))


# ---- logit scales ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaledLoss:
    """A loss whose similarities carry their scale, and how each scale's gradient is read off.

    ``dots[p]``: dL/dp gets the sum of weight · <op, d op> over its (operand, weight), where d op
    is the operand's gradient before the scale is applied: no N² work for it.
    """

    ir: LossIR
    dots: Mapping[str, tuple[tuple[str, Fraction], ...]]


def fold_scales(ir: LossIR, needs: frozenset[str]) -> ScaledLoss:
    """Fold every parameter that multiplies a similarity in all its uses into the similarity.

    A parameter whose gradient is needed is folded only if that gradient can be read off from the
    operands' gradients; otherwise it stays explicit and its gradient is summed over tiles.
    """
    dots: dict[str, tuple[tuple[str, Fraction], ...]] = {}
    for parameter in ir.parameters:
        names = [
            n
            for n, leaf in ir.leaves.items()
            if leaf.kind == "similarity" and leaf.scale is None and _multiplies(ir, parameter, leaf)
        ]
        if not names:
            continue
        if parameter in needs:
            found = _dot_operands(ir, names, needs)
            if found is None:
                continue
            dots[parameter] = found
        ir = _substitute(ir, parameter, names)
    return ScaledLoss(ir, MappingProxyType(dots))


def _all_expressions(ir: LossIR) -> list[sp.Expr]:
    exprs = [e for r in ir.reductions for e in r.expressions]
    return [*exprs, ir.value, *(e for _, e in ir.outputs), *(e for _, e in ir.required)]


def _family(ir: LossIR, leaf: Leaf) -> list[Leaf]:
    """A similarity and the same matrix at the positives."""
    positive = ir.leaves.get(f"{leaf.name}_pos")
    return [leaf] if positive is None else [leaf, positive]


def _inverse_powers(expr: sp.Expr, symbol: sp.Symbol) -> set[sp.Expr]:
    return {p for p in expr.atoms(sp.Pow) if p.has(symbol)}


def _multiplies(ir: LossIR, parameter: str, leaf: Leaf) -> bool:
    scale = ir.leaves[parameter].symbol
    members = _family(ir, leaf)
    quotient = {m.symbol: sp.Symbol(f"{m.name}__scaled", real=True) / scale for m in members}
    symbols = set(quotient)
    seen = False
    for expr in _all_expressions(ir):
        if not symbols & expr.free_symbols:
            continue
        seen = True
        if _inverse_powers(expr.xreplace(quotient), scale) - _inverse_powers(expr, scale):
            return False
    return seen


def _dot_operands(
    ir: LossIR, names: list[str], needs: frozenset[str]
) -> tuple[tuple[str, Fraction], ...] | None:
    sims = {n: leaf for n, leaf in ir.leaves.items() if leaf.kind == "similarity"}

    def uses(operand: str, leaf: Leaf) -> int:
        assert leaf.left is not None and leaf.right is not None
        return (leaf.left.operand == operand) + (leaf.right.operand == operand)

    touched = [op.name for op in ir.operands if any(uses(op.name, ir.leaves[n]) for n in names)]
    exclusive = [
        name
        for name in touched
        if name in needs and all(n in names for n, leaf in sims.items() if uses(name, leaf))
    ]
    for name in exclusive:
        if all(uses(name, ir.leaves[n]) == 1 for n in names):
            return ((name, Fraction(1)),)
    if exclusive == touched:
        return tuple((name, Fraction(1, 2)) for name in touched)
    return None


def _substitute(ir: LossIR, parameter: str, names: list[str]) -> LossIR:
    scale = ir.leaves[parameter].symbol
    leaves, mapping = dict(ir.leaves), {}
    for name in names:
        for member in _family(ir, ir.leaves[name]):
            proposal = member.name.replace("sim", "logits", 1)
            while proposal in leaves:  # a parameter of that name
                proposal += "_"
            new = replace(member, name=proposal, scale=parameter)
            del leaves[member.name]
            leaves[new.name] = new
            mapping[member.symbol] = new.symbol / scale

    def swap(expr: sp.Expr) -> sp.Expr:
        return expr.xreplace(mapping)

    return replace(
        ir,
        leaves=MappingProxyType(leaves),
        value=swap(ir.value),
        outputs=tuple((n, swap(e)) for n, e in ir.outputs),
        required=tuple((n, swap(e)) for n, e in ir.required),
        reductions=tuple(
            replace(
                r,
                operand=swap(r.operand),
                where=swap(r.where),
                logits=None if r.logits is None else swap(r.logits),
            )
            for r in ir.reductions
        ),
    )
