"""Rows for ranks that differ."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from cl_compiler.codegen.ring.backend import fits_group, plan_group
from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.limits import scaled
from cl_compiler.plan.shards import (
    advised_rows,
    largest_shard,
    largest_total,
    shares_of_ranks,
    simulated_s,
    without_poorest,
)
from cl_compiler.plan.share import Share, memory_of
from cl_compiler.plan.types import MemoryBudget, Problem, Request


@pytest.mark.parametrize("schedule", ["ring_owner", "all_gather"])
def test_the_largest_shard_fits_and_one_row_more_does_not(schedule):
    loss, needs = find("clip"), frozenset({"x", "y", "logit_scale"})
    machine = with_ranks(load_hardware("xeon-amx-2c"), 4, 4)
    budget, problem = MemoryBudget.parse("24MiB"), Problem(64, 64, 256)
    asked = Request(loss, machine, budget, problem, "paired", needs, "ieee", schedule, 0, 4)
    sweeps = plan_sweeps(loss, "paired", needs)
    rows = largest_shard(asked, sweeps)
    plan, _ = choose_cluster_plan(replace(asked, problem=Problem(rows, rows, 256)), sweeps)
    assert plan.peak_bytes <= budget.device_bytes and rows > 1000
    with pytest.raises(BudgetError):
        choose_cluster_plan(replace(asked, problem=Problem(rows + 1, rows + 1, 256)), sweeps)
    assert largest_shard(replace(asked, budget=MemoryBudget(1 << 10)), sweeps) == 0


def test_rows_are_in_proportion_and_none_is_lost():
    rng = random.Random(3)
    for _ in range(50):
        speeds = [rng.uniform(0.2, 3.0) for _ in range(rng.randint(1, 9))]
        total = rng.randint(0, 10_000)
        rows = advised_rows(total, speeds)
        assert sum(rows) == total
        assert all(abs(n - total * s / sum(speeds)) < 1 for n, s in zip(rows, speeds, strict=True))


def test_a_full_rank_leaves_its_part_to_the_others():
    assert advised_rows(100, [1, 1, 2], [10, 100, 100]) == (10, 30, 60)
    assert advised_rows(100, [1, 1, 2], [10, 100, 50]) == (10, 40, 50)
    rows = advised_rows(97, [1.0, 5.0, 1.0], [40, 30, 40])
    assert (
        sum(rows) == 97
        and rows[1] == 30
        and all(n <= m for n, m in zip(rows, (40, 30, 40), strict=True))
    )


def group_of(ranks: int, rows: int, width: int):
    loss, needs = find("clip"), frozenset({"x", "y", "logit_scale"})
    machine = with_ranks(load_hardware("xeon-amx-2c"), ranks, ranks)
    problem, budget = Problem(rows, rows, width), MemoryBudget.parse("1GiB")
    asked = Request(loss, machine, budget, problem, "paired", needs, "ieee", "auto", 0, ranks)
    return asked, plan_sweeps(loss, "paired", needs)


@pytest.mark.parametrize(
    ("speeds", "mebibytes"),
    [((1, 1, 1, 1), (64, 64, 12, 30)), ((1, 1, 1, 2), (64, 64, 14, 64)), ((1, 3), (4096, 21))],
)
def test_every_rank_keeps_within_its_own_memory(speeds, mebibytes):
    """With one plan for all, made for the budget that is advised; and no row is lost."""
    asked, sweeps = group_of(len(speeds), 4096, 256)
    budgets, total = [n << 20 for n in mebibytes], 4096 * len(speeds)
    found = shares_of_ranks(asked, sweeps, total, speeds, budgets)
    assert sum(found.rows) == total
    widest = scaled(asked.problem, max(found.rows))
    again = replace(asked, problem=widest, budget=MemoryBudget(found.plan.peak_bytes))
    again = replace(again, schedule=found.plan.cluster.schedule)
    plan, program = choose_cluster_plan(again, sweeps)
    for rows, most, peak in zip(found.rows, budgets, found.peak_bytes, strict=True):
        mine = replace(asked, problem=scaled(asked.problem, rows))
        of = plan.cluster
        share = Share(mine, sweeps, program, of.schedule, of.chunk, of.node, of.resident)
        _, items = memory_of(share, plan.tile)
        assert sum(count for _, count in items) <= most and peak <= most
    roomy = shares_of_ranks(asked, sweeps, total, speeds)
    assert roomy.rows == advised_rows(total, speeds)
    with pytest.raises(BudgetError, match="does not fit on ranks with these budgets"):
        shares_of_ranks(asked, sweeps, total, speeds, [1 << 20] * len(speeds))


@pytest.mark.parametrize(
    ("schedule", "speeds", "mebibytes"),
    [("ring_owner", (1, 1, 1, 2), (64, 64, 12, 30)), ("ring_travel", (2, 1), (32, 32))],
)
def test_the_largest_batch_fills_every_rank(schedule, speeds, mebibytes):
    """With one row more there are no shards; even ones would stop at the least memory."""
    asked, sweeps = group_of(len(speeds), 4096, 256)
    budgets = [n << 20 for n in mebibytes]
    asked = replace(asked, schedule=schedule, budget=MemoryBudget(min(budgets)))
    total = largest_total(asked, sweeps, speeds, budgets)
    found = shares_of_ranks(asked, sweeps, total, speeds, budgets)
    assert sum(found.rows) == total
    for peak, most in zip(found.peak_bytes, budgets, strict=True):
        assert 0.9 * most < peak <= most
    with pytest.raises(BudgetError):
        shares_of_ranks(asked, sweeps, total + 1, speeds, budgets)
    even = len(speeds) * largest_shard(asked, sweeps)
    assert total == even if len(set(budgets)) == 1 else total > 2 * even


def poor_group(poor: str):
    """Seven ranks with room, and one with little."""
    loss, needs = find("clip"), frozenset({"x", "y", "logit_scale"})
    budgets = [1 << 28] * 7 + [MemoryBudget.parse(poor).device_bytes]
    asked = Request(loss, load_hardware("h100x8"), MemoryBudget(budgets[-1]),
                    Problem(8192, 8192, 256), "paired", needs, "bf16x3", "auto", 0, 8)  # fmt: skip
    return asked, plan_sweeps(loss, "paired", needs), budgets


def test_a_rank_with_too_little_memory_for_any_part_is_named():
    """Soon, with what it needs: twice that is enough."""
    asked, sweeps, budgets = poor_group("300KiB")
    asked = replace(asked, schedule="ring_owner")
    with pytest.raises(BudgetError, match=r"rank 7 cannot take part with 300\.0 KiB") as refusal:
        shares_of_ranks(asked, sweeps, 65536, [1] * 8, budgets, plan_group, fits_group)
    budgets[-1] = refusal.value.least_bytes * 2
    found = shares_of_ranks(asked, sweeps, 65536, [1] * 8, budgets, plan_group, fits_group)
    assert sum(found.rows) == 65536 and found.peak_bytes[-1] <= budgets[-1]


def test_rows_move_to_richer_ranks_before_inputs_move_to_the_host():
    """So many that tiles are as large as is worth it; and leaving the rank out is weighed."""
    asked, sweeps, budgets = poor_group("10MiB")
    ask = (65536, [1] * 8, budgets, plan_group, fits_group)
    found = shares_of_ranks(asked, sweeps, *ask)
    assert found.plan.cluster.schedule != "host" and found.rows[-1] < min(found.rows[:-1])
    for peak, most in zip(found.peak_bytes, budgets, strict=True):
        assert peak <= most
    by_one = replace(asked, schedule=found.plan.cluster.schedule)
    assert shares_of_ranks(by_one, sweeps, *ask).rows == found.rows  # as `simulate` asks
    rank, seconds = without_poorest(asked, sweeps, *ask)
    assert rank == 7 and 0 < seconds < 2 * simulated_s(found, asked, [1] * 8)
    assert without_poorest(asked, sweeps, 65536, [1] * 8, [1 << 28] * 8) is None


def test_what_cannot_be():
    with pytest.raises(ArgumentError, match="hold 60 together"):
        advised_rows(61, [1, 1], [30, 30])
    with pytest.raises(ArgumentError, match="positive number"):
        advised_rows(10, [1, 0])


@pytest.mark.parametrize(
    ("preset", "loss", "dtype", "schedule", "template"),
    [
        ("a800-4x8", "clip", "bfloat16", "ring_owner", "triton"),
        ("a800-4x8", "clip", "bfloat16", "all_gather", "torch"),
        ("h100x8", "nt_xent", "float16", "half_ring", "triton"),
        ("h100x8", "clip", "float64", "ring_owner", "torch"),
        ("h100x8", "siglip", "bfloat16", "ring_travel", "triton"),
        # auto ends where shards are in host memory, and PyTorch's tiles take least
        pytest.param("h100x8", "siglip", "bfloat16", "auto", "torch", marks=pytest.mark.full),
    ],
)
def test_whether_a_group_fits_is_whether_it_can_be_planned(preset, loss, dtype, schedule, template):
    """The largest shard is found without a plan; there is one of it, and of a step more none."""
    spec, found = load_hardware(preset), find(loss)
    needs = frozenset(op.name for op in found.operands) | {*found.parameters}
    problem, budget = Problem(300, 300, 768, dtype), MemoryBudget.parse("80MiB")
    positives = "views" if found.is_single_set else "paired"
    asked = Request(
        found, spec, budget, problem, positives, needs, "ieee", schedule, 0, spec.world_size
    )
    sweeps = plan_sweeps(found, positives, needs)
    rows = largest_shard(asked, sweeps, fits_group)
    plan, _ = plan_group(replace(asked, problem=scaled(problem, rows)), sweeps)
    assert plan.peak_bytes <= budget.device_bytes and plan.template == template
    with pytest.raises(BudgetError):
        plan_group(replace(asked, problem=scaled(problem, rows + asked.row_step)), sweeps)
