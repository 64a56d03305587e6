"""The vectors between passes over tiles: which are needed, and the level that makes each known."""

from __future__ import annotations

from collections.abc import Iterable

import sympy as sp

from cl_compiler.lang.ir import Reduction
from cl_compiler.lang.program import Pass, Side, Stage
from cl_compiler.lang.sweeps import SweepPlan


def stages_of(
    plan: SweepPlan,
    start: int,
    levels: list[tuple[int, tuple[Pass, ...]]],
    names: set[str],
    first: tuple[Pass, ...] = (),
) -> tuple[Stage, ...]:
    """Give each stage the vectors that become known with it.

    ``start`` is known beforehand, or with the passes ``first``.
    """
    seen: set[str] = set()
    stages = []
    for level, passes in [(start, first), *levels]:
        vectors = tuple(
            n.name
            for n in plan.nodes
            if n.name in names - seen and not plan.is_full(n.name) and plan.levels[n.name] <= level
        )
        seen.update(vectors)
        stages.append(Stage(level, passes, vectors))
    return tuple(stages)


def forward_names(plan: SweepPlan, fused: bool) -> set[str]:
    """Everything that the forward evaluates."""
    ir = plan.ir
    roots = [ir.value, *(e for _, e in ir.outputs), *(e for _, e in ir.required)]
    exprs: list[sp.Expr] = list(roots)
    if plan.gradient is not None:
        if fused:
            exprs += _gradient_exprs(plan)
        for name, node in plan.by_name.items():  # adjoint sums that the forward sweeps take
            if plan.is_full(name) and plan.levels[name] <= plan.forward_levels:
                assert isinstance(node, Reduction)
                exprs += node.expressions
    return plan.closure(exprs, stop=_never)


def backward_names(plan: SweepPlan) -> set[str]:
    return plan.closure(_gradient_exprs(plan)) - set(plan.saved)


def _gradient_exprs(plan: SweepPlan) -> list[sp.Expr]:
    g = plan.gradient
    assert g is not None
    return [
        *g.similarities.values(),
        *g.positives.values(),
        *g.vectors.values(),
        *g.parameters.values(),
    ]


def _never(_: str) -> bool:
    return False


def needed_sides(plan: SweepPlan, gradients: Iterable[str]) -> tuple[Side, ...]:
    sides: list[Side] = []
    for name in gradients:
        leaf = plan.leaves[name]
        for side, view in (("left", leaf.left), ("right", leaf.right)):
            needed = view is not None and view.operand in plan.needs and not view.stop
            if needed and side not in sides:
                sides.append(side)  # type: ignore[arg-type]
    return tuple(sides)
