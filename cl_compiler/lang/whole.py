"""All pairs in one tile: every level of a grid lowered together, into one straight line.

A tile that is made for one level is there for the next, and every logsumexp comes with the softmax
that the gradient needs: no tile is made twice, nothing is guarded, no logits are too large.  Where
a sum has its row's positive in it, its log-softmax gives that positive's negative log-likelihood
(nll), which is what most losses want, and with it the logsumexp: positive logit + nll.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.buffers import Hoisted, assign_buffers
from cl_compiler.lang.differences import subtracted
from cl_compiler.lang.ir import COLS, ROWS, Leaf, Reduction
from cl_compiler.lang.lower import Lowering
from cl_compiler.lang.lower_pass import reduce_tile, with_ties
from cl_compiler.lang.rewrite import present, split_gradient, tidy
from cl_compiler.lang.sweeps import Grid, Sweep, SweepPlan
from cl_compiler.lang.tile_ir import (
    Accumulate,
    AtPositives,
    Barrier,
    Compute,
    Diagonal,
    Gemm,
    GradientTile,
    Instruction,
    Ref,
    ScalarRef,
    TileProgram,
    TileRef,
    VectorRef,
)

Kind = Literal["sum", "max", "softmax", "log_softmax"]


@dataclass(frozen=True)
class Level:
    """What happens to the tile of a grid at one level; ``sweep`` is None for its values at the
    positives, which are known before the first."""

    level: int
    grid: Grid
    sweep: Sweep | None
    program: TileProgram


def lower_whole(plan: SweepPlan) -> tuple[Level, ...]:
    """Every grid's levels; those of one grid share the tiles that their programs make."""
    grids = dict.fromkeys(sweep.grid for sweep in plan.sweeps)
    result: list[Level] = []
    buffers: set[str] = set()
    for grid in grids:
        levels = _GridLowering(plan, grid).levels(buffers)
        buffers |= {b for level in levels for b in level.program.buffers.values()}
        result += levels
    return tuple(sorted(result, key=lambda level: level.level))


def taken_at_positives(plan: SweepPlan) -> dict[str, str]:
    """Values at the positives that can be read off a tile: their name → the similarity."""
    made = {s for sweep in plan.sweeps if sweep.grid == (ROWS, COLS) for s in sweep.similarities}
    names = [n for n, leaf in plan.leaves.items() if leaf.kind == "similarity_at_positive"]
    return {n: n.removesuffix("_pos") for n in names if n.removesuffix("_pos") in made}


def scale_gradients(plan: SweepPlan) -> dict[str, str]:
    """Similarities whose tile gives the gradient of their scale: → the scale.

    <dL/dlogits, sim> is M·N work, less than <x, dL/dx> where one tile holds everything.
    """
    if plan.gradient is None:
        return {}
    found = {
        name: leaf.scale
        for name, leaf in plan.leaves.items()
        if leaf.kind == "similarity" and leaf.scale in plan.gradient.dots
    }
    late = {found.get(name) for name in plan.late_positives}
    return {name: scale for name, scale in found.items() if scale and scale not in late}


def inner_of(similarity: str) -> str:
    """<dL/dlogits, sim>, without the scale."""
    return f"inner_{similarity}"


def nll_of(lse: str) -> sp.Symbol:
    """The negative log-likelihood of each positive in a logsumexp's sums."""
    return sp.Symbol(f"nll_{lse}", real=True)


def likelihoods(plan: SweepPlan) -> dict[sp.Symbol, sp.Expr]:
    """Logsumexps of which each sum has one positive: → that one's logit + its nll.

    Not those that gradients subtract from others: the rounding of an nll would be theirs.
    """
    exact = subtracted(plan)
    logits = {plan.leaves[s].symbol: target for target, s in taken_at_positives(plan).items()}
    moved = {
        n.operand: plan.leaves[n.name].symbol
        for n in plan.nodes
        if isinstance(n, Reduction) and n.monoid == "to_cols"
    }
    found: dict[sp.Symbol, sp.Expr] = {}
    for node in plan.nodes:
        if not isinstance(node, Reduction) or node.monoid != "logsumexp" or node.name in exact:
            continue
        one_each = plan.positives == "paired" or (
            plan.positives == "diagonal" and node.over == COLS
        )
        if one_each and node.where == 1 and plan.is_full(node.name) and node.operand in logits:
            at_rows = plan.leaves[logits[node.operand]].symbol
            at_cols = moved.get(at_rows, fn.to_cols(at_rows))
            positive = at_rows if node.over == COLS else at_cols
            found[plan.leaves[node.name].symbol] = positive + nll_of(node.name)
    return found


