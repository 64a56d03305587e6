"""Predicted bytes: against formulas by hand, and against what the emitted file allocates."""

from __future__ import annotations

import gc

import pytest
import torch

from cl_compiler.codegen.render import render
from cl_compiler.lang.ir import LossIR
from cl_compiler.losses.corrected_negatives import hard_weighted
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.losses.self_supervised import nt_xent
from cl_compiler.losses.sigmoid import siglip
from cl_compiler.plan import Plan, Request, choose_plan
from cl_compiler.plan.space import Point, Space, space_of
from cl_compiler.plan.types import Tile
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from tests.plan.requests import request

MIB = 1 << 20


def point(r: Request, schedule: str, tile: Tile, kept: int = 0) -> tuple[Point, dict[str, int]]:
    """(a point, what is allocated at its peak)."""
    space: Space = space_of(r, None, None)
    found = space.point(schedule, tile, kept)  # type: ignore[arg-type]
    option = space.option(schedule)  # type: ignore[arg-type]
    _, memory = option.memory.breakdown(space.values(option, tile, kept))
    return found, dict(memory)


def test_the_items_of_a_spilling_plan_are_those_of_the_table() -> None:
    n, d = 16384, 512
    found, items = point(request(clip, rows=n, width=d), "spill", Tile(512, 1024))
    assert items["gradient accumulators"] == 2 * n * d * 4
    assert items["tile buffers"] == 2 * 512 * 1024 * 4
    # "2·N·D·4 bytes of gradients plus 4 MB of tiles", and a few vectors of N floats.
    assert 0 < found.peak_bytes - (2 * n * d * 4 + 4 * MIB) < 16 * n * 4
    assert sum(items.values()) == found.peak_bytes


def test_a_locked_tower_saves_its_accumulator() -> None:
    both, _ = point(request(clip), "spill", Tile(512, 512))
    one, _ = point(request(clip, needs=frozenset({"x"})), "spill", Tile(512, 512))
    assert both.peak_bytes - one.peak_bytes == pytest.approx(16384 * 512 * 4, rel=0.01)


def test_sixteen_bit_inputs_add_widened_tiles_and_a_narrowed_result() -> None:
    n, d, tile = 32768, 512, Tile(512, 1024)
    _, items = point(request(clip, rows=n, dtype="bfloat16"), "spill", tile)
    assert items["gradient accumulators"] == 2 * n * d * 4
    assert items["returned gradients"] == n * d * 2  # one operand while both accumulators live
    _, items = point(request(clip, rows=1024, dtype="bfloat16"), "spill", tile)
    assert items["operand tiles in fp32"] == (512 + 1024) * d * 4


def test_kept_tiles_are_counted_one_by_one_and_the_last_one_frees_the_spare() -> None:
    r, tile = request(clip, rows=4096, budget="1GiB"), Tile(512, 1024)
    sizes = [point(r, "retain", tile, kept)[0].peak_bytes for kept in (1, 2, 31, 32)]
    assert sizes[1] - sizes[0] == 2 * MIB
    assert sizes[3] == sizes[2]  # 31 kept and a spare, or all 32


def test_a_panel_is_as_wide_as_the_matrix() -> None:
    _, items = point(request(infonce, rows=8192), "panel", Tile(256, 8192))
    assert items["tile buffers"] % (256 * 8192 * 4) == 0


def test_contiguous_copies_of_the_callers_inputs_count() -> None:
    without, _ = point(request(clip), "spill", Tile(512, 512))
    copied, items = point(request(clip, contiguous_copies=5 * MIB), "spill", Tile(512, 512))
    assert copied.peak_bytes - without.peak_bytes == 5 * MIB
    assert items["contiguous copies of inputs"] == 5 * MIB


# ---- against the emitted file -------------------------------------------------------------------


def live_peak(plan: Plan, loss: LossIR, scale: float) -> int:
    """Bytes that forward and backward of the emitted file allocate at their peak."""
    space = space_of(request(loss, dtype=plan.problem.dtype), None, None)
    program = space.option(plan.schedule).facts.program
    module = load_source(render(plan, program, "memory-test"), "memory-test")
    p = plan.problem
    draw = torch.Generator().manual_seed(0)
    dtype = getattr(torch, p.dtype)
    operands = [
        torch.nn.functional.normalize(torch.randn(p.M, p.D, generator=draw), dim=1)
        .to(dtype)
        .requires_grad_()
        for _ in loss.operands
    ]
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (scale, -scale)]
    gc.collect()
    with LiveBytes() as live:
        value, *_ = module.Loss.apply(*operands, *values[: len(loss.parameters)])
        value.backward()
    return live.peak_bytes


CASES = [
    (loss, schedule, dtype)
    for loss, schedules in (
        (clip, ("recompute", "spill", "retain", "dense")),
        (infonce, ("spill", "panel", "retain", "dense")),
        (siglip, ("recompute", "spill", "panel", "dense")),
        (nt_xent, ("recompute", "spill", "panel", "retain", "dense")),
        (hard_weighted, ("spill", "panel", "dense")),  # some of its vectors are in fp64
    )
    for schedule in schedules
    for dtype in ("float32", "bfloat16", "float64")
    if dtype == "float32" or schedule in ("spill", "panel")
]


@pytest.mark.parametrize(("loss", "schedule", "dtype"), CASES, ids=lambda v: getattr(v, "name", v))
def test_the_peak_is_that_of_the_emitted_file(loss: LossIR, schedule: str, dtype: str) -> None:
    r = request(loss, rows=1536, width=192, dtype=dtype, budget="64MiB", schedule=schedule)
    plan = choose_plan(r)
    # Logits this large need running maxima, whose buffers the prediction allows for.
    largest = max(live_peak(plan, loss, scale) for scale in (10.0, 2000.0))
    assert abs(plan.peak_bytes - largest) <= max(0.05 * largest, MIB)


def test_a_tight_budget_holds_for_the_emitted_file() -> None:
    for budget in ("5MiB", "8MiB", "16MiB"):
        r = request(clip, rows=1536, width=192, budget=budget)
        plan = choose_plan(r)
        assert plan.peak_bytes <= r.budget.device_bytes
        assert live_peak(plan, clip, 10.0) <= 1.05 * r.budget.device_bytes
