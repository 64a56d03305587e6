"""The symbols of the planner's expressions: lengths of axes, widths, element bytes, tile sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy as sp

from cl_compiler.lang.ir import BANK, COLS, COLS2, ROWS, ROWS2, SLOTS, Operand, View


def _size(name: str) -> sp.Symbol:
    return sp.Symbol(name, positive=True)


# M, N: rows and columns of one device; K: slots per row; Q: length of the bank.
M, N, K, Q = map(_size, ("M", "N", "K", "Q"))
D = _size("D")
TILE_ROWS, TILE_COLS = _size("m"), _size("n")
INPUT_BYTES, COMPUTE_BYTES = _size("e_in"), _size("e_c")
KEPT = sp.Symbol("kept", nonnegative=True)
"""Tiles that are kept from the forward to the backward."""
SCRATCH = sp.Symbol("scratch", nonnegative=True)
"""1 where a tile that is not kept needs a place of its own, else 0."""

STRIP_ELEMENTS = sp.Symbol("strip", positive=True)
"""Elements of a strip of a tile: half of what the caches nearest to the cores hold."""
STRIP_GRAIN = 16
"""Strips are multiples of this many columns."""

ONE = sp.Integer(1)


@dataclass(frozen=True)
class Sizes:
    """Which symbol is how long; ``extra``: operands whose width is not D."""

    extra: frozenset[str]

    def length(self, axis: str) -> sp.Symbol:
        """Of one axis."""
        return {ROWS: M, COLS: N, ROWS2: M, COLS2: N, SLOTS: K, BANK: Q}[axis]

    def vector(self, axes: Iterable[str]) -> sp.Expr | None:
        """Elements of a vector; None for scalars, which nobody counts."""
        names = tuple(axes)
        return sp.Mul(*(self.length(a) for a in names)) if names else None

    def rows_of(self, op: Operand) -> sp.Expr:
        """Of an operand; rows and columns of one set are the same."""
        length = N if op.axes == (ROWS, COLS) else self.vector(op.axes)
        assert length is not None
        return length

    def operand_width(self, operand: str) -> sp.Expr:
        return _size(f"D_{operand}") if operand in self.extra else D

    def width(self, view: View | None) -> sp.Expr:
        assert view is not None
        return self.operand_width(view.operand) if view.prefix is None else sp.Integer(view.prefix)


def least(a: sp.Expr, b: sp.Expr) -> sp.Expr:
    """Min(a, b), not simplified: SymPy's own evaluation takes longer than planning may."""
    return a if a == b else sp.Min(a, b, evaluate=False)


def largest(exprs: Iterable[sp.Expr]) -> sp.Expr:
    """Max, not simplified either."""
    distinct = sorted(set(exprs), key=str)
    return distinct[0] if len(distinct) == 1 else sp.Max(*distinct, evaluate=False)


def count_of(length: sp.Expr, step: sp.Expr) -> sp.Expr:
    """How many tiles cover ``length``."""
    return sp.Integer(1) if length == step else sp.ceiling(length / step, evaluate=False)


def strip_columns(rows: sp.Expr) -> sp.Expr:
    """Columns of a strip of a tile with so many rows, before it is clipped to the tile."""
    grains = sp.floor(STRIP_ELEMENTS / (STRIP_GRAIN * rows), evaluate=False)
    return STRIP_GRAIN * sp.Max(1, grains, evaluate=False)


__all__ = [
    "COMPUTE_BYTES",
    "INPUT_BYTES",
    "KEPT",
    "ONE",
    "SCRATCH",
    "STRIP_ELEMENTS",
    "STRIP_GRAIN",
    "TILE_COLS",
    "TILE_ROWS",
    "D",
    "K",
    "M",
    "N",
    "Q",
    "Sizes",
    "count_of",
    "largest",
    "least",
    "strip_columns",
]
