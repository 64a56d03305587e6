"""What is chosen: the fastest that fits, on any machine, for reasons that lie in its numbers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from cl_compiler import lang as cl
from cl_compiler.codegen.render import render
from cl_compiler.errors import ArgumentError, ScheduleError
from cl_compiler.hardware import Level, load_hardware, preset_names
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.ranks import one_device
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.program import SCHEDULES
from cl_compiler.lang.ring import CLUSTER_SCHEDULES
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.losses.self_supervised import nt_xent
from cl_compiler.losses.sigmoid import siglip
from cl_compiler.plan import Plan, choose_plan, explain, max_batch, plan_candidates
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.search import RESOLUTION
from cl_compiler.plan.space import axis_steps, space_of
from cl_compiler.plan.types import Request, Tile
from tests.losses_zoo import cases
from tests.plan.requests import XEON, request, with_caches, with_gemm, with_level, with_links
from tests.zoo_case import Case


def part(plan: Plan, what: str) -> float:
    return dict(plan.seconds_by_part).get(what, 0.0)


# ---- what was measured to be best is found ------------------------------------------------------


@pytest.mark.parametrize("rows", [4096, 16384])
def test_the_best_measured_tiles_are_found(rows: int) -> None:
    plan = choose_plan(request(clip, rows=rows, budget="1GiB", schedule="spill"))
    assert plan.tile in (Tile(512, 512), Tile(512, 1024), Tile(1024, 512))


@pytest.mark.parametrize("rows", [4096, 16384, 65536])
def test_panels_are_128_to_1024_rows_high(rows: int) -> None:
    plan = choose_plan(request(infonce, rows=rows, budget="1GiB"))
    assert plan.schedule == "panel" and plan.tile.cols == rows
    assert 128 <= plan.tile.rows <= 1024


@pytest.mark.parametrize("rows", [64, 128, 256, 512])
def test_a_matrix_of_one_tile_is_kept_whole(rows: int) -> None:
    plan = choose_plan(request(clip, rows=rows))
    assert plan.schedule == "dense" and plan.tile == Tile(rows, rows) and plan.units == 3.0


def test_a_matrix_of_a_few_tiles_is_kept_too() -> None:
    assert choose_plan(request(clip, rows=1024)).units == 3.0


def test_fused_losses_need_no_tile_kept() -> None:
    plan = choose_plan(request(siglip, budget="1GiB"))
    assert (plan.schedule, plan.kept_tiles) == ("spill", 0)


# ---- nothing faster exists ----------------------------------------------------------------------


def brute_force(loss: LossIR, rows: int, budget: str, step: int = 64) -> float:
    """The least seconds over all schedules, tiles in steps of ``step`` and counts of kept tiles."""
    space = space_of(request(loss, rows=rows, width=64, budget=budget), None, None)
    sides = sorted({*range(step, rows, step), rows})
    best = float("inf")
    for schedule in space.schedules():
        option = space.option(schedule)
        for m in sides:
            for n in sides:
                tile = Tile(m, n)
                if schedule == "dense" and tile != Tile(rows, rows):
                    continue
                if option.facts.needs_square_tiles and m != n:
                    continue
                if option.facts.spans_rows and n != rows:
                    continue
                count = option.tile_count(space.sizes, tile)
                for kept in range(1, count + 1) if count else (0,):
                    if schedule == "retain" and count == 1:
                        continue
                    found = space.point(schedule, tile, kept)
                    if space.leaves_room(found):
                        best = min(best, found.seconds)
    return best


@pytest.mark.parametrize("loss", [clip, infonce, siglip, nt_xent], ids=lambda v: v.name)
@pytest.mark.parametrize("budget", ["600KiB", "1MiB", "64MiB"])
def test_brute_force_finds_nothing_faster(loss: LossIR, budget: str) -> None:
    plan = choose_plan(request(loss, rows=700, width=64, budget=budget))
    # Tiles kept for speed leave a 64th of the budget free, which brute force does not.
    spare = 0.02 if plan.schedule == "retain" else 0.0
    assert plan.seconds <= brute_force(loss, 700, budget) * (1 + RESOLUTION + spare)


def test_coarser_steps_along_long_axes_lose_little() -> None:
    chosen = choose_plan(request(clip, rows=3000, width=256, budget="20MiB", schedule="spill"))
    r = request(clip, rows=3000, width=256, budget="20MiB", schedule="spill")
    space = space_of(r, None, None)
    sides = [*range(64, 3000, 64), 3000]
    every = [space.point("spill", Tile(m, n), 0) for m in sides for n in sides]
    best = min(p.seconds for p in every if p.peak_bytes <= space.limit_bytes)
    assert chosen.seconds <= 1.02 * best


def test_tiles_are_multiples_of_64_or_whole_axes() -> None:
    for length in (1, 63, 64, 65, 700, 1024, 1025, 30000, 1 << 20):
        steps = axis_steps(length)
        assert steps == sorted(set(steps)) and steps[-1] == length
        assert all(step % 64 == 0 for step in steps[:-1])


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_every_loss_plans_within_its_budget(case: Case) -> None:
    extra = [o.name for o in case.loss.operands if o.name.startswith(("guide", "teacher"))]
    problem = dict(
        slots=max(case.slots, 4), bank=max(case.bank, 512), operands=dict.fromkeys(extra, 96)
    )
    for needs in (case.needs, frozenset[str]()):
        r = request(
            case.loss, rows=2048, width=128, budget="24MiB", needs=needs, positives=case.positives
        )
        plan = choose_plan(replace(r, problem=replace(r.problem, **problem)))
        assert 0 < plan.peak_bytes <= 24 << 20
        assert sum(count for _, count in plan.memory) == pytest.approx(plan.peak_bytes, abs=16)
        assert sum(s for _, s in plan.seconds_by_part) == pytest.approx(plan.seconds)


@cl.define_loss
def alignment(sim):  # type: ignore[no-untyped-def]
    """Reads the positives only, so there is nothing to sweep."""
    return cl.mean(1 - cl.at_positive(sim, on=cl.rows), over=cl.rows)


@pytest.mark.parametrize(
    ("loss", "rows", "cols", "width"),
    [
        (clip, 1, 1, 1),
        (clip, 63, 63, 512),
        (clip, 65, 70, 3),
        (infonce, 1, 1, 1),
        (infonce, 10, 100_000, 64),
        (clip, 10, 100_000, 64),
        (nt_xent, 2, 2, 5),
        (siglip, 1000, 1030, 7),
        (alignment, 16384, 16384, 512),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_small_thin_and_ragged_problems_plan(
    loss: LossIR, rows: int, cols: int, width: int
) -> None:
    plan = choose_plan(request(loss, rows=rows, cols=cols, width=width))
    assert plan.seconds > 0 and plan.peak_bytes >= rows * width * 4
    assert plan.tile.rows <= rows and plan.tile.cols <= cols
    text = explain(plan)
    assert text.startswith(f"{loss.name} on {XEON}\n")


# ---- the machine decides ------------------------------------------------------------------------


def test_a_quarter_of_the_cache_costs_time_and_shrinks_the_blocks_inside() -> None:
    small = with_caches(load_hardware(XEON), 0.25)
    for loss, schedule, rows in ((clip, "spill", 16384), (infonce, "panel", 65536)):
        shape = dict(rows=rows, budget="1GiB", schedule=schedule)
        before = choose_plan(request(loss, **shape))  # type: ignore[arg-type]
        after = choose_plan(request(loss, small, **shape))  # type: ignore[arg-type]
        assert after.seconds > before.seconds
        assert part(after, "tiles beyond cache") > part(before, "tiles beyond cache")
        blocks = [
            (b.tile.rows * b.tile.cols, a.tile.rows * a.tile.cols)
            for b, a in zip(before.levels[2:], after.levels[2:], strict=True)
        ]
        assert all(b > a for b, a in blocks)


def test_a_quarter_of_the_cache_shrinks_the_tile_where_small_tiles_are_cheap() -> None:
    # At D = 64 a small tile copies little; at D = 512 it would copy more than the cache saves.
    before = choose_plan(request(clip, width=64, schedule="spill"))
    small = with_caches(load_hardware(XEON), 0.25)
    after = choose_plan(request(clip, small, width=64, schedule="spill"))
    assert after.tile.rows * after.tile.cols < before.tile.rows * before.tile.cols
    assert after.seconds > before.seconds


def test_a_quarter_of_the_gemm_rate_takes_longer_and_makes_keeping_tiles_pay() -> None:
    slow = with_gemm(load_hardware(XEON), 0.25)
    before, after = choose_plan(request(clip)), choose_plan(request(clip, slow))
    assert 3 < after.seconds / before.seconds <= 4
    # With fast products and slow memory a tile is made again; with slow ones it is kept.
    b200 = load_hardware("b200x1")
    shape = dict(rows=32768, width=768, dtype="bfloat16", budget="2GiB")
    assert choose_plan(request(clip, b200, **shape)).schedule == "spill"  # type: ignore[arg-type]
    slow = with_gemm(b200, 0.25)
    assert choose_plan(request(clip, slow, **shape)).schedule == "retain"  # type: ignore[arg-type]


def of_group(asked: Request) -> Plan:
    """The plan of a rank, with an even share of the rows, on as many ranks as there are devices."""
    ranks = asked.hardware.world_size
    problem = replace(asked.problem, M=asked.problem.M // ranks, N=asked.problem.N // ranks)
    asked = replace(asked, problem=problem, group_size=ranks)
    return choose_cluster_plan(asked, plan_sweeps(asked.loss, asked.positives, asked.needs))[0]


def test_a_quarter_of_the_link_rate_takes_bytes_four_times_as_long_on_the_link() -> None:
    """Latencies stay as they are."""
    spec = load_hardware("h100x8")
    shape = dict(rows=1 << 17, width=768, dtype="bfloat16", budget="4GiB")
    before, after = (of_group(request(clip, s, **shape)) for s in (spec, with_links(spec, 0.25)))  # type: ignore[arg-type]
    assert after.seconds >= before.seconds  # products hide it
    assert before.cluster is not None and after.cluster is not None
    assert before.cluster.schedule == after.cluster.schedule
    sent = before.cluster.forward_bytes + before.cluster.backward_bytes
    bytes_s = sent / spec.links[0].bandwidth_bytes_per_s
    assert after.cluster.exchange_s - before.cluster.exchange_s == pytest.approx(3 * bytes_s)
    assert before.cluster.exchange_s > bytes_s


def test_a_quarter_of_the_link_rate_takes_longer_where_products_do_not_hide_it() -> None:
    spec = load_hardware("a800-4x8")
    shape = dict(rows=1 << 17, width=768, dtype="bfloat16", budget="4GiB")
    before, after = (of_group(request(clip, s, **shape)) for s in (spec, with_links(spec, 0.25)))  # type: ignore[arg-type]
    assert after.seconds > before.seconds


def test_a_quarter_of_the_budget_keeps_fewer_tiles_and_takes_longer() -> None:
    before, after = (choose_plan(request(clip, budget=b)) for b in ("512MiB", "128MiB"))
    assert before.schedule == "retain" and after.kept_tiles < before.kept_tiles / 4
    assert after.seconds > before.seconds and after.peak_bytes <= 128 << 20
    # When nothing is left to give up but the tile, the tile shrinks.
    tight = choose_plan(request(clip, budget="66MiB"))
    assert tight.tile.rows * tight.tile.cols < after.tile.rows * after.tile.cols


def test_less_memory_is_never_faster() -> None:
    budgets = ["66MiB", "70MiB", "80MiB", "128MiB", "256MiB", "1GiB", "2GiB"]
    seconds = [choose_plan(request(clip, budget=b)).seconds for b in budgets]
    assert all(a >= b * (1 - RESOLUTION) for a, b in pairwise(seconds))


def test_the_number_of_levels_is_not_hard_coded() -> None:
    spec = load_hardware(XEON)
    l4 = Level("l4", "cache", 1, 1 << 30, 40e9, "invented")
    l0 = Level("l0", "cache", 1, 512 << 10, 400e9, "invented")
    more = with_level(with_level(spec, l4, "l3"), l0, "core")
    before, after = choose_plan(request(clip, spec)), choose_plan(request(clip, more))
    assert [level.level for level in after.levels] == ["device", "l4", "l3", "l2", "l0", "core"]
    assert len(before.levels) == 4
    assert all(level.tile.rows >= 16 for level in after.levels)
    # The cache outside the others takes in kept tiles that had to live in DRAM.
    assert part(after, "tiles beyond cache") < part(before, "tiles beyond cache")
    pod = Level("pod", "cluster", 1, 0, 0.0, "invented")
    around = with_level(load_hardware("h100x8"), pod, "node")
    plan = of_group(request(clip, around, budget="1GiB"))
    assert [level.level for level in plan.levels] == ["device", "l2", "sm"]
    assert plan.seconds == of_group(request(clip, "h100x8", budget="1GiB")).seconds


def test_a_graph_that_the_caller_made_is_walked_instead_of_the_requests_hardware() -> None:
    r = request(clip, "h100x1")
    plan = choose_plan(r, hardware_graph=hardware_graph(load_hardware(XEON)))
    assert plan == choose_plan(request(clip, XEON))


# ---- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_plans_in_under_300_ms(name: str) -> None:
    """One device at once; a group in as long for each cluster schedule."""
    r = request(clip, name, rows=1 << 16, width=768, dtype="bfloat16", budget="4GiB")
    alone = r.hardware.world_size == 1
    taken = []
    for _ in range(3):
        start = time.process_time()
        plan = choose_plan(r) if alone else of_group(r)
        taken.append(time.process_time() - start)
    assert min(taken) < 0.3 * (1 if alone else len(CLUSTER_SCHEDULES))
    assert plan.peak_bytes <= 4 << 30 and plan.seconds > 0
    levels = [v.name for v in one_device(r.hardware).levels]
    assert [level.level for level in plan.levels] == levels


@pytest.mark.parametrize("plan", [choose_plan, max_batch, plan_candidates])
def test_many_devices_are_planned_for_as_a_group(plan: Callable[[Request], object]) -> None:
    asked = request(clip, "h100x8", rows=1 << 17, width=768, dtype="bfloat16", budget="4GiB")
    with pytest.raises(ArgumentError, match=r"h100x8 has 8 devices.*Request\(group_size=8\)"):
        plan(asked)


def test_one_cpu_says_nothing_about_ranks() -> None:
    assert choose_plan(request(clip)).notes == ()


# ---- requests -----------------------------------------------------------------------------------


def test_a_requested_schedule_is_used_even_if_it_is_slower() -> None:
    fastest = choose_plan(request(clip))
    for schedule in ("recompute", "spill", "retain"):
        plan = choose_plan(request(clip, schedule=schedule))
        assert plan.schedule == schedule
        assert plan.seconds >= fastest.seconds * (1 - RESOLUTION)


def test_retain_on_request_serves_batches_of_one_tile() -> None:
    for rows in (1, 7, 64):
        plan = choose_plan(request(clip, rows=rows, schedule="retain"))
        assert (plan.schedule, plan.kept_tiles) == ("retain", 1)


def test_a_schedule_that_the_loss_cannot_use_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="statistics that a panel of rows cannot complete"):
        choose_plan(request(clip, schedule="panel"))


def test_an_unknown_schedule_is_an_error_with_the_choices() -> None:
    with pytest.raises(ScheduleError, match="recompute, spill, panel, retain, dense"):
        choose_plan(request(clip, schedule="flash"))


def test_every_other_schedule_is_rejected_with_a_reason() -> None:
    plan = choose_plan(request(clip))
    reasons = {c.schedule: c.reason for c in plan.rejected if c.schedule != plan.schedule}
    assert set(reasons) == set(SCHEDULES) - {plan.schedule}
    assert "slower" in reasons["spill"] and "slower" in reasons["recompute"]
    assert "does not fit" in reasons["dense"] and "panel of rows" in reasons["panel"]


def test_rejected_tiles_are_no_faster_than_the_chosen_one() -> None:
    plan = choose_plan(request(clip))
    evaluated = [c for c in plan.rejected if c.peak_bytes and "does not fit" not in c.reason]
    assert len(evaluated) >= 4
    assert all(c.seconds >= plan.seconds * (1 - RESOLUTION) for c in evaluated)


def test_candidates_are_ordered_and_begin_with_the_fastest() -> None:
    r = request(clip, rows=2048, budget="128MiB")
    plans = plan_candidates(r)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    assert {p.schedule for p in plans} == {"recompute", "spill", "retain", "dense"}
    assert plans[0].seconds <= choose_plan(r).seconds


def test_the_same_request_gives_the_same_plan() -> None:
    r = request(clip)
    assert choose_plan(r) == choose_plan(r)
    sweeps = plan_sweeps(r.loss, r.positives, r.needs)
    assert choose_plan(r, sweeps) == choose_plan(r)


@pytest.mark.parametrize("budget", ["70MiB", "256MiB"])
def test_emitted_constants_are_the_plans(budget: str) -> None:
    r = request(clip, budget=budget)
    sweeps = plan_sweeps(r.loss, r.positives, r.needs)
    plan = choose_plan(r, sweeps)
    text = render(plan, build_program(sweeps, plan.schedule), "constants")
    found = re.search(r"^TILE_M, TILE_N = (\d+), (\d+)", text, re.M)
    assert found is not None
    assert (int(found[1]), int(found[2])) == (plan.tile.rows, plan.tile.cols)
    kept = re.search(r"^KEPT_TILES = (\d+)", text, re.M)
    assert (int(kept[1]) if kept else 0) == plan.kept_tiles
