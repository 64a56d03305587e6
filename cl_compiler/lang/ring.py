"""A loss on many ranks: which shards travel, and what each rank does to the tiles they make.

Every rank holds a shard of the rows and of the columns.  A pass over a grid keeps one side at home
and meets every rank's shard of the other side in turn, so a statistic of the side at home folds in
place, and one of the travelling side goes on with its shard and ends at its owner.
"""

from __future__ import annotations

from cl_compiler.errors import ScheduleError
from cl_compiler.lang.ir import BANK, ROWS, SLOTS, Reduction
from cl_compiler.lang.lower_pass import by_width, lower_pass
from cl_compiler.lang.program import Pass, Program, Side
from cl_compiler.lang.schedules import modes_of
from cl_compiler.lang.stages import backward_names, forward_names, needed_sides, stages_of
from cl_compiler.lang.sweeps import Grid, Sweep, SweepPlan
from cl_compiler.lang.tile_ir import Mode

LOCAL_AXES = frozenset({SLOTS, BANK})
"""Axes that a rank has to itself: a row's slots, and the rank's own copy of a queue."""


def is_local(grid: Grid) -> bool:
    """Whether a rank sweeps a grid without the others."""
    return not LOCAL_AXES.isdisjoint(grid)


def operand_along(plan: SweepPlan, axis: str) -> str:
    """An operand with an element per element of an axis: what says how many there are of it, where
    a pass reads nothing else of that side."""
    along = [op for op in plan.ir.operands if op.axes[0] == axis.removesuffix("2")]
    return min(along, key=lambda op: len(op.axes)).name


def ring_obstacle(plan: SweepPlan) -> str:
    """Why a loss cannot run on a group of ranks; "" where it can."""
    for sweep in plan.sweeps:
        if BANK not in sweep.grid and SLOTS not in sweep.grid:
            continue
        for red in sweep.reductions:
            if red.over == ROWS and SLOTS in sweep.grid:
                return (
                    f"{red.name} is reduced over {red.over} for every slot, and each rank has its "
                    "own rows' slots; reduce over the slots instead"
                )
            if red.over != BANK and BANK in sweep.grid:
                return (
                    f"{red.name} is reduced over {red.over} for every element of the queue, and "
                    "each rank has a copy of the queue; reduce over the queue instead"
                )
        for name in sweep.gradients:
            right = plan.leaves[name].right
            if right is not None and right.axis == BANK and right.operand in plan.needs:
                return (
                    f"the queue {right.operand!r} needs a gradient, and each rank has a copy of "
                    "it; detach it, or declare it with stop=True"
                )
    return ""


TRAVEL = "ring_travel"
HALF_RING, BOTH_WAYS, HOST = "half_ring", "both_ways", "host"
CLUSTER_SCHEDULES = (
    *("ring_owner", TRAVEL, "all_gather", "two_level"),
    *(HALF_RING, BOTH_WAYS, HOST),
)
"""ring_owner: operands travel, every gradient is made at its owner; ring_travel: an operand travels
with its gradient; all_gather: shards are gathered, and gradients sent home, a chunk at a time;
two_level: as ring_owner, in a ring of nodes and a ring inside each; half_ring: of one set with
itself, a shard travels half of the ring with its gradient, so that two shards meet once; both_ways:
as ring_owner, half of the ranks in each direction at once; host: as ring_owner, of shards in host
memory, of which a block is on the device while the other side's travel past it."""
CANONICAL = "canonical"
"""Every rank meets all chunks in global order, so that results do not depend on the number of
ranks; what is reduced over a side is made where that side streams past.  Only taken when asked
for."""
CANONICAL_CHUNK = 256
"""Rows of a chunk; every shard is a whole number of them."""
OWNER_COMPUTES = frozenset({"ring_owner", "two_level", BOTH_WAYS, HOST, CANONICAL})
"""Schedules in which no gradient travels."""
TWO_GROUPS = frozenset({"two_level", BOTH_WAYS})
"""Schedules in which a rank passes on two shards at the same time, each in a group of its own."""


