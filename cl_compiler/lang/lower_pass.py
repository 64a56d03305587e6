"""What one pass over a grid does to a tile: reductions, then gradient tiles, lowered together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import sympy as sp

from cl_compiler.lang import functions as fn
from cl_compiler.lang.buffers import assign_buffers
from cl_compiler.lang.differences import splits_logsumexps
from cl_compiler.lang.ir import Reduction, axes_of
from cl_compiler.lang.lower import TIE_TOLERANCE, Lowering, inverse_of, shift_of
from cl_compiler.lang.rewrite import present, shared_exp, split_gradient, tidy
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Barrier,
    GradientTile,
    Mode,
    TileProgram,
    TileRef,
)


def reduce_tile(
    low: Lowering,
    red: Reduction,
    operand: sp.Expr,
    names: tuple[str, ...],
    kind: Literal["sum", "max", "logsumexp", "softmean", "softmax", "log_softmax"],
    extra: tuple[sp.Expr, ...] = (),
    symmetric: bool = False,
) -> None:
    """Accumulate ``operand`` over the reduction's axis, and over the other for mirrored tiles."""
    dim = low.grid.index(red.over)
    scratch = kind in ("logsumexp", "softmean")
    args = tuple(low.tile(e) for e in (operand, *extra))
    flipped = tuple(low.tile(low.mirrored(e)) for e in (operand, *extra)) if symmetric else ()
    low.code.append(Accumulate(kind, names, args, dim, scratch=low.new() if scratch else None))
    if symmetric:
        spare = low.new() if scratch else None
        low.code.append(Accumulate(kind, names, flipped, 1 - dim, mirrored=True, scratch=spare))


def bounded_logits(plan: SweepPlan) -> dict[sp.Expr, str]:
    """Operands of logsumexps whose size follows from the operands' norms → the shift's owner.

    Those are affine in similarities with scalar or vector coefficients.
    """
    owners: dict[sp.Expr, str] = {}
    for node in plan.nodes:
        if isinstance(node, Reduction) and node.monoid == "logsumexp" and plan.is_full(node.name):
            sims = [
                s for s in node.operand.free_symbols if plan.leaves[s.name].kind == "similarity"
            ]
            pairs = [
                a
                for a in sp.preorder_traversal(node.operand)
                if isinstance(a, sp.Function) and len(axes_of(a, plan.leaves)) > 1
            ]
            linear = (
                sims
                and not pairs
                and all(sp.diff(node.operand, s, 2) == 0 for s in sims)
                and not any(sp.diff(node.operand, a, b) != 0 for a in sims for b in sims if a != b)
            )
            slots = "slots" in plan.leaves[sims[0].name].axes if sims else True
            if not linear or slots:
                return {}
            owners.setdefault(node.operand, node.name)
    return owners


def lower_pass(
    plan: SweepPlan,
    grid: tuple[str, str],
    mode: Mode,
    *,
    reductions: tuple[Reduction, ...] = (),
    late_reductions: tuple[Reduction, ...] = (),
    gradients: tuple[str, ...] = (),
    symmetric: bool = False,
    mirrored: bool | None = None,
    barrier: bool = False,
    keep: Literal["", "write", "read"] = "",
    exact: bool = False,
) -> TileProgram:
    """Lower what one pass over a grid does to a tile.

    ``reductions`` are accumulated first; after the ``barrier`` (if any) their row statistics may be
    read, by ``late_reductions`` and by the gradient tiles of ``gradients``.

    ``symmetric``: gradient tiles stand for their transposes too; ``mirrored``: so do reductions
    (None: as ``symmetric`` says).  ``exact``: a logsumexp is subtracted in two parts, from logits
    that every pass makes in the same way, bit for bit.
    """
    low = Lowering(plan, grid, mode, exact)
    mirrored = symmetric if mirrored is None else mirrored
    owners = bounded_logits(plan) if mode == "bounded" else {}
    low.declare_shared()

    def prepare(expr: sp.Expr) -> sp.Expr:
        return tidy(_weights(expr, owners), low.axes)

    def job(red: Reduction) -> Job:
        logits = None if red.logits is None else prepare(red.logits)
        ready = replace(red, operand=prepare(red.operand), where=prepare(red.where), logits=logits)
        return _reduction_job(low, ready, owners)

    early, late = [job(r) for r in reductions], [job(r) for r in late_reductions]
    parts = {}
    for s in gradients:
        assert plan.gradient is not None
        positive = None if s in plan.late_positives else plan.gradient.positives.get(s)
        parts[s] = split_gradient(
            low,
            prepare(plan.gradient.similarities[s]),
            positive,
            symmetric=symmetric,
            pull_row_scale=barrier,
        )
    if exact:  # what another pass reads beside the logits decides how they are made in this one
        everywhere = [
            job(r) for r in plan.nodes if isinstance(r, Reduction) and plan.is_full(r.name)
        ]
        low.scan([e for j in everywhere for e in j[2]])
        if plan.gradient is not None:
            low.scan([prepare(e) for e in plan.gradient.similarities.values()])
    low.scan([e for j in (*early, *late) for e in j[2]])
    low.scan([p.pair for p in parts.values()])
    if mirrored:
        low.scan([low.mirrored(e) for j in (*early, *late) for e in j[2]])
    kept = None
    if keep:
        expr = kept_expression(plan, mode)
        assert expr is not None
        low.scan([expr])  # what is affine in a similarity that is kept is made of that tile
        if keep == "read":
            kept = low.new()
            low.memo[expr] = TileRef(kept)
        else:
            kept = low.tile(expr)
    for kind, red, exprs, names in early:
        reduce_tile(low, red, exprs[0], names, kind, exprs[1:], mirrored)
    if barrier:
        low.code.append(Barrier())
    for kind, red, exprs, names in late:
        reduce_tile(low, red, exprs[0], names, kind, exprs[1:], mirrored)
    tiles = []
    for s, part in parts.items():
        value = low.tile(part.pair)
        if part.positive is not None:
            extra = part.positive if part.positive.is_number else low.hoist(part.positive)
            value = low.diagonals.diagonal(value, "positive", "add", extra).value
        tiles.append(GradientTile(s, value, part.scale, part.row_scale))
    return assign_buffers(mode, low.code, low.hoisted, tuple(tiles), kept, keep)


