"""A plan as JSON and back: what the cache stores, and what ranks broadcast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from cl_compiler.errors import ArgumentError
from cl_compiler.plan.types import (
    Candidate,
    ClusterPlan,
    HostPlan,
    LevelPlan,
    LinkBytes,
    MemoryBudget,
    Plan,
    Problem,
    Tile,
)

_PAIRS = ("hiding_rows_by_phase", "rejected")
"""Fields of a cluster plan that list (name, value)."""


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """Fields by name, as JSON values; equal plans give equal text with sorted keys."""
    result: dict[str, Any] = {f.name: getattr(plan, f.name) for f in fields(plan)}
    result["problem"] = problem_to_json(plan.problem)
    result["budget"] = {
        "device": plan.budget.device_bytes,
        **({} if plan.budget.host_bytes is None else {"host": plan.budget.host_bytes}),
    }
    result["needs"] = sorted(plan.needs)
    result["tile"] = _tile(plan.tile)
    result["levels"] = [_record(level) for level in plan.levels]
    result["rejected"] = [_record(candidate) for candidate in plan.rejected]
    result["memory"] = [list(item) for item in plan.memory]
    result["seconds_by_part"] = [list(item) for item in plan.seconds_by_part]
    result["notes"] = list(plan.notes)
    if plan.cluster is not None:
        cluster = {f.name: getattr(plan.cluster, f.name) for f in fields(plan.cluster)}
        pairs = {name: [list(item) for item in cluster[name]] for name in _PAIRS}
        links = [asdict(link) for link in plan.cluster.links]
        host = None if plan.cluster.host is None else asdict(plan.cluster.host)
        result["cluster"] = {**cluster, **pairs, "links": links, "host": host}
    return result


def plan_from_json(content: Mapping[str, Any]) -> Plan:
    """The plan that ``plan_to_json`` wrote.

    Raises:
        ArgumentError: a field is missing, unknown or malformed.
    """
    known = {f.name for f in fields(Plan)}
    if set(content) != known:
        odd = ", ".join(sorted(set(content) ^ known))
        raise ArgumentError(f"this is no plan of this version: fields {odd}; plan again.")
    try:
        values = dict(content)
        values["problem"] = Problem(**content["problem"])
        values["budget"] = MemoryBudget.parse(dict(content["budget"]))
        values["needs"] = frozenset(content["needs"])
        values["tile"] = Tile(*content["tile"])
        values["levels"] = tuple(
            LevelPlan(**{**level, "tile": Tile(*level["tile"])}) for level in content["levels"]
        )
        values["rejected"] = tuple(
            Candidate(**{**c, "tile": Tile(*c["tile"])}) for c in content["rejected"]
        )
        values["memory"] = tuple((what, count) for what, count in content["memory"])
        values["seconds_by_part"] = tuple((w, s) for w, s in content["seconds_by_part"])
        values["notes"] = tuple(content["notes"])
        if (cluster := content["cluster"]) is not None:
            pairs = {name: tuple((k, v) for k, v in cluster[name]) for name in _PAIRS}
            links = tuple(LinkBytes(**link) for link in cluster["links"])
            host = None if cluster["host"] is None else HostPlan(**cluster["host"])
            values["cluster"] = ClusterPlan(**{**cluster, **pairs, "links": links, "host": host})
    except (TypeError, ValueError, KeyError) as error:
        raise ArgumentError(f"this is no plan of this version: {error}; plan again.") from error
    return Plan(**values)


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """Fields by name; operands sorted."""
    result = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return {**result, "operands": dict(sorted(problem.operands.items()))}


def _record(value: LevelPlan | Candidate) -> dict[str, Any]:
    result = {f.name: getattr(value, f.name) for f in fields(value)}
    return {**result, "tile": _tile(value.tile)}


def _tile(tile: Tile) -> list[int]:
    return [tile.rows, tile.cols]


__all__ = ["plan_from_json", "plan_to_json", "problem_to_json"]
