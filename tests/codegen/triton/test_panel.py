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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("free", [1 << 20, 7 << 20, 1 << 26, 1 << 30])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_workspace_fits(free: int, dtype: str, symmetric: bool):
    problem = Problem(1 << 17, 1 << 17, 512, dtype)  # type: ignore[arg-type]
    tile = panel(H100, problem, free, symmetric=symmetric)
    assert tile.rows * tile.cols * gradient_bytes(problem) <= free
    assert tile.rows % STEP == tile.cols % STEP == 0
    assert tile.rows == tile.cols or not symmetric


def test_a_small_problem_is_one_panel():
    tile = panel(H100, Problem(1000, 3000, 512, "bfloat16"), 1 << 30, symmetric=False)
    assert tile == Tile(1024, 3072)


@pytest.mark.parametrize("loss", ["clip", "nt_xent", "siglip"])
@pytest.mark.parametrize("budget", ["400MiB", "2GiB"])
def test_a_plan_with_its_panel_stays_within_the_budget(loss: str, budget: str):
    loss_fn = compile_loss(
        "h100x1", budget, loss=loss, problem=Problem(1 << 16, 1 << 16, 512, "bfloat16")
    )
    plan = loss_fn.plan
    assert plan.template == "triton"
    assert sum(bytes_ for _, bytes_ in plan.memory) <= plan.peak_bytes <= plan.budget.device_bytes
    assert f"TILE_M, TILE_N = {plan.tile.rows}, {plan.tile.cols}" in loss_fn.source
