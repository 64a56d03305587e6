"""Rewrites of pair expressions that make tiles cheaper; none of them expands or simplifies.

``exp(x - L)`` must never become ``exp(x) · exp(-L)``, which overflows: so rewrites only merge
masks, pull vectors out of products and write composite functions in terms of primitive ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import Leaf, may_be_infinite

Axes = Callable[[sp.Expr], frozenset[str]]


class shared_exp(sp.Function):
    """``exp(u - shift)`` with a scalar shift: one exponential for all logsumexps of u."""

    nargs = 2
    is_real = True


class present(sp.Function):
    """A logsumexp, or +inf where it is -inf: an empty one gives its elements no weight."""

    nargs = 1
    is_real = True


class remainder(sp.Function):
    """What rounding to a tile's dtype takes from a vector."""

    nargs = 1
    is_real = True


def tidy(expr: sp.Expr, axes: Axes) -> sp.Expr:
    """Merge sums of masks and turn products with a 0/1 mask into selections."""
    if not expr.args or len(axes(expr)) < 2:
        return expr
    expr = expr.func(*(tidy(a, axes) for a in expr.args))
    if isinstance(expr, sp.Add):
        return _merge_selects(expr, axes)
    if isinstance(expr, sp.Mul):
        for factor in expr.args:
            if is_constant_select(factor) and len(axes(factor)) > 1:
                others = [a for a in expr.args if a is not factor]
                pairs = sp.Mul(*(a for a in others if len(axes(a)) > 1))
                outer = sp.Mul(*(a for a in others if len(axes(a)) < 2))
                mask, a, b = factor.args
                return outer * fn.select(mask, a * pairs, b * pairs)
    return expr


def is_constant_select(expr: sp.Expr) -> bool:
    return isinstance(expr, fn.select) and expr.args[1].is_number and expr.args[2].is_number


def _merge_selects(expr: sp.Add, axes: Axes) -> sp.Expr:
    merged: dict[sp.Expr, tuple[sp.Expr, sp.Expr]] = {}
    rest = []
    for term in expr.args:
        number, factors = term.as_coeff_mul()
        if len(factors) == 1 and is_constant_select(factors[0]) and len(axes(factors[0])) > 1:
            mask, a, b = factors[0].args
            on, off = merged.get(mask, (fn.ZERO, fn.ZERO))
            merged[mask] = (on + number * a, off + number * b)
        else:
            rest.append(term)
    if len(rest) == len(expr.args):
        return expr
    return sp.Add(*rest, *(fn.select(m, a, b) for m, (a, b) in merged.items()))


def expand_function(expr: sp.Expr) -> sp.Expr | None:
    """A composite function in terms of primitive ones, or None."""
    if isinstance(expr, fn.logsubexp):
        a, b, floor = expr.args
        inner = fn.maximum(a + sp.log(fn.one_minus_exp(b - a)), floor)
        return fn.select(fn.greater(a, b), inner, floor)
    if isinstance(expr, fn.one_minus_exp):
        (d,) = expr.args
        return fn.select(fn.greater(fn.ZERO, d), -fn.expm1(d), fn.ONE)
    return None


class Hoister(Protocol):
    """What ``split_gradient`` needs of a lowering."""

    grid: tuple[str, str]
    leaves: dict[str, Leaf]

    def axes(self, expr: sp.Expr) -> frozenset[str]: ...
    def hoist(self, expr: sp.Expr) -> sp.Symbol: ...
    def mirrored(self, expr: sp.Expr) -> sp.Expr: ...
    def is_count(self, expr: sp.Expr) -> bool: ...
    def count_ratio(self, a: sp.Expr, b: sp.Expr) -> sp.Expr | None: ...


@dataclass(frozen=True)
class GradientPart:
    """dL/dsimilarity = scale · diag(row_scale) · pair, plus ``positive`` on the positives."""

    pair: sp.Expr
    positive: sp.Expr | None
    scale: sp.Expr = fn.ONE
    row_scale: str = ""


