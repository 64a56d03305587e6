"""A schedule applied to a sweep plan: the passes over tiles, and the vectors between them.

This is what the planner counts and what the code generator prints; both walk the same value, so
predicted bytes are those of the code that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import sympy as sp

from cl_compiler.errors import ScheduleError
from cl_compiler.lang.differences import is_nested, reads_positives, wide_vectors
from cl_compiler.lang.ir import SLOTS, Let, Reduction
from cl_compiler.lang.lower_pass import bounded_logits, by_width, kept_expression, lower_pass
from cl_compiler.lang.sweeps import SweepPlan, level_of
from cl_compiler.lang.tile_ir import Barrier, Gemm, Mode, TileProgram
from cl_compiler.lang.whole import lower_whole

Schedule = Literal["recompute", "spill", "panel", "retain", "dense"]
SCHEDULES: tuple[Schedule, ...] = ("recompute", "spill", "panel", "retain", "dense")
Side = Literal["left", "right"]


@dataclass(frozen=True)
class Pass:
    """One loop nest over the tiles of a grid.

    ``programs`` has one tile program per mode.  ``sides``: which operands' gradients its gradient
    tiles are multiplied into.  ``whole_rows``: a tile spans all columns (a row panel).  ``whole``:
    one tile spans the grid, so that there is no loop, and the grid's passes share their buffers.
    """

    level: int
    grid: tuple[str, str]
    similarities: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    gradients: tuple[str, ...]
    sides: tuple[Side, ...]
    symmetric: bool
    whole_rows: bool
    whole: bool
    keep: Literal["", "write", "read"]
    programs: Mapping[Mode, TileProgram]
    remake: Mapping[Mode, TileProgram] = field(default_factory=dict)
    """Of a pass that reads kept tiles: how to make one that was not kept."""
    rounded: Mapping[Mode, TileProgram] = field(default_factory=dict)
    """The programs of tiles that read vectors as they are rounded, where those differ."""
    rounded_remake: Mapping[Mode, TileProgram] = field(default_factory=dict)

    @property
    def has_barrier(self) -> bool:
        """Row statistics are completed, and read, inside the pass."""
        code = next(iter(self.programs.values()))
        return any(isinstance(i, Barrier) for i in code.instructions)

    @property
    def narrowed(self) -> Pass:
        """The same with tiles that read vectors as they are rounded."""
        programs, remake = self.rounded or self.programs, self.rounded_remake or self.remake
        return replace(self, programs=programs, remake=remake, rounded={}, rounded_remake={})

    @property
    def is_slots(self) -> bool:
        """Tiles are [m, K]: each row with its own K slots."""
        return SLOTS in self.grid


@dataclass(frozen=True)
class Stage:
    """Passes of one level, and the names of vectors to evaluate after them, in order."""

    level: int
    passes: tuple[Pass, ...]
    vectors: tuple[str, ...]

    @property
    def narrowed(self) -> Stage:
        """The same with tiles that read vectors as they are rounded."""
        return replace(self, passes=tuple(p.narrowed for p in self.passes))


@dataclass(frozen=True)
class Program:
    """Everything that the emitted file does, for one schedule.

    ``forward`` starts with a stage of level 0: vectors known before any sweep, and without passes
    but where one tile holds everything: values at the positives are read off it.
    ``backward`` likewise; it is empty when ``fused`` (value and gradients in one go).
    ``narrow``: vectors are as wide as tiles, as they are in kernels.
    """

    plan: SweepPlan
    schedule: Schedule
    modes: tuple[Mode, ...]
    forward: tuple[Stage, ...]
    backward: tuple[Stage, ...]
    fused: bool
    narrow: bool = False

    @property
    def passes(self) -> tuple[Pass, ...]:
        return tuple(p for s in (*self.forward, *self.backward) for p in s.passes)

    @cached_property
    def logsumexps(self) -> tuple[Reduction, ...]:
        """Logsumexps that are reduced from tiles."""
        return tuple(
            n
            for n in self.plan.nodes
            if isinstance(n, Reduction) and n.monoid == "logsumexp" and self.plan.is_full(n.name)
        )

    @cached_property
    def wide(self) -> frozenset[str]:
        """Vectors in fp64 whatever the tiles are in (``differences``)."""
        if self.narrow:
            return frozenset()
        return wide_vectors(self.plan, [t for p in self.passes for t in p.programs.values()])

    @cached_property
    def subtracts_positives(self) -> bool:
        """Whether gradients subtract similarities at the positives from sums of what tiles hold."""
        return not self.narrow and reads_positives(self.plan)

    @property
    def narrowed(self) -> Program:
        """The same with vectors as wide as tiles, of which nothing is added in two parts."""
        return replace(
            self,
            forward=tuple(s.narrowed for s in self.forward),
            backward=tuple(s.narrowed for s in self.backward),
            narrow=True,
        )

    @property
    def is_unshifted(self) -> bool:
        """Exponentials are shifted by no bound: a logsumexp in their logits would lose digits."""
        return not self.narrow and is_nested(self.plan)

    @property
    def is_whole(self) -> bool:
        """One tile holds everything, and every statement stands in one function."""
        return self.modes == ("whole",)

    @property
    def keeps_tiles(self) -> bool:
        return any(p.keep for p in self.passes)


def valid_schedules(plan: SweepPlan) -> dict[Schedule, str]:
    """Each schedule that this loss can use → ""; each that it cannot → the reason."""
    reasons: dict[Schedule, str] = dict.fromkeys(SCHEDULES, "")
    if not plan.gradient_levels:
        for name in ("recompute", "panel", "retain"):
            reasons[name] = "no gradient is needed: without one it is what spill is"
        return reasons
    if not (plan.is_fused or plan.panel_sweeps):
        reasons["panel"] = "a gradient tile needs statistics that a panel of rows cannot complete"
    if plan.is_fused and any(s.grid[1] == SLOTS for s in plan.sweeps):
        reasons["panel"] = "slots are not tiled by panels"
    if plan.is_fused:
        reasons["retain"] = "gradients are formed in the forward sweep: nothing is recomputed"
    elif any(kept_expression(plan, m) is None for m in modes_of(plan)):
        reasons["retain"] = "it keeps one matrix from one forward sweep to one backward sweep"
    return reasons


def modes_of(plan: SweepPlan) -> tuple[Mode, ...]:
    """Which variants of the tile programs the emitted file needs."""
    full = [
        n
        for n in plan.nodes
        if isinstance(n, Reduction)
        and n.monoid in ("logsumexp", "softmean")
        and plan.is_full(n.name)
    ]
    if not full:
        return ("plain",)
    return ("bounded", "running") if bounded_logits(plan) else ("running",)


def build_program(plan: SweepPlan, schedule: Schedule) -> Program:
    """Lower every pass of a schedule.

    Raises:
        ScheduleError: the loss cannot use the schedule; the message says why.
    """
    reason = valid_schedules(plan)[schedule]
    if reason:
        usable = ", ".join(s for s, r in valid_schedules(plan).items() if not r)
        raise ScheduleError(
            f"{plan.ir.name} cannot use schedule {schedule!r}: {reason}. Usable: {usable}."
        )
    if schedule == "dense":
        return _whole_program(plan)
    modes = modes_of(plan)
    panel = schedule == "panel" and not plan.is_fused
    fused = plan.is_fused or panel
    forward: list[tuple[int, tuple[Pass, ...]]] = []
    backward: list[tuple[int, tuple[Pass, ...]]] = []
    for level in range(1, plan.total_levels + 1):
        sweeps = [s for s in plan.sweeps if s.level == level]
        if panel and level == 2:
            continue
        passes: list[Pass] = []
        for sweep in sweeps:
            if panel:
                assert plan.panel_sweeps is not None
                second = plan.panel_sweeps[1]
                passes.append(
                    _make(
                        plan,
                        modes,
                        1,
                        sweep.grid,
                        sweep.reductions,
                        second.gradients,
                        late=second.reductions,
                        whole_rows=True,
                        barrier=True,
                    )
                )
                continue
            symmetric = sweep.symmetric and schedule not in ("recompute", "panel")
            keep: Literal["", "write", "read"] = ""
            if schedule == "retain":
                keep = "write" if level <= plan.forward_levels else "read"
            split = schedule == "recompute" and sweep.gradients and sweep.grid[1] != SLOTS
            if not split:
                passes.append(
                    _make(
                        plan,
                        modes,
                        level,
                        sweep.grid,
                        sweep.reductions,
                        sweep.gradients,
                        symmetric=symmetric,
                        whole_rows=schedule == "panel",
                        keep=keep,
                    )
                )
                continue
            sides = _needed_sides(plan, sweep.gradients)
            for index, side in enumerate(sides):
                passes.append(
                    _make(
                        plan,
                        modes,
                        level,
                        sweep.grid,
                        sweep.reductions if not index else (),
                        sweep.gradients,
                        sides=(side,),
                    )
                )
        target = forward if level <= plan.forward_levels else backward
        target.append((plan.total_levels if panel else level, tuple(passes)))
    return Program(
        plan,
        schedule,
        modes,
        _stages(plan, 0, forward, _forward_names(plan, fused)),
        ()
        if fused or plan.gradient is None
        else _stages(plan, plan.forward_levels, backward, _backward_names(plan)),
        fused,
    )


def _whole_program(plan: SweepPlan) -> Program:
    """Everything in one tile, and the gradients together with the value."""
    by_level: dict[int, tuple[Pass, ...]] = {n: () for n in range(plan.total_levels + 1)}
    for level in lower_whole(plan):
        sweep = level.sweep
        gradients = () if sweep is None else sweep.gradients
        made = sorted({i.similarity for i in level.program.instructions if isinstance(i, Gemm)})
        by_level[level.level] += (
            Pass(
                level.level,
                level.grid,
                tuple(made),
                () if sweep is None else sweep.reductions,
                gradients,
                _needed_sides(plan, gradients),
                symmetric=False,
                whole_rows=False,
                whole=True,
                keep="",
                programs={"whole": level.program},
            ),
        )
    (start, *rest) = by_level.items()
    stages = _stages(plan, 0, rest, _forward_names(plan, fused=True), start[1])
    return Program(plan, "dense", ("whole",), stages, (), fused=True)


def _needed_sides(plan: SweepPlan, gradients: Iterable[str]) -> tuple[Side, ...]:
    sides: list[Side] = []
    for name in gradients:
        leaf = plan.leaves[name]
        for side, view in (("left", leaf.left), ("right", leaf.right)):
            needed = view is not None and view.operand in plan.needs and not view.stop
            if needed and side not in sides:
                sides.append(side)  # type: ignore[arg-type]
    return tuple(sides)


def _make(
    plan: SweepPlan,
    modes: tuple[Mode, ...],
    level: int,
    grid: tuple[str, str],
    reductions: tuple[Reduction, ...],
    gradients: tuple[str, ...],
    *,
    late: tuple[Reduction, ...] = (),
    sides: tuple[Side, ...] | None = None,
    symmetric: bool = False,
    whole_rows: bool = False,
    barrier: bool = False,
    keep: Literal["", "write", "read"] = "",
) -> Pass:
    programs, rounded = by_width(
        plan,
        lambda mode, exact: lower_pass(
            plan,
            grid,
            mode,
            reductions=reductions,
            late_reductions=late,
            gradients=gradients,
            symmetric=symmetric,
            barrier=barrier,
            keep=keep,
            exact=exact,
        ),
        modes,
    )
    remake, rounded_remake = by_width(
        plan,
        lambda mode, exact: lower_pass(plan, grid, mode, keep="write", exact=exact),
        modes if keep == "read" else (),
    )
    exprs = [e for r in (*reductions, *late) for e in r.expressions]
    exprs += [plan.gradient.similarities[g] for g in gradients] if plan.gradient else []
    used = sorted(
        {s.name for e in exprs for s in e.free_symbols if plan.leaves[s.name].kind == "similarity"}
    )
    return Pass(
        level,
        grid,
        tuple(used),
        (*reductions, *late),
        gradients,
        _needed_sides(plan, gradients) if sides is None else sides,
        symmetric,
        whole_rows,
        False,
        keep,
        programs,
        remake,
        rounded,
        rounded_remake,
    )


def _stages(
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


def _never(_: str) -> bool:
    return False


def _forward_names(plan: SweepPlan, fused: bool) -> set[str]:
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


def _gradient_exprs(plan: SweepPlan) -> list[sp.Expr]:
    g = plan.gradient
    assert g is not None
    return [
        *g.similarities.values(),
        *g.positives.values(),
        *g.vectors.values(),
        *g.parameters.values(),
    ]


def _backward_names(plan: SweepPlan) -> set[str]:
    return plan.closure(_gradient_exprs(plan)) - set(plan.saved)


__all__ = [
    "SCHEDULES",
    "Let",
    "Pass",
    "Program",
    "Schedule",
    "Stage",
    "build_program",
    "level_of",
    "modes_of",
    "valid_schedules",
]
