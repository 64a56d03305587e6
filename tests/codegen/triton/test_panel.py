"""What a panel takes and how long: bytes against the emitted file, seconds against the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cl_compiler import compile_loss
from cl_compiler.codegen.backend import max_batch, plan_of
from cl_compiler.codegen.triton.panel import STEP, kernel_plan, panels, sides, smallest_bytes
from cl_compiler.codegen.triton.workload import Workload, gradient_bytes
from cl_compiler.errors import BudgetError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Request, Tile

H100, A100 = load_hardware("h100x1"), load_hardware("a100x1")


def workload(
    loss: str = "clip",
    rows: int = 1 << 16,
    width: int = 512,
    dtype: str = "bfloat16",
    *,
    precision: str = "",
    budget: str = "64GiB",
    hardware=H100,
) -> Workload:
    ir = find(loss)
    needs = frozenset({op.name for op in ir.operands} | set(ir.parameters))
    request = Request(
        ir,
        hardware,
        MemoryBudget.parse(budget),
        Problem(rows, rows, width, dtype),  # type: ignore[arg-type]
        "views" if ir.is_single_set else "paired",
        needs,
        precision or {"bfloat16": "bf16", "float32": "bf16x3"}[dtype],
    )
    program = build_program(plan_sweeps(ir, request.positives, needs), "spill").narrowed
    return Workload(request, program, hardware.arch)


def planned(w: Workload) -> Plan:
    plan = kernel_plan(w)
    assert plan is not None
    return plan


def test_a_split_gradient_takes_what_fp32_would():
    problem = Problem(64, 64, 16, "float32")
    found = {p: gradient_bytes(problem, p) for p in ("ieee", "tf32", "bf16x3", "bf16", "fp16")}
    assert found == {"ieee": 4, "tf32": 4, "bf16x3": 4, "bf16": 2, "fp16": 2}


# ---- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["clip", "nt_xent", "siglip"])
@pytest.mark.parametrize("budget", ["640MiB", "2GiB"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", "auto"), ("float32", "auto"), ("float32", "bf16")]
)
def test_a_plan_with_its_panel_stays_within_the_budget(
    loss: str, budget: str, dtype: str, precision: str
):
    problem = Problem(1 << 16, 1 << 16, 512, dtype)  # type: ignore[arg-type]
    loss_fn = compile_loss("h100x1", budget, loss=loss, problem=problem, precision=precision)
    plan = loss_fn.plan
    assert plan.template == "triton"
    assert sum(bytes_ for _, bytes_ in plan.memory) == plan.peak_bytes <= plan.budget.device_bytes
    assert f"TILE_M, TILE_N = {plan.tile.rows}, {plan.tile.cols}" in loss_fn.source


def test_every_byte_of_clip_is_what_its_file_allocates():
    """A panel in bf16, dY in fp32, dX in bf16 and a block of its rows in fp32, four fp64 vectors,
    partial sums of 128x128 tiles."""
    w = workload(rows=4096)
    tile = Tile(4096, 4096)
    items = dict(w.footprint(tile).items)
    assert items["gradient accumulators"] == items["rows of gradients"] == 4096 * 512 * 4
    assert items["returned gradients"] == 4096 * 512 * 2
    assert items["a panel of gradients"] == 4096 * 4096 * 2
    vectors = items.pop("statistics (vectors)")
    assert vectors % (4096 * 8) == 0 and vectors > 0
    assert w.peak_bytes(tile) == sum(items.values()) + vectors


def test_operands_in_fp16_are_copied_to_meet_a_panel_in_bf16():
    """One at a time, the rows or columns of a panel: cuBLAS multiplies equal types."""
    tile = Tile(2048, 4096)
    of = {dtype: dict(workload(rows=4096, dtype=dtype, precision=precision).footprint(tile).items)
          for dtype, precision in (("bfloat16", "bf16"), ("float16", "fp16"))}  # fmt: skip
    assert "an operand in bf16" not in of["bfloat16"]
    assert of["float16"].pop("an operand in bf16") == 4096 * 512 * 2
    assert of["float16"] == of["bfloat16"]
    rounded = workload(rows=4096, dtype="float32", precision="fp16").footprint(tile).items
    assert dict(rounded)["an operand in bf16"] == 4096 * 512 * 2


def test_a_budget_that_no_panel_fits_goes_to_pytorch_or_says_what_would_do():
    w = workload(rows=1 << 14)
    request = replace(w.request, budget=MemoryBudget(smallest_bytes(w) - 1))
    assert kernel_plan(replace(w, request=request)) is None
    with pytest.raises(BudgetError, match="Give at least memory_budget="):
        plan_of(request, w.program.plan)


def test_the_largest_batch_is_the_last_that_fits():
    w = workload(budget="1GiB")
    most = max_batch(w.request, w.program.plan)
    for rows, fits in ((most, True), (most + most // 100, False)):
        problem = replace(w.request.problem, M=rows, N=rows)
        try:
            plan_of(replace(w.request, problem=problem), w.program.plan)
        except BudgetError:
            assert not fits
        else:
            assert fits


# ---- panels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["clip", "nt_xent"])
def test_panels_are_whole_tiles_of_every_kernel(loss: str):
    w = workload(loss, rows=100_000)
    found = list(panels(w))
    assert all(t.rows % STEP == t.cols % STEP == 0 for t in found)
    assert all(t.rows == t.cols for t in found) == w.is_symmetric
    assert max(t.rows for t in found) == -(-100_000 // STEP) * STEP


@pytest.mark.parametrize(("width", "rows"), [(256, 16896), (512, 8448), (768, 11264)])
def test_whole_waves_of_an_h100_are_among_the_sides(width: int, rows: int):
    """132 multiprocessors, each with blocks of 128 x 256 of the product [rows, D]."""
    assert rows in sides(workload(width=width), 1 << 16)


def test_a_small_problem_is_one_panel():
    assert planned(workload(rows=1000)).tile == Tile(1024, 1024)


@pytest.mark.parametrize("loss", ["clip", "siglip", "nt_xent"])
@pytest.mark.parametrize("budget", ["400MiB", "1GiB"])
def test_nothing_that_fits_is_faster(loss: str, budget: str):
    w = workload(loss, budget=budget)
    plan = planned(w)
    for tile in panels(w):
        if w.peak_bytes(tile) <= w.limit_bytes:
            assert w.timing(tile).seconds >= plan.seconds / 1.01


# ---- seconds ------------------------------------------------------------------------------------


def test_units_are_those_of_the_schedule():
    assert planned(workload("clip")).units == pytest.approx(4.0)
    assert planned(workload("siglip")).units == pytest.approx(3.0)
    plan = planned(workload("nt_xent"))
    assert plan.units == pytest.approx(2 * (1 + plan.tile.cols / (1 << 16)))


@pytest.mark.parametrize("width", [256, 512, 1024, 2048])
@pytest.mark.parametrize("hardware", [H100, A100], ids=lambda h: h.name)
def test_no_plan_beats_the_library(hardware, width: int):
    """Four units at the rate that the library has for products as long as a panel."""
    w = workload(width=width, hardware=hardware)
    plan = planned(w)
    best = hardware.gemm_rate("bfloat16", 1 << 16)
    assert plan.seconds >= plan.units * 2 * (1 << 32) * width / best


def slowed(w: Workload, **rates: float) -> Workload:
    return replace(w, request=replace(w.request, hardware=replace(w.request.hardware, **rates)))


def test_each_rate_bounds_what_it_says():
    w, tile = workload(), Tile(8192, 8448)
    parts = dict(w.timing(tile).parts)
    gemms = tuple((n, r / 4) for n, r in w.request.hardware.gemm_flops_per_s)
    slower = dict(slowed(w, gemm_flops_per_s=gemms).timing(tile).parts)
    assert slower["kernels"] > 3 * parts["kernels"]
    assert slower["products of the library"] > 3 * parts["products of the library"]
    exponentials = slowed(w, exp_per_s=w.request.hardware.exp_per_s / 100)
    slower = dict(exponentials.timing(tile).parts)
    assert slower["kernels"] > 10 * parts["kernels"]
    assert slower["products of the library"] == parts["products of the library"]
    waiting = slowed(w, op_overhead_s=1e-3).timing(tile)
    assert dict(waiting.parts)["launches that the device waits for"] > 0.1


def test_small_panels_pay_for_accumulators_and_waves():
    w = workload()
    small, large = w.timing(Tile(512, 512)), w.timing(Tile(8192, 8448))
    assert small.seconds > 2 * large.seconds
    assert small.traffic_bytes > 2 * large.traffic_bytes


def test_fp32_takes_three_products_for_one():
    exact, narrow = workload(dtype="float32"), workload()
    tile = Tile(8192, 8448)
    ratio = exact.timing(tile).seconds / narrow.timing(tile).seconds
    assert 2 < ratio < 3.5


def test_a_plan_is_explained_level_by_level():
    loss_fn = compile_loss(
        "h100x1", "1GiB", loss="clip", problem=Problem(1 << 16, 1 << 16, 512, "bfloat16")
    )
    text = loss_fn.explain()
    assert "sm      core" in text and "128x128" in text
    assert "products of the library" in text and "slower" in text
