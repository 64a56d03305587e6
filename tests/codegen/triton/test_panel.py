"""How large a panel is launched at once."""

from __future__ import annotations

import pytest

from cl_compiler import compile_loss
from cl_compiler.codegen.triton.panel import STEP, gradient_bytes, panel
from cl_compiler.hardware import load_hardware
from cl_compiler.plan.types import Problem, Tile

H100 = load_hardware("h100x1")


@pytest.mark.parametrize(("width", "rows"), [(256, 16896), (512, 8448), (768, 11264)])
def test_products_have_whole_waves_on_an_h100(width: int, rows: int):
    """132 multiprocessors, each with blocks of 128 x 256 of the product [rows, D]."""
    tile = panel(H100, Problem(1 << 16, 1 << 16, width, "bfloat16"), 1 << 40, symmetric=False)
    assert tile == Tile(rows, rows)


def test_a_split_gradient_takes_what_fp32_would():
    problem = Problem(64, 64, 16, "float32")
    found = {p: gradient_bytes(problem, p) for p in ("ieee", "tf32", "bf16x3", "bf16", "fp16")}
    assert found == {"ieee": 4, "tf32": 4, "bf16x3": 4, "bf16": 2, "fp16": 2}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("room", [1 << 18, 7 << 19, 1 << 25, 1 << 29])
def test_the_workspace_fits(room: int, symmetric: bool):
    problem = Problem(1 << 17, 1 << 17, 512, "bfloat16")
    tile = panel(H100, problem, room, symmetric=symmetric)
    assert tile.rows * tile.cols <= room
    assert tile.rows % STEP == tile.cols % STEP == 0
    assert tile.rows == tile.cols or not symmetric


def test_a_small_problem_is_one_panel():
    tile = panel(H100, Problem(1000, 3000, 512, "bfloat16"), 1 << 30, symmetric=False)
    assert tile == Tile(1024, 3072)


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
    assert sum(bytes_ for _, bytes_ in plan.memory) <= plan.peak_bytes <= plan.budget.device_bytes
    assert f"TILE_M, TILE_N = {plan.tile.rows}, {plan.tile.cols}" in loss_fn.source
