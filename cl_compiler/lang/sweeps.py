"""How often which tiles must be made, and what is kept between sweeps.

Every reduction over a pair of axes has a level: one more than the deepest statistic that it reads.
Reductions of one level on one grid share a sweep over its tiles; a similarity's gradient tile is
formed in the first sweep at which everything that it reads is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.gradient import differentiate
from cl_compiler.lang.ir import (
    SLOTS,
    GradientIR,
    Leaf,
    Let,
    LossIR,
    Reduction,
    axes_of,
    ordered,
    reduction_axes,
)
from cl_compiler.lang.resolve import ONE_TO_ONE, Positives, fold_scales, resolve

Grid = tuple[str, str]
Node = Let | Reduction


@dataclass(frozen=True)
class Sweep:
    """One pass over the tiles of one grid."""

    level: int
    grid: Grid
    reductions: tuple[Reduction, ...]
    gradients: tuple[str, ...]
    """Similarities whose gradient tile is formed here."""
    similarities: tuple[str, ...]
    """Similarities whose tiles are made here, one GEMM each."""
    symmetric: bool
    """The grid pairs a set with itself, so half of the tiles suffice, which stand for the rest."""


@dataclass(frozen=True)
class SweepPlan:
    """A loss with its gradients, ordered into sweeps.  The value that everything downstream walks.

    ``nodes`` are all reductions and lets in dependency order; ``levels[name]`` is the sweep after
    which a name is known (0: before the first).
    """

    ir: LossIR
    gradient: GradientIR | None
    positives: Positives
    needs: frozenset[str]
    nodes: tuple[Node, ...]
    levels: Mapping[str, int]
    sweeps: tuple[Sweep, ...]
    forward_levels: int

    @property
    def leaves(self) -> Mapping[str, Leaf]:
        return self.ir.leaves if self.gradient is None else self.gradient.leaves

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {n.name: n for n in self.nodes}

    @cached_property
    def total_levels(self) -> int:
        return max((s.level for s in self.sweeps), default=0)

    @cached_property
    def gradient_levels(self) -> tuple[int, ...]:
        return tuple(sorted({s.level for s in self.sweeps if s.gradients}))

    @property
    def is_fused(self) -> bool:
        """Gradient tiles need no statistic beyond the forward sweeps: value and gradient in one."""
        return bool(self.gradient_levels) and self.total_levels <= self.forward_levels

    @property
    def backward_levels(self) -> int:
        """Sweeps after the value is known (in a fused loss the last forward sweep counts)."""
        return max(self.total_levels - self.forward_levels, 0)

    def is_full(self, name: str) -> bool:
        """Whether ``name`` is reduced from tiles."""
        node = self.by_name.get(name)
        return isinstance(node, Reduction) and is_full(node, self.leaves)

    @cached_property
    def full_maxima(self) -> tuple[str, ...]:
        """Maxima whose elements a later sweep must find again bit for bit, in tiles cut alike."""
        maxima = _found_again(self.ir, self.gradient)
        return tuple(red.name for red in maxima if self.is_full(red.name))

    @cached_property
    def saved(self) -> tuple[str, ...]:
        """Vectors that the backward reads and that only a sweep or a pass over D can make."""
        if self.gradient is None or self.is_fused:
            return ()
        needed = self.closure(self._gradient_roots())
        needed |= {n for n in self.gradient.vectors if self.leaves[n].kind == "norm"}
        kept = [
            n
            for n in sorted(needed)
            if self.leaves[n].kind in ("similarity_at_positive", "norm")
            or (self.is_full(n) and self.levels[n] <= self.forward_levels)
        ]
        return tuple(kept)

    def _gradient_roots(self) -> list[sp.Expr]:
        g = self.gradient
        assert g is not None
        roots = [*g.similarities.values(), *g.positives.values()]
        return [*roots, *g.vectors.values(), *g.parameters.values()]

    def closure(
        self, exprs: Iterable[sp.Expr], stop: Callable[[str], bool] | None = None
    ) -> set[str]:
        """Names that ``exprs`` read, directly or through nodes; not beyond full reductions."""
        seen: set[str] = set()
        stack = [s.name for e in exprs for s in e.free_symbols]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.by_name.get(name)
            if node is None or (stop or self._is_early_full)(name):
                continue
            symbols = node.expr.free_symbols if isinstance(node, Let) else node.free_symbols
            stack.extend(s.name for s in symbols)
        return seen

    def _is_early_full(self, name: str) -> bool:
        return self.is_full(name) and self.levels[name] <= self.forward_levels

    @cached_property
    def late_positives(self) -> tuple[str, ...]:
        """Similarities whose gradient at the positives is only known after their own sweep."""
        if self.gradient is None:
            return ()
        level = {s: w.level for w in self.sweeps for s in w.gradients}
        return tuple(
            s
            for s, e in self.gradient.positives.items()
            if level_of(e, self.levels) >= level.get(s, 0)
        )

    @cached_property
    def panel_sweeps(self) -> tuple[Sweep, Sweep] | None:
        """The forward and the gradient sweep that can share row panels, if they can.

        They can when everything that the second reads of the first is local to a row.
        """
        if self.gradient is None or self.forward_levels != 1 or self.total_levels != 2:
            return None
        first = [s for s in self.sweeps if s.level == 1]
        second = [s for s in self.sweeps if s.level == 2]
        if len(first) != 1 or len(second) != 1 or first[0].grid != second[0].grid:
            return None
        row = first[0].grid[0]
        g = self.gradient
        exprs = [g.similarities[s] for s in second[0].gradients]
        exprs += [g.positives[s] for s in second[0].gradients if s in g.positives]
        exprs += [e for r in second[0].reductions for e in r.expressions]
        if SLOTS in first[0].grid or set(second[0].gradients) & set(self.late_positives):
            return None
        for name in self.closure(exprs):
            if self.levels.get(name, 0) < 1:
                continue
            node = self.by_name[name]
            local = isinstance(node, Let) or (is_full(node, self.leaves) and node.over != row)
            if not local or set(self.leaves[name].axes) != {row}:
                return None
            if isinstance(node, Let) and node.expr.has(sp.Function("to_rows")):
                return None
        return first[0], second[0]


def is_full(red: Reduction, leaves: Mapping[str, Leaf]) -> bool:
    """A reduction over the tiles of a grid (rather than of a vector)."""
    transport = red.monoid in ("to_rows", "to_cols")
    return not transport and len(reduction_axes(red, leaves)) == 2


def level_of(expr: sp.Expr, levels: Mapping[str, int]) -> int:
    return max((levels.get(s.name, 0) for s in expr.free_symbols), default=0)


def plan_sweeps(loss: LossIR, positives: Positives, needs: frozenset[str]) -> SweepPlan:
    """Resolve, differentiate and order a loss.

    ``needs``: names of operands, inputs and parameters whose gradients are wanted; empty for the
    value alone.

    Raises:
        LossDefinitionError: the loss or one of its gradients needs more than pairs.
    """
    scaled = fold_scales(resolve(loss, positives), needs)
    ir = scaled.ir
    one_to_one = positives in ONE_TO_ONE
    gradient = differentiate(ir, needs, scaled.dots, one_to_one=one_to_one) if needs else None
    leaves = ir.leaves if gradient is None else gradient.leaves
    nodes: list[Node] = [*ir.reductions, *(gradient.steps if gradient else ())]
    levels: dict[str, int] = {}
    for node in nodes:
        if isinstance(node, Let):
            levels[node.name] = level_of(node.expr, levels)
        else:
            read = max((level_of(e, levels) for e in node.expressions), default=0)
            if node.monoid == "softmean":
                read = (
                    max(read, levels[f"{node.name}_lse"] - 1)
                    if (f"{node.name}_lse" in levels)
                    else read
                )
            levels[node.name] = read + is_full(node, leaves)
    forward = max((levels[r.name] for r in ir.reductions), default=0)
    g_level = {
        s: 1 + level_of(e, levels) for s, e in (gradient.similarities if gradient else {}).items()
    }
    reductions = [n for n in nodes if isinstance(n, Reduction) and is_full(n, leaves)]
    if any(k > forward for k in (*g_level.values(), *(levels[r.name] for r in reductions))):
        # there is a backward sweep anyway: then all gradient tiles wait for it
        g_level = {s: max(level, forward + 1) for s, level in g_level.items()}
    again = [e for red in _found_again(ir, gradient) for e in red.expressions]
    found_again = {s.name for e in again for s in e.free_symbols}
    sweeps = []
    top = max([0, *g_level.values(), *(levels[r.name] for r in reductions)])
    for level in range(1, top + 1):
        here = [r for r in reductions if levels[r.name] == level]
        grads = [s for s, k in g_level.items() if k == level]
        grids = {_grid(reduction_axes(r, leaves)) for r in here}
        grids |= {_grid(leaves[s].axes) for s in grads}
        for grid in sorted(grids):
            reds = tuple(r for r in here if _grid(reduction_axes(r, leaves)) == grid)
            gs = tuple(s for s in grads if _grid(leaves[s].axes) == grid)
            exprs = [e for r in reds for e in r.expressions]
            exprs += [gradient.similarities[s] for s in gs] if gradient else []
            sims = {x.name for e in exprs for x in e.free_symbols}
            used = tuple(sorted(n for n in sims if leaves[n].kind == "similarity"))
            symmetric = bool(used) and all(leaves[n].is_symmetric for n in used)
            symmetric = symmetric and found_again.isdisjoint(used)
            sweeps.append(Sweep(level, grid, reds, gs, used, symmetric))
    return SweepPlan(ir, gradient, positives, needs, tuple(nodes), levels, tuple(sweeps), forward)


def _found_again(ir: LossIR, gradient: GradientIR | None) -> list[Reduction]:
    """Maxima that pairs are compared with, as a gradient does to find their elements: bit for bit,
    and a product need not have the bits of its transpose."""
    steps = gradient.steps if gradient else ()
    reductions = [n for n in (*ir.reductions, *steps) if isinstance(n, Reduction)]
    exprs = [e for red in reductions for e in red.expressions]
    exprs += gradient.similarities.values() if gradient else ()
    kinds = (fn.equal, fn.greater, fn.greater_equal)
    sought = {s.name for e in exprs for mask in e.atoms(*kinds) for s in mask.free_symbols}
    return [r for r in ir.reductions if r.monoid == "max" and r.name in sought]


def _grid(axes: Iterable[str]) -> Grid:
    a, b = ordered(axes)
    return a, b


__all__ = ["Grid", "Node", "Sweep", "SweepPlan", "axes_of", "is_full", "level_of", "plan_sweeps"]