def by_width(
    plan: SweepPlan,
    lower: Callable[[Mode, bool], TileProgram],
    modes: tuple[Mode, ...],
    travelling: bool = False,
) -> tuple[dict[Mode, TileProgram], dict[Mode, TileProgram]]:
    """Tile programs by mode, and those of tiles that read what is rounded, where they differ.

    ``travelling``: second parts would travel between ranks, and do where every mode needs them.
    """
    rounded = {mode: lower(mode, False) for mode in modes}
    if travelling and bounded_logits(plan) and not splits_logsumexps(plan, "bounded"):
        return rounded, {}
    exact = {mode: lower(mode, True) for mode in modes if splits_logsumexps(plan, mode)}
    return rounded | exact, rounded if exact else {}


def kept_expression(plan: SweepPlan, mode: Mode) -> sp.Expr | None:
    """The one tile per position that spares the backward its GEMM, if there is such a tile.

    The shared exponential, masked as the logsumexps mask it, if gradients read nothing else of the
    similarity; otherwise the similarity itself.  None where there are several similarities.
    """
    forward = [s for s in plan.sweeps if s.level <= plan.forward_levels]
    backward = [s for s in plan.sweeps if s.level > plan.forward_levels]
    if plan.gradient is None or len(forward) != 1 or len(backward) != 1:
        return None
    first, second = forward[0], backward[0]
    if first.similarities != second.similarities or len(first.similarities) != 1:
        return None
    symbol = plan.leaves[first.similarities[0]].symbol
    if mode == "bounded":
        owners = bounded_logits(plan)
        low = Lowering(plan, first.grid, mode)
        low.declare_shared()
        jobs = [_reduction_job(low, r, owners) for r in first.reductions]
        exponentials = {e for job in jobs for e in job[2] if e.has(shared_exp)}
        reads = [
            tidy(_weights(e, owners), low.axes)
            for e in (
                *plan.gradient.similarities.values(),
                *(x for r in second.reductions for x in r.expressions),
            )
        ]
        if len(exponentials) == 1:
            (expr,) = exponentials
            mark = sp.Symbol("kept", real=True)
            parts = [_split_for_keep(low, e) for e in reads]
            if all(not p.subs(expr, mark).has(symbol) for p in parts):
                return expr
    return symbol


def _split_for_keep(low: Lowering, expr: sp.Expr) -> sp.Expr:
    """The pair factors of an expression, as ``split_gradient`` finds them."""
    return split_gradient(low, expr, None, symmetric=False, pull_row_scale=False).pair


def _weights(expr: sp.Expr, owners: Mapping[sp.Expr, str]) -> sp.Expr:
    """Write softmax weights as a shared exponential times a vector, or as exp(u - lse)."""

    def rewrite(u: sp.Expr, lse: sp.Expr) -> sp.Expr:
        if u in owners:
            return shared_exp(u, shift_of(owners[u])) * inverse_of(str(lse))
        return sp.exp(u - present(lse))

    return with_ties(expr.replace(fn.softmax_weight, rewrite))


def with_ties(expr: sp.Expr) -> sp.Expr:
    """Equality with a maximum up to rounding: a tile made twice may differ in its last bits."""

    def tie(a: sp.Expr, largest: sp.Expr) -> sp.Expr:
        return fn.greater_equal(a, largest - TIE_TOLERANCE * fn.absolute(largest))

    return expr.replace(fn.equal, tie)


Job = tuple[
    Literal["sum", "max", "logsumexp", "softmean"], Reduction, tuple[sp.Expr, ...], tuple[str, ...]
]


def _reduction_job(low: Lowering, red: Reduction, owners: Mapping[sp.Expr, str]) -> Job:
    """How a reduction is accumulated: (kind, reduction, tile expressions, target vectors)."""
    minus_infinity = sp.S.NegativeInfinity
    match red.monoid:
        case "sum":
            return "sum", red, (fn.select(red.where, red.operand, fn.ZERO),), (red.name,)
        case "max":
            return "max", red, (fn.select(red.where, red.operand, minus_infinity),), (red.name,)
        case "logsumexp" if red.operand in owners:
            e = shared_exp(red.operand, shift_of(owners[red.operand]))
            return "sum", red, (fn.select(red.where, e, fn.ZERO),), (f"sum_{red.name}",)
        case "logsumexp":
            names = (f"max_{red.name}", f"sum_{red.name}")
            u = fn.select(red.where, red.operand, minus_infinity)
            return "logsumexp", red, (u,), names
        case "softmean" if red.logits in owners:
            weighted = shared_exp(red.logits, shift_of(owners[red.logits])) * red.operand
            return "sum", red, (fn.select(red.where, weighted, fn.ZERO),), (f"sum_{red.name}",)
        case "softmean":
            three = (f"max_{red.name}", f"sum_{red.name}", f"weighted_{red.name}")
            u = fn.select(red.where, red.logits, minus_infinity)
            return "softmean", red, (u, fn.select(red.where, red.operand, fn.ZERO)), three
        case _:
            raise AssertionError(red.monoid)
