"""explain() and the plan's JSON."""

from __future__ import annotations

import json

import pytest

from cl_compiler.errors import ArgumentError
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.plan import Plan, choose_plan, explain, plan_from_json, plan_to_json
from cl_compiler.units import format_bytes, format_seconds
from tests.plan.requests import request

PLANS = [
    choose_plan(request(clip)),
    choose_plan(request(infonce, rows=300)),
    choose_plan(request(clip, "h100x1", rows=1 << 17, width=768, dtype="bfloat16", budget="2GiB")),
]


def section(text: str, title: str) -> list[str]:
    """The lines under a title, up to the next blank line."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    stop = lines.index("", start) if "" in lines[start:] else len(lines)
    return lines[start:stop]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.loss_name}-{p.hardware_name}")
def test_every_level_is_shown_with_tile_bytes_time_and_bound(plan: Plan) -> None:
    shown = section(explain(plan), "levels")
    assert len(shown) == 1 + len(plan.levels)
    for line, level in zip(shown[1:], plan.levels, strict=True):
        expected = [level.level, level.kind, str(level.tile)]
        expected += format_bytes(level.resident_bytes).split()
        expected += format_bytes(level.traffic_bytes).split() if level.traffic_bytes else ["-"]
        expected += format_seconds(level.seconds).split() if level.seconds else ["-"]
        assert line.split() == [*expected, *level.bound_by.split()]


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.loss_name}-{p.hardware_name}")
def test_every_rejected_candidate_is_shown_with_its_reason(plan: Plan) -> None:
    shown = section(explain(plan), "rejected")[1:]
    assert len(shown) == len(plan.rejected)
    for line, candidate in zip(shown, plan.rejected, strict=True):
        assert line.split()[0] == candidate.schedule and line.endswith(candidate.reason)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.loss_name}-{p.hardware_name}")
def test_columns_are_aligned_and_nothing_depends_on_colour(plan: Plan) -> None:
    text = explain(plan)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    lines = section(text, "levels")
    # The column of tiles is right-aligned: every entry ends where its heading ends.
    end = lines[0].index("tile") + len("tile")
    for line, level in zip(lines[1:], plan.levels, strict=True):
        assert line[:end].endswith(str(level.tile))


def test_shares_of_memory_and_time_are_sorted_and_complete() -> None:
    text = explain(PLANS[0])
    for title in ("memory at the peak", "time\n".strip()):
        shares = [int(line.split()[-1].rstrip("%")) for line in section(text, title)]
        assert shares == sorted(shares, reverse=True) and 98 <= sum(shares) <= 102


def test_notes_appear_where_there_are_any() -> None:
    assert "notes" not in explain(PLANS[0])
    assert "operands are widened per tile" in explain(PLANS[2])


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.loss_name}-{p.hardware_name}")
def test_a_plan_survives_json(plan: Plan) -> None:
    text = json.dumps(plan_to_json(plan), sort_keys=True, allow_nan=False)
    assert plan_from_json(json.loads(text)) == plan
    assert json.dumps(plan_to_json(plan_from_json(json.loads(text))), sort_keys=True) == text


def test_json_of_another_version_is_refused_with_the_field() -> None:
    content = plan_to_json(PLANS[0])
    with pytest.raises(ArgumentError, match="colour"):
        plan_from_json({**content, "colour": "blue"})
    del content["tile"]
    with pytest.raises(ArgumentError, match="tile"):
        plan_from_json(content)
    with pytest.raises(ArgumentError, match="plan again"):
        plan_from_json({**plan_to_json(PLANS[0]), "tile": 5})
