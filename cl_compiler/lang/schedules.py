"""Schedules: the passes over tiles that each makes of a sweep plan, and who can use it."""

from __future__ import annotations

from typing import Literal

from cl_compiler.errors import ScheduleError
from cl_compiler.lang.ir import SLOTS, Reduction
from cl_compiler.lang.lower_pass import bounded_logits, by_width, kept_expression, lower_pass
from cl_compiler.lang.program import SCHEDULES, Pass, Program, Schedule, Side
from cl_compiler.lang.stages import backward_names, forward_names, needed_sides, stages_of
from cl_compiler.lang.sweeps import Sweep, SweepPlan
from cl_compiler.lang.tile_ir import Gemm, Mode
from cl_compiler.lang.whole import lower_whole


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
    if panel:  # both levels in one sweep of row panels
        sweeps = [s for s in plan.sweeps if s.level == 1]
        passes = tuple(_panel_pass(plan, modes, s) for s in sweeps)
        forward.append((plan.total_levels, passes))
    else:
        for level in range(1, plan.total_levels + 1):
            sweeps = [s for s in plan.sweeps if s.level == level]
            passes = tuple(p for s in sweeps for p in _sweep_passes(plan, modes, s, schedule))
            target = forward if level <= plan.forward_levels else backward
            target.append((level, passes))
    return Program(
        plan,
        schedule,
        modes,
        stages_of(plan, 0, forward, forward_names(plan, fused)),
        ()
        if fused or plan.gradient is None
        else stages_of(plan, plan.forward_levels, backward, backward_names(plan)),
        fused,
    )


def _panel_pass(plan: SweepPlan, modes: tuple[Mode, ...], sweep: Sweep) -> Pass:
    """Statistics of a panel of whole rows, and behind the barrier its gradients."""
    assert plan.panel_sweeps is not None
    second = plan.panel_sweeps[1]
    return _make(
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


def _sweep_passes(
    plan: SweepPlan, modes: tuple[Mode, ...], sweep: Sweep, schedule: Schedule
) -> list[Pass]:
    """One sweep's passes: two where each makes the gradient of one side."""
    if schedule == "recompute" and sweep.gradients and sweep.grid[1] != SLOTS:
        return [
            _make(
                plan,
                modes,
                sweep.level,
                sweep.grid,
                sweep.reductions if not index else (),
                sweep.gradients,
                sides=(side,),
            )
            for index, side in enumerate(needed_sides(plan, sweep.gradients))
        ]
    keep: Literal["", "write", "read"] = ""
    if schedule == "retain":
        keep = "write" if sweep.level <= plan.forward_levels else "read"
    return [
        _make(
            plan,
            modes,
            sweep.level,
            sweep.grid,
            sweep.reductions,
            sweep.gradients,
            symmetric=sweep.symmetric and schedule not in ("recompute", "panel"),
            whole_rows=schedule == "panel",
            keep=keep,
        )
    ]


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
                needed_sides(plan, gradients),
                symmetric=False,
                whole_rows=False,
                whole=True,
                keep="",
                programs={"whole": level.program},
            ),
        )
    (start, *rest) = by_level.items()
    stages = stages_of(plan, 0, rest, forward_names(plan, fused=True), start[1])
    return Program(plan, "dense", ("whole",), stages, (), fused=True)


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
        needed_sides(plan, gradients) if sides is None else sides,
        symmetric,
        whole_rows,
        False,
        keep,
        programs,
        remake,
        rounded,
        rounded_remake,
    )