def ring_schedules(plan: SweepPlan) -> dict[str, str]:
    """Each cluster schedule that a loss can use → ""; each that it cannot → the reason."""
    reasons = dict.fromkeys(CLUSTER_SCHEDULES, ring_obstacle(plan))
    full = plan.full_maxima
    if full and plan.gradient is not None:
        for name in OWNER_COMPUTES.intersection(CLUSTER_SCHEDULES):
            reasons[name] = reasons[name] or (
                f"{full[0]} is a maximum, whose elements must be found again bit for bit, and the "
                "sweep at the other operand's owner cuts other tiles"
            )
    reasons[HALF_RING] = reasons[HALF_RING] or _half_obstacle(plan)
    return reasons


def _half_obstacle(plan: SweepPlan) -> str:
    """Why a tile of a loss does not stand for its transpose too; "" where each does."""
    maxima = plan.full_maxima
    for sweep in plan.sweeps:
        if is_local(sweep.grid):
            continue
        matrices = [plan.leaves[name] for name in sweep.similarities]
        is_own = bool(matrices) and all(m.is_symmetric for m in matrices)
        if not sweep.symmetric and maxima and is_own:
            return (
                f"{maxima[0]} is a maximum, whose elements must be found again bit for bit, and a "
                "tile need not have the bits of its transpose"
            )
        if not sweep.symmetric:
            return (
                f"it pairs {sweep.grid[0]} with {sweep.grid[1]} in a matrix that is not its own "
                "transpose; half of the ring is enough for one set with itself"
            )
        if len(needed_sides(plan, sweep.gradients)) == 1:
            return "one side of its matrix takes no gradient, so a tile differs from its transpose"
    return ""


def canonical_obstacle(plan: SweepPlan) -> str:
    """Why the bits of a loss depend on how it is cut into shards; "" where they need not."""
    if plan.positives == "views":
        return (
            "without ids, rows i and i + b of a shard are two views, so the order of all rows "
            "depends on the number of ranks; pass ids"
        )
    for name, leaf in plan.leaves.items():
        local = LOCAL_AXES.intersection(leaf.axes)
        if local:
            return f"{name} runs over {', '.join(sorted(local))}, which every rank has to itself"
    for node in plan.nodes:
        if not isinstance(node, Reduction) or plan.is_full(node.name):
            continue
        if node.monoid in ("logsumexp", "softmean"):
            return f"{node.name} is a {node.monoid} over the rows of all ranks"
    return ring_schedules(plan)["ring_owner"]


def build_ring_program(
    plan: SweepPlan, *, owner_computes: bool, canonical: bool = False, half: bool = False
) -> Program:
    """Lower every pass of a loss on many ranks.

    ``owner_computes``: an operand's gradient is made where the operand lives, in a sweep of its
    own, so that no gradient travels; otherwise one sweep makes both gradients and the travelling
    operand's goes with it.  A set paired with itself never needs the second: the tile stands for
    its transpose too.  ``canonical``: statistics likewise, each in a sweep past what it is reduced
    over.  ``half``: of a set paired with itself, every tile gives the statistics and gradients of
    its transpose too, which travel.

    Raises:
        ScheduleError: the loss cannot run on many ranks, or not on half rings; the message says
            why.
    """
    reason = ring_obstacle(plan) or (_half_obstacle(plan) if half else "")
    if reason:
        raise ScheduleError(f"{plan.ir.name} cannot run on a group of ranks: {reason}.")
    modes = modes_of(plan)
    if canonical:  # one way for any logits: no rank asks how large they are
        modes = modes[-1:]
    forward: list[tuple[int, tuple[Pass, ...]]] = []
    backward: list[tuple[int, tuple[Pass, ...]]] = []
    for level in range(1, plan.total_levels + 1):
        passes: list[Pass] = []
        for sweep in (s for s in plan.sweeps if s.level == level):
            if canonical:
                passes += _passes_by_side(plan, modes, sweep)
            elif half and not is_local(sweep.grid):
                sides = needed_sides(plan, sweep.gradients)
                passes.append(_make(plan, modes, sweep, sweep.reductions, sides, half=True))
            else:
                passes += _passes(plan, modes, sweep, owner_computes=owner_computes)
        target = forward if level <= plan.forward_levels else backward
        target.append((level, tuple(passes)))
    fused = plan.is_fused
    return Program(
        plan,
        "recompute" if owner_computes else "spill",
        modes,
        stages_of(plan, 0, forward, forward_names(plan, fused)),
        ()
        if fused or plan.gradient is None
        else stages_of(plan, plan.forward_levels, backward, backward_names(plan)),
        fused,
    )


