"""Masks and selections: written to the diagonals that they are known on, tiles elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.ir import COLS, ROWS
from cl_compiler.lang.rewrite import tidy
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Diagonal, Ref, ScalarRef, TileRef

if TYPE_CHECKING:
    from cl_compiler.lang.lower import Lowering


@dataclass(frozen=True)
class Special:
    """A diagonal on which structural masks have known values."""

    where: Literal["self", "positive"]
    values: Mapping[sp.Symbol, sp.Integer]


def specials(plan: SweepPlan, grid: tuple[str, str]) -> tuple[Special, ...]:
    """The special diagonals of a grid."""
    is_self = sp.Symbol(f"is_self_{grid[0]}_{grid[1]}", real=True)
    positive = sp.Symbol("is_positive", real=True)
    on_self = Special("self", {is_self: fn.ONE, positive: fn.ZERO})
    on_positive = Special("positive", {positive: fn.ONE, is_self: fn.ZERO})
    if grid != (ROWS, COLS):
        return (on_self,)
    if plan.positives == "ids":  # is_positive is a tile that is already 0 on the diagonal
        return (Special("self", {is_self: fn.ONE}),) if plan.ir.is_single_set else ()
    return (on_self, on_positive) if plan.ir.is_single_set else (on_positive,)


class MaskLowering:
    """The part of a lowering that knows of diagonals."""

    def __init__(self, lowering: Lowering) -> None:
        self.low = lowering
        self.specials = specials(lowering.plan, lowering.grid)
        self.structural = {s for special in self.specials for s in special.values}

    def interior(self, expr: sp.Expr) -> sp.Expr:
        return expr.xreplace(dict.fromkeys(self.structural, fn.ZERO))

    def diagonal(
        self,
        base: int,
        where: Literal["self", "positive"],
        how: Literal["negate", "fill", "set", "add"],
        expr: sp.Expr,
        reads: tuple[tuple[sp.Symbol, Ref], ...] = (),
        is_mask: bool = False,
    ) -> TileRef:
        value = self.low.new()
        self.low.code.append(Diagonal(value, base, where, how, expr, reads, is_mask))
        if is_mask:
            self.low.masks.add(value)
        return TileRef(value)

    def mixed_mask(self, expr: sp.Expr) -> Ref:
        """A mask with structural parts: its interior form, corrected on the special diagonals."""
        inside = self.interior(expr)
        ref = (
            self.low.compute("mask_fill", ScalarRef(inside))
            if inside.is_number
            else (self.low.lower(inside))
        )
        if not isinstance(ref, TileRef):
            ref = self.low.compute("mask_copy", ref)
        for special in self.specials:
            value = expr.xreplace(dict(special.values))
            if value == inside:
                continue
            if value.is_number:
                ref = self.diagonal(ref.value, special.where, "fill", value, is_mask=True)
            else:
                full = self.low.lower(value)
                mark = sp.Symbol("full", real=True)
                reads = ((mark, full),)
                ref = self.diagonal(ref.value, special.where, "set", mark, reads, is_mask=True)
        return ref

    def select(self, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> Ref:
        if mask.free_symbols and mask.free_symbols <= self.structural:
            return self.structural_select(mask, a, b)
        if a.is_number and not b.is_number:
            return self.low.compute(
                "fill_where", self.to_tile(b), self.low.lower(mask), self.low.outer(a)
            )
        if b.is_number and not a.is_number:
            inverse = self.low.lower(fn.mask_not(mask))
            return self.low.compute("fill_where", self.to_tile(a), inverse, self.low.outer(b))
        if a == 1 and b == 0:
            return self.low.compute("from_mask", self.low.lower(mask))
        if a.is_number:
            base = self.low.compute("fill", self.low.outer(b))
            return self.low.compute("fill_where", base, self.low.lower(mask), self.low.outer(a))
        on_false = self.to_tile(b)
        opposite = a + b == 0 and isinstance(on_false, TileRef)
        on_true = self.low.compute("neg", on_false) if opposite else self.to_tile(a)
        return self.low.compute("where", self.low.lower(mask), on_true, on_false)

    def to_tile(self, expr: sp.Expr) -> Ref:
        ref = self.low.lower(expr)
        if self.low.is_mask_tile(ref):
            return self.low.compute("from_mask", ref)
        return self.low.compute("fill", ref) if isinstance(ref, ScalarRef) else ref

    def structural_select(self, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> Ref:
        inside = a if self.interior(mask) == 1 else b
        ref: Ref = TileRef(self.low.tile(inside))
        for special in self.specials:
            chosen = fn.select(mask, a, b).xreplace(dict(special.values))
            here = inside.xreplace(dict(special.values))
            if chosen == here:
                continue
            assert isinstance(ref, TileRef)
            if chosen.is_number:
                ref = self.diagonal(ref.value, special.where, "fill", chosen)
            elif sp.Add(chosen, here) == 0:
                ref = self.diagonal(ref.value, special.where, "negate", fn.ZERO)
            else:
                expr, reads = self.on_diagonal(chosen)
                ref = self.diagonal(ref.value, special.where, "set", expr, reads)
        return ref

    def on_diagonal(self, expr: sp.Expr) -> tuple[sp.Expr, tuple[tuple[sp.Symbol, Ref], ...]]:
        """``expr`` over placeholders, and what each stands for (tiles, vectors)."""
        reads: dict[sp.Symbol, Ref] = {}

        def walk(e: sp.Expr) -> sp.Expr:
            if not self.low.is_pair(e):
                if not self.low.axes(e):
                    return e if e.is_number else self.low.hoist(e)
            elif not (e in self.low.memo or isinstance(e, sp.Symbol)):
                return e.func(*(walk(a) for a in e.args))
            mark = sp.Symbol(f"d{len(reads)}", real=True)
            reads[mark] = self.low.lower(e)
            return mark

        return walk(tidy(expr, self.low.axes)), tuple(reads.items())


__all__ = ["MaskLowering"]