class _WholeLowering(Lowering):
    """Keeps what its scale has not been applied to, where the scale's gradient reads it; makes
    softmaxes of whole tiles, which are symbols in expressions: no mask moves into them."""

    def __init__(self, plan: SweepPlan, grid: Grid) -> None:
        super().__init__(plan, grid, "whole")
        self.scales = scale_gradients(plan)
        self.bare: dict[str, TileRef] = {}
        self.softmaxes: dict[sp.Symbol, tuple[sp.Expr, int]] = {}
        """Symbol → (logits, the dimension that is summed)."""
        self.logarithms: dict[sp.Symbol, tuple[sp.Expr, int]] = {}
        """The same of log-softmaxes."""

    def softmax(self, logits: sp.Expr, dim: int) -> sp.Symbol:
        """The symbol of a tile's softmax along a dimension."""
        return self._normalised(self.softmaxes, "softmax", logits, dim)

    def log_softmax(self, logits: sp.Expr, dim: int) -> sp.Symbol:
        """The symbol of a tile's log-softmax along a dimension."""
        return self._normalised(self.logarithms, "log_softmax", logits, dim)

    def _normalised(
        self, known: dict[sp.Symbol, tuple[sp.Expr, int]], op: str, logits: sp.Expr, dim: int
    ) -> sp.Symbol:
        for symbol, what in known.items():
            if what == (logits, dim):
                return symbol
        name = f"{op}{len(known)}"
        self.leaves[name] = Leaf(name, "adjoint", self.grid)
        known[self.leaves[name].symbol] = logits, dim
        return self.leaves[name].symbol

    def emit(self, expr: sp.Expr) -> Ref:
        for op, known in (("softmax", self.softmaxes), ("log_softmax", self.logarithms)):
            if expr in known:
                logits, dim = known[expr]
                return self.compute(op, TileRef(self.tile(logits)), ScalarRef(sp.Integer(dim)))
        return super().emit(expr)

    def similarity(self, name: str, alpha: sp.Expr, beta: sp.Expr) -> Ref:
        if name not in self.scales:
            return super().similarity(name, alpha, beta)
        symbol = self.leaves[name].symbol
        if name not in self.bare:
            self.bare[name] = self.gemm(name, fn.ONE, fn.ZERO, scaled=False)
            scale = self.leaves[self.scales[name]].symbol
            self.memo[symbol] = self.compute("mul", self.bare[name], ScalarRef(scale))
        ref = self.memo[symbol]
        if alpha != 1:
            ref = self.compute("mul", ref, self.outer(alpha))
        return ref if beta == 0 else self.compute("add", ref, self.outer(beta))


