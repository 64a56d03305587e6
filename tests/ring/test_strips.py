"""Tiles of a group's ranks on CPUs: worked on in strips, their products made by oneDNN."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cl_compiler import compile_loss
from cl_compiler.codegen.ring.backend import plan_and_print_ring
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.ring import CANONICAL, HOST
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Request, Tile
from cl_compiler.runtime import loader
from cl_compiler.runtime.measure import planted_pairs
from tests import losses_zoo as zoo
from tests.dense_fp32 import dense
from tests.ring.numerics import Job
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, schedules_of, split
from tests.ring.test_numerics import check
from tests.ring.test_plan import live_bytes, request
from tests.ring.test_random_losses import assert_right
from tests.tiles import errors
from tests.zoo_case import Case, sample

ZEN5 = "epyc-zen5-2c"
STRIPS = (1, 2, 64)
"""Columns: one at a time, ragged strips, one strip of a whole tile."""


def usable(case: Case) -> list[str]:
    """The schedules whose tiles are in strips."""
    return [schedule for schedule in schedules_of(case) if schedule != HOST]


CASES = {case.name: case for case in zoo.cases() if usable(case)}


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    """Schedules take turns; ``test_every_schedule`` has all of them."""
    turn, schedules = list(CASES).index(name), usable(CASES[name])
    assert_right(CASES[name], schedules[turn % len(schedules)], turn, STRIPS[turn % 3])


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_every_schedule(name: str) -> None:
    for schedule in usable(CASES[name]):
        for seed in range(3):
            assert_right(CASES[name], schedule, seed, STRIPS[seed])


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather"])
@pytest.mark.parametrize("name", ["clip", "siglip", "infonce_ids"])
def test_products_by_onednn_are_as_exact_as_dense_fp32(name: str, schedule: str) -> None:
    """Large enough that strips and tiles end raggedly."""
    case = CASES[name]
    whole = sample(case, 300, 340, 64, seed=7)
    text = emit_ring(
        case, schedule, dtype="float32", width=64, tile=Tile(96, 128), chunk=70, strip=48,
        library="onednn",
    )  # fmt: skip
    found = run_group(text, whole, split(case, 300, 340, (3, 2)), dtype=torch.float32)
    limits = errors(dense(whole, torch.float32), whole)
    for what, error in errors(found.result, whole).items():
        assert error <= max(2e-6, 3 * limits[what]), what


def planned(
    schedule: str,
    *,
    hardware: str = ZEN5,
    rows: int = 2048,
    name: str = "clip",
    deterministic: bool = False,
) -> Plan:
    case = CASES[name]
    asked = Request(
        case.loss, with_ranks(load_hardware(hardware), 2, 2), MemoryBudget(1 << 30),
        Problem(rows, rows, 256), case.positives, case.needs, "ieee", schedule, 0, 2,
        deterministic,
    )  # fmt: skip
    sweeps = plan_sweeps(asked.loss, asked.positives, asked.needs)
    plan, text = plan_and_print_ring(asked, sweeps, "test")
    assert ("\nSTRIP = " in text) == bool(plan.strip)
    assert ("LOG2E" in text) == (plan.exponential == "exp2")
    assert ("_setting_for" in text) == (plan.library == "onednn")
    return plan


def test_a_rank_takes_the_faster_library_and_exponential() -> None:
    plan = planned("auto")
    assert (plan.library, plan.exponential) == ("onednn", "exp2") and plan.strip
    there = planned("auto", hardware="xeon-amx-2c")
    assert (there.library, there.exponential, there.strip) == ("blas", "exp", 0)


def test_what_is_left_to_blas() -> None:
    """Bits that must not depend on earlier batches, subtracted positives, the smallest shards."""
    for plan in (
        planned(CANONICAL),
        planned("auto", deterministic=True),
        planned("auto", name="debiased_rows"),
        planned("auto", rows=64),
    ):
        assert (plan.library, plan.strip) == ("blas", 0)


def test_blocks_of_shards_in_host_memory_have_no_strips() -> None:
    plan = planned(HOST)
    assert plan.library == "onednn" and not plan.strip


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather", "both_ways"])
def test_a_rank_holds_what_was_predicted(schedule: str) -> None:
    predicted, measured = live_bytes(request(schedule, 3, 1024, 256, hardware=ZEN5))
    assert abs(predicted - measured) <= 0.01 * predicted, (predicted, measured)


def test_real_ranks_multiply_by_onednn() -> None:
    check([Job("clip", "ring_travel", (3, 2), 4, library="onednn", size=(600, 660, 96))], 2)


def sizes_met(rank: int, theirs: list[int]) -> list[int]:
    """How many sizes of batches are oneDNN's after each: rank 0's shard stays as large as it is."""
    loss_fn = compile_loss(ZEN5, "64MiB", group=dist.group.WORLD, timeout_s=30)
    found = []
    for number, rows in enumerate(theirs):
        mine = rows if rank else 300
        x, y = (t.requires_grad_() for t in planted_pairs(mine, mine, 64, seed=number))
        loss_fn(x, y, logit_scale=14.3).backward()
        assert loss_fn.plan.library == "onednn"
        found.append(sum(map(len, loader._sizes())))
    loss_fn.close()
    return found


def test_peers_sizes_are_sizes_of_a_batch() -> None:
    """What a rank multiplies depends on them, so its libraries keep code for them, too."""
    theirs = [300 + 8 * i for i in range(10)]
    for outcome in launch(sizes_met, 2, [*theirs, *theirs]):
        assert outcome.needed() == [1, 2, 3, 4, 5, 6, 7, 8, *[8] * 12]