def _passes(
    plan: SweepPlan, modes: tuple[Mode, ...], sweep: Sweep, *, owner_computes: bool
) -> list[Pass]:
    sides = needed_sides(plan, sweep.gradients)
    groups: list[tuple[Side, ...]] = [sides]
    if sweep.symmetric and sides:
        groups = [("left",)]
    elif owner_computes and len(sides) > 1 and not is_local(sweep.grid):
        groups = [(side,) for side in sides]
    return [
        _make(plan, modes, sweep, () if index else sweep.reductions, group)
        for index, group in enumerate(groups)
    ]


def _passes_by_side(plan: SweepPlan, modes: tuple[Mode, ...], sweep: Sweep) -> list[Pass]:
    """A pass for everything that belongs to rows, and one for what belongs to columns."""
    needed = needed_sides(plan, sweep.gradients)
    if sweep.symmetric and needed:
        needed = ("left",)
    sides: tuple[tuple[Side, str], ...] = (("left", sweep.grid[1]), ("right", sweep.grid[0]))
    passes = []
    for side, over in sides:
        of_side = tuple(r for r in sweep.reductions if r.over == over)
        if sweep.grid[0] == sweep.grid[1]:
            of_side = sweep.reductions if side == "left" else ()
        if of_side or side in needed:
            passes.append(_make(plan, modes, sweep, of_side, (side,), made=side in needed))
    return passes


def _make(
    plan: SweepPlan,
    modes: tuple[Mode, ...],
    sweep: Sweep,
    reductions: tuple[Reduction, ...],
    sides: tuple[Side, ...],
    made: bool = True,
    half: bool = False,
) -> Pass:
    """``made``: the pass makes gradients of its sides; otherwise sides say what stays at home.

    ``half``: a tile stands for its transpose, which no rank makes.
    """
    gradients = sweep.gradients if made else ()
    programs, rounded = by_width(
        plan,
        lambda mode, exact: lower_pass(
            plan,
            sweep.grid,
            mode,
            reductions=reductions,
            gradients=gradients,
            symmetric=half or (sweep.symmetric and bool(sides) and made),
            mirrored=half,
            exact=exact,
        ),
        modes,
        travelling=True,
    )
    exprs = [e for r in reductions for e in r.expressions]
    exprs += [plan.gradient.similarities[g] for g in gradients] if plan.gradient else []
    used = {s.name for e in exprs for s in e.free_symbols}
    return Pass(
        level=sweep.level,
        grid=sweep.grid,
        similarities=tuple(sorted(n for n in used if plan.leaves[n].kind == "similarity")),
        reductions=reductions,
        gradients=gradients,
        sides=sides,
        symmetric=half,
        whole_rows=False,
        whole=False,
        keep="",
        programs=programs,
        rounded=rounded,
    )


__all__ = [
    "BOTH_WAYS",
    "CANONICAL",
    "CANONICAL_CHUNK",
    "CLUSTER_SCHEDULES",
    "HALF_RING",
    "HOST",
    "LOCAL_AXES",
    "OWNER_COMPUTES",
    "TWO_GROUPS",
    "build_ring_program",
    "canonical_obstacle",
    "is_local",
    "operand_along",
    "ring_obstacle",
    "ring_schedules",
]