class _GridLowering:
    """One grid's straight line in the making."""

    def __init__(self, plan: SweepPlan, grid: Grid) -> None:
        self.plan, self.grid = plan, grid
        self.sweeps = [sweep for sweep in plan.sweeps if sweep.grid == grid]
        self.low = _WholeLowering(plan, grid)
        self.likelihoods = likelihoods(plan)
        self.low.declare_shared()

    def levels(self, taken: Collection[str]) -> list[Level]:
        """Lower the grid; ``taken`` are names of buffers that others use."""
        plan, low = self.plan, self.low
        values = taken_at_positives(plan) if self.grid == (ROWS, COLS) else {}
        parts = {
            s: split_gradient(
                low,
                self.prepare(plan.gradient.similarities[s]),
                None if s in plan.late_positives else plan.gradient.positives.get(s),
                symmetric=False,
                pull_row_scale=False,
            )
            for sweep in self.sweeps
            for s in sweep.gradients
            if plan.gradient is not None
        }
        low.scan([plan.leaves[s].symbol for s in values.values()])
        low.scan([e for sweep in self.sweeps for r in sweep.reductions for e in self.folds(r)[1]])
        low.scan([part.pair for part in parts.values()])
        low.scan([logits for logits, _ in (*low.softmaxes.values(), *low.logarithms.values())])
        for target, similarity in values.items():
            low.code.append(AtPositives(target, low.tile(plan.leaves[similarity].symbol)))
        for sweep in self.sweeps:
            low.code.append(Barrier())
            for red in sweep.reductions:
                kind, (first, *more) = self.folds(red)
                reduce_tile(low, red, first, (red.name,), kind, tuple(more))
            for s in sweep.gradients:
                part = parts[s]
                value = low.tile(part.pair)
                if part.positive is not None:
                    extra = part.positive if part.positive.is_number else low.hoist(part.positive)
                    value = low.diagonals.diagonal(value, "positive", "add", extra).value
                low.code.append(GradientTile(s, value, part.scale, part.row_scale))
                if s in low.scales:
                    product = low.compute("mul", low.bare[s], TileRef(value))
                    low.code.append(Accumulate("total", (inner_of(s),), (product.value,), 1))
        whole = assign_buffers("whole", low.code, low.hoisted, (), None, "", taken)
        heads = [(0, None), *((sweep.level, sweep) for sweep in self.sweeps)]
        pieces = zip(heads, _pieces(whole.instructions), strict=True)
        return [
            Level(
                level,
                self.grid,
                sweep,
                replace(
                    whole,
                    instructions=code,
                    hoisted=_read(code, low.hoisted),
                    gradients=tuple(i for i in code if isinstance(i, GradientTile)),
                ),
            )
            for (level, sweep), code in pieces
            if code
        ]

    # -- expressions -----------------------------------------------------------------------------

    def prepare(self, expr: sp.Expr) -> sp.Expr:
        """Weights as a softmax of the tile; masks merged."""

        def weight(logits: sp.Expr, lse: sp.Expr) -> sp.Expr:
            red = self.plan.by_name[str(lse)]
            assert isinstance(red, Reduction)
            if not self.plan.is_full(red.name):
                return sp.exp(logits - present(lse))
            return self.softmax(red.operand, red)

        return tidy(with_ties(expr.replace(fn.softmax_weight, weight)), self.low.axes)

    def softmax(self, logits: sp.Expr, red: Reduction) -> sp.Expr:
        """Along a reduction's axis, where its mask holds; NaN where it never does."""
        if self.is_likelihood(red):
            return sp.exp(self.log_softmax(red))
        masked = self.prepare(fn.select(red.where, logits, sp.S.NegativeInfinity))
        return self.low.softmax(masked, self.grid.index(red.over))

    def is_likelihood(self, red: Reduction) -> bool:
        """Each of its sums has one positive."""
        return self.plan.leaves[red.name].symbol in self.likelihoods

    def log_softmax(self, red: Reduction) -> sp.Symbol:
        """Of a logsumexp's logits, along its axis."""
        return self.low.log_softmax(red.operand, self.grid.index(red.over))

    def folds(self, red: Reduction) -> tuple[Kind, tuple[sp.Expr, ...]]:
        """How a reduction folds which tiles."""
        match red.monoid:
            case "sum":
                return "sum", (self.prepare(fn.select(red.where, red.operand, fn.ZERO)),)
            case "max":
                lowest = sp.S.NegativeInfinity
                return "max", (self.prepare(fn.select(red.where, red.operand, lowest)),)
            case "logsumexp" if self.is_likelihood(red):
                return "log_softmax", (self.log_softmax(red),)
            case "logsumexp":
                weights = self.softmax(red.operand, red)
                return "softmax", (self.low.softmaxes[weights][0], weights)
            case _:
                assert red.logits is not None
                weighted = self.softmax(red.logits, red) * red.operand
                return "sum", (self.prepare(fn.select(red.where, weighted, fn.ZERO)),)


def _pieces(code: Iterable[Instruction]) -> list[tuple[Instruction, ...]]:
    """The instructions between barriers."""
    pieces: list[list[Instruction]] = [[]]
    for instruction in code:
        if isinstance(instruction, Barrier):
            pieces.append([])
        else:
            pieces[-1].append(instruction)
    return [tuple(piece) for piece in pieces]


def _read(
    code: Iterable[Instruction], hoisted: Hoisted
) -> Mapping[str, tuple[sp.Expr, tuple[str, ...]]]:
    """What of the hoisted vectors and scalars some instructions read, directly or not."""
    names: set[str] = set()
    for instruction in code:
        match instruction:
            case Compute(args=args):
                names |= _names(args)
            case Gemm(alpha=alpha, beta=beta):
                names |= {s.name for s in alpha.free_symbols | beta.free_symbols}
            case Diagonal(expr=expr, reads=reads):
                names |= {s.name for s in expr.free_symbols} | _names(ref for _, ref in reads)
            case GradientTile(scale=scale, row_scale=row_scale):
                names |= {row_scale, *(s.name for s in scale.free_symbols)}
    found: dict[str, tuple[sp.Expr, tuple[str, ...]]] = {}
    for name in reversed(list(hoisted)):
        expr, axes = hoisted[name]
        if name in names:
            found[name] = (expr, axes)
            names |= {s.name for s in expr.free_symbols}
    return dict(reversed(found.items()))


def _names(refs: Iterable[Ref]) -> set[str]:
    found: set[str] = set()
    for ref in refs:
        if isinstance(ref, VectorRef):
            found.add(ref.name)
        if isinstance(ref, ScalarRef):
            found |= {s.name for s in ref.expr.free_symbols}
    return found


__all__ = [
    "Level",
    "inner_of",
    "likelihoods",
    "lower_whole",
    "nll_of",
    "scale_gradients",
    "taken_at_positives",
]
