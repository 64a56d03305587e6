"""What distinguishes two plans, and the files that they become."""

from __future__ import annotations

import difflib

from cl_compiler.cli.output import Table
from cl_compiler.plan.types import ClusterPlan, Plan
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["difference_table", "source_diff"]

_ABSENT = "-"


def difference_table(before: Plan, after: Plan) -> Table:
    """One row for everything in which two plans differ."""
    first, second = _facts(before), _facts(after)
    names = [*first, *(name for name in second if name not in first)]
    rows = tuple(
        (name, first.get(name, _ABSENT), second.get(name, _ABSENT))
        for name in names
        if first.get(name) != second.get(name)
    )
    title = "" if rows else "the plans are the same"
    return Table(title, ("", "this plan", "the other"), rows, frozenset({1, 2}))


def _facts(plan: Plan) -> dict[str, str]:
    problem = plan.problem
    facts = {
        "loss": plan.loss_name,
        "hardware": plan.hardware_name,
        "problem": f"M={problem.M} N={problem.N} D={problem.D} {problem.dtype}",
        "positives": plan.positives,
        "gradients": ", ".join(sorted(plan.needs)) or "none",
        "precision": plan.precision,
        **_of_ranks(plan.cluster),
        "schedule" if plan.cluster is None else "on a rank": plan.schedule,
        "tile": str(plan.tile),
        "kept tiles": str(plan.kept_tiles),
        "budget": format_bytes(plan.budget.device_bytes),
        "predicted peak": format_bytes(plan.peak_bytes),
        "predicted time": format_seconds(plan.seconds),
        "units of 2·M·N·D": f"{plan.units:.2f}",
        "peak is in": plan.peak_phase,
    }
    facts |= {f"bytes: {what}": format_bytes(count) for what, count in plan.memory}
    facts |= {f"time: {what}": format_seconds(taken) for what, taken in plan.seconds_by_part}
    for level in plan.levels:
        facts[f"{level.level}: tile"] = str(level.tile)
        facts[f"{level.level}: bound by"] = level.bound_by
    return facts


def _of_ranks(cluster: ClusterPlan | None) -> dict[str, str]:
    """How shards travel, on a group."""
    if cluster is None:
        return {}
    return {
        "schedule": cluster.schedule,
        "ranks": str(cluster.group_size),
        "chunk": f"{cluster.chunk} rows",
        "sent forward": format_bytes(cluster.forward_bytes),
        "sent backward": format_bytes(cluster.backward_bytes),
        "exchange not hidden": format_seconds(cluster.exposed_s),
    }


def source_diff(before: tuple[str, str], after: tuple[str, str]) -> str:
    """A unified diff of two (name, text)."""
    (name, text), (other_name, other_text) = before, after
    lines = difflib.unified_diff(
        text.splitlines(keepends=True), other_text.splitlines(keepends=True),
        f"{name}.py", f"{other_name}.py",
    )  # fmt: skip
    return "".join(lines)
