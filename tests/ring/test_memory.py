"""Live bytes of a rank at sizes that matter, within what was promised of each schedule.

Beside a rank's inputs: gradients, chunks on their way, statistics and tiles, in bytes per element
of a shard (rows x D, fp32).  Of these 8 are the gradients' own; Inf-CL takes 60.  A chunk is an
eighth of a shard, or the whole one as in a plain ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.lang.program import Program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.other_losses import inf_cl_bytes
from cl_compiler.plan.share import Share, plan_of_tiles
from cl_compiler.plan.types import ClusterPlan, MemoryBudget, Plan
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from tests.ring.test_plan import Mirror, arguments, request

RANKS = 3
"""Of more, a rank holds no more: two chunks of others."""


class Idle(TorchDispatchMode):
    """Leaves out arithmetic that writes into tiles and gradients: it allocates nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, keywords = func._schema.name, kwargs or {}
        into = keywords.get("out", args[0] if name.endswith("_") and args else None)
        if isinstance(into, torch.Tensor) and into.dim() == 2 and into.numel() >= 1 << 16:
            return into
        return func(*args, **keywords)


def with_few_tiles(module: ModuleType) -> None:
    """Every sweep makes tiles of the first rows alone: they take the same buffers, one by one."""
    first = max(module.TILE_M, module.TILE_N)

    def cut(value: Any) -> Any:
        if isinstance(value, Sequence):
            return [cut(item) for item in value]
        return value[:first] if isinstance(value, torch.Tensor) and value.dim() else value

    def shortened(sweep: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: sweep(*map(cut, args))

    sweeps = [name for name in vars(module) if "_sweep_" in name]
    assert len(sweeps) > 1
    for name in sweeps:
        setattr(module, name, shortened(getattr(module, name)))


def planned(
    schedule: str, rows: int, width: int, per_element: float, whole: bool
) -> tuple[Plan, Program]:
    """The plan of a rank that has so many bytes; ``whole``: a shard travels in one chunk."""
    asked = request(schedule, RANKS, rows, width)
    asked = replace(asked, budget=MemoryBudget(int(per_element * rows * width)))
    sweeps = plan_sweeps(asked.loss, asked.positives, asked.needs)
    if not whole:
        return choose_cluster_plan(asked, sweeps)
    roomy = replace(asked, budget=MemoryBudget(1 << 40))
    _, program = choose_cluster_plan(roomy, sweeps)
    plan = plan_of_tiles(Share(asked, sweeps, program, schedule, rows, 0))
    cluster = ClusterPlan(schedule, RANKS, rows, 0, 0, 0.0, 0.0)
    return replace(plan, cluster=cluster), program


def measured(plan: Plan, program: Program, *, whole: bool = False) -> int:
    """Live bytes of one rank at its peak; ``whole``: nothing is left out."""
    of, rows = plan.cluster, (plan.problem.M,) * RANKS
    assert of is not None
    text = render_ring(plan, program, "memory", cluster_schedule=of.schedule, chunk=of.chunk)
    module = load_source(text, "memory")
    if not whole:
        with_few_tiles(module)
    ring, inputs = Mirror(RANKS, {"rows": rows, "cols": rows}), arguments(plan.problem)
    with nullcontext() if whole else Idle(), LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    return live.peak_bytes


LIMITS = [  # schedule, in one chunk, bytes per element from 16,384 rows of 512 on
    ("ring_owner", False, 9.8),
    ("ring_owner", True, 16.5),
    ("ring_travel", True, 28.5),
]


@pytest.mark.parametrize(("schedule", "whole", "limit"), LIMITS)
def test_a_rank_holds_no_more_than_was_promised(schedule, whole, limit):
    """Measured where it is hardest to keep: tiles and statistics weigh least in larger shards."""
    plan, program = planned(schedule, 16384, 512, limit, whole)
    found = measured(plan, program)
    assert abs(found - plan.peak_bytes) <= 0.01 * plan.peak_bytes, (found, plan.memory)
    assert found <= limit * 16384 * 512


@pytest.mark.parametrize("width", [512, 768, 1024])
@pytest.mark.parametrize(("schedule", "whole", "limit"), LIMITS)
def test_larger_shards_are_planned_within_it(schedule, whole, limit, width):
    """And owner-computes in chunks within 9.3 from 65,536 rows on, a sixth of Inf-CL's 60."""
    for rows in (16384, 32768, 65536, 1 << 18):
        most = 9.3 if rows >= 65536 and not whole else limit
        plan, _ = planned(schedule, rows, width, most, whole)
        assert plan.peak_bytes <= most * rows * width
        if not whole:
            assert plan.cluster.chunk == rows // 8
            others = inf_cl_bytes(RANKS * rows, width, RANKS)
            assert plan.peak_bytes <= others / 6, rows


@pytest.mark.full
def test_the_largest_measured_is_as_planned():
    """65,536 rows: at most 9.3 bytes per element."""
    plan, program = planned("ring_owner", 65536, 512, 9.3, False)
    found = measured(plan, program)
    assert abs(found - plan.peak_bytes) <= 0.01 * plan.peak_bytes
    assert found <= 9.3 * 65536 * 512


@pytest.mark.parametrize(("schedule", "whole", "limit"), LIMITS)
def test_what_was_left_out_allocates_nothing(schedule, whole, limit):
    """Beside the whole, at a size at which that takes no time; and as planned, within 5 %."""
    plan, program = planned(schedule, 1024, 128, 40.0, whole)
    found = measured(plan, program, whole=True)
    assert abs(found - measured(plan, program)) <= 4096
    assert abs(found - plan.peak_bytes) <= 0.05 * plan.peak_bytes
