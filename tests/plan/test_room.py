"""What a sweep frees an allocator may keep in the way of the next: plans leave room for that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cl_compiler.errors import BudgetError
from cl_compiler.hardware import load_hardware
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.plan import choose_plan, max_batch, plan_candidates
from cl_compiler.plan.search import RESOLUTION, nearby_plans
from cl_compiler.plan.space import REUSED, space_of
from cl_compiler.plan.types import MemoryBudget, Plan, Request, Tile
from tests.plan.requests import request

ZEN4 = load_hardware("epyc-zen4-2c")
XEON = load_hardware("xeon-amx-2c")
GRADIENTS = 2 * 16384 * 512 * 4


def asked(budget: int) -> Request:
    return replace(request(clip, rows=16384), hardware=ZEN4, budget=MemoryBudget(budget))


def beside(plan: Plan, wanted: Request) -> float:
    space = space_of(wanted, None, None)
    return space.allocator_bytes(space.point(plan.schedule, plan.tile, plan.kept_tiles))


@pytest.mark.parametrize("mib", [68, 80, 96, 128, 256, 512, 1024])
@pytest.mark.parametrize("hardware", [ZEN4, XEON], ids=["onednn", "blas"])
def test_budgets_hold_what_an_allocator_may_keep(mib: int, hardware: object) -> None:
    wanted = replace(asked(mib << 20), hardware=hardware)
    plan = choose_plan(wanted)
    assert 0 < beside(plan, wanted) <= (mib << 20) - plan.peak_bytes


def test_a_gpus_allocator_is_not_glibcs() -> None:
    wanted = request(clip, "h100x1", rows=16384)
    assert beside(choose_plan(wanted), wanted) == 0


@pytest.mark.parametrize("mib", [70, 96])
def test_what_is_measured_leaves_it_too(mib: int) -> None:
    wanted = asked(mib << 20)
    plans = (*plan_candidates(wanted), *nearby_plans(wanted, 20))
    assert len(plans) > 4
    assert all(p.peak_bytes + beside(p, wanted) <= mib << 20 for p in plans)


def test_a_budget_without_that_room_is_planned_for_all_the_same() -> None:
    """Errors name the bytes that are in use, and with those a plan is made."""
    wanted = asked(1 << 40)
    least = min(p.peak_bytes for p in space_of(wanted, None, None).points("recompute"))
    plan = choose_plan(asked(least))
    assert plan.peak_bytes <= least < plan.peak_bytes + beside(plan, asked(least))
    assert max_batch(asked(least)) >= 16384


def test_what_leaves_too_little_is_rejected_in_words() -> None:
    plan = choose_plan(asked(GRADIENTS + (12 << 20)))
    said = [c for c in plan.rejected if "leaves too little for an allocator" in c.reason]
    assert said and all(c.peak_bytes <= plan.budget.device_bytes for c in said)
    others = [c for c in plan.rejected if c.peak_bytes and "allocator" not in c.reason]
    fitting = [c for c in others if "does not fit" not in c.reason]
    assert all(c.seconds >= plan.seconds * (1 - RESOLUTION) for c in fitting)


def test_a_tile_that_is_not_kept_is_freed_too() -> None:
    space = space_of(request(clip, ZEN4, rows=4096, width=64, schedule="retain"), None, None)
    option, tile = space.option("retain"), Tile(512, 512)
    count = option.tile_count(space.sizes, tile)
    some, every = (
        space.allocator_bytes(space.point("retain", tile, n)) for n in (count - 1, count)
    )
    assert some - every == REUSED * 512 * 512 * 4


def test_kept_tiles_that_glibc_would_map_each_time_are_not_taken() -> None:
    """Pages of a new tensor of 32 MiB are cleared whenever one is made."""
    plan = choose_plan(request(clip, ZEN4, rows=65536, width=512, budget="4GiB", schedule="retain"))
    assert 8 * 2**20 <= plan.tile.rows * plan.tile.cols * 4 < 32 * 2**20


@pytest.mark.parametrize("hardware", [ZEN4, XEON], ids=["onednn", "blas"])
@pytest.mark.parametrize("schedule", ["retain", "spill", "recompute"])
def test_the_bytes_that_a_refusal_names_are_enough(hardware: object, schedule: str) -> None:
    """Whether one tile holds everything or many, and with a little more, too."""
    for rows in (64, 300):
        wanted = request(clip, hardware, rows=rows, width=64, schedule=schedule)
        with pytest.raises(BudgetError) as refusal:
            choose_plan(replace(wanted, budget=MemoryBudget(1024)))
        for more in range(0, 80_000, 10_000):
            least = refusal.value.least_bytes + more
            assert choose_plan(replace(wanted, budget=MemoryBudget(least))).peak_bytes <= least