def _peel(term: sp.Expr, low: Hoister) -> tuple[sp.Expr, sp.Expr]:
    """(pair factor, coefficient) of a product; finite coefficients leave selections with zero."""
    axes = low.axes
    pairs: list[sp.Expr] = []
    coefficients: list[sp.Expr] = []
    for factor in sp.Mul.make_args(term):
        if len(axes(factor)) < 2:
            coefficients.append(factor)
            continue
        if isinstance(factor, fn.select) and fn.ZERO in factor.args[1:]:
            mask, a, b = factor.args
            body, coefficient = _peel(b if a == 0 else a, low)
            if len(axes(body)) > 1:
                for part in sp.Mul.make_args(coefficient):  # outside, 0 * inf would be NaN
                    if may_be_infinite(part, low.leaves):
                        body = body * part
                    else:
                        coefficients.append(part)
                zero = fn.ZERO
                factor = fn.select(mask, zero, body) if a == 0 else fn.select(mask, body, zero)
        pairs.append(factor)
    return sp.Mul(*pairs), sp.Mul(*coefficients)


def split_gradient(
    low: Hoister,
    gradient: sp.Expr,
    positive: sp.Expr | None,
    *,
    symmetric: bool,
    pull_row_scale: bool,
) -> GradientPart:
    """Group a gradient by its pair factors and take out what need not touch the tile.

    ``symmetric``: add the transposed tile.  ``pull_row_scale``: leave a positive row factor to the
    operands, so that an exponential's tile needs no multiplication at all.
    """
    groups: dict[sp.Expr, list[sp.Expr]] = {}
    masked: dict[sp.Expr, list[sp.Expr]] = {}

    def add(term: sp.Expr) -> None:
        pair, coefficient = _peel(term, low)
        if (
            isinstance(pair, fn.select)
            and pair.args[2] == 0
            and (len(low.axes(pair.args[1])) < 2 and low.axes(pair.args[0]))
        ):
            masked.setdefault(pair.args[0], []).append(coefficient * pair.args[1])
        else:
            groups.setdefault(pair, []).append(coefficient)

    terms = sp.Add.make_args(gradient)
    for term in terms:
        add(term)
    if symmetric:
        for term in terms:
            pair, coefficient = _peel(term, low)
            add(low.mirrored(pair) * _mirror_product(low, coefficient))
        if positive is not None:
            flipped = fn.to_rows(positive) if low.axes(positive) else positive
            positive = positive + flipped
    if len(groups) == 1 and not masked:
        ((pair, coefficients),) = groups.items()
        whole = sp.Add(*coefficients)
        if low.is_count(whole) and whole != 0:
            return GradientPart(pair, None if positive is None else positive / whole, whole)
        inverse = _inverse_factor(low, whole)
        if pull_row_scale and inverse is not None:
            scaled = None if positive is None else positive / inverse
            return GradientPart(pair, scaled, row_scale=low.hoist(inverse).name)
    if groups and not masked:
        common = sp.Add(*next(iter(groups.values())))
        ratios = [low.count_ratio(sp.Add(*c), common) for c in groups.values()]
        if None not in ratios:
            pairs = sp.Add(*(pair * r for pair, r in zip(groups, ratios, strict=True)))
            if positive is not None:
                ratio = low.count_ratio(positive, common)
                positive = positive / common if ratio is None else ratio
            return GradientPart(pairs, positive, common)
    total = [pair * _by_axis(low, c) for pair, c in groups.items()]
    total += [fn.select(mask, _by_axis(low, c), fn.ZERO) for mask, c in masked.items()]
    return GradientPart(sp.Add(*total), positive)


def _inverse_factor(low: Hoister, whole: sp.Expr) -> sp.Expr | None:
    """The coefficient, if it is an inverse sum of exponentials times counts: never zero."""
    rest = fn.ONE
    found = False
    for factor in sp.Mul.make_args(whole):
        if isinstance(factor, sp.Symbol) and factor.name.startswith("inv_"):
            if low.axes(factor) != {low.grid[0]}:
                return None
            found = True
        else:
            rest = rest * factor
    return whole if found and low.is_count(rest) else None


def _mirror_product(low: Hoister, coefficient: sp.Expr) -> sp.Expr:
    return sp.Mul(*(low.mirrored(f) for f in sp.Mul.make_args(coefficient)))


def _by_axis(low: Hoister, coefficients: list[sp.Expr]) -> sp.Expr:
    """Sum coefficients, each axis gathered into one vector."""
    total = sp.Add(*coefficients)
    by_axis: dict[frozenset[str], list[sp.Expr]] = {}
    for term in sp.Add.make_args(total):
        by_axis.setdefault(low.axes(term), []).append(term)
    parts = []
    for axes in sorted(by_axis, key=sorted):
        part = sp.Add(*by_axis[axes])
        parts.append(part if len(axes) > 1 or part.is_number else low.hoist(part))
    return sp.Add(*parts)
