"""Tiles by the registers that they need, as far as that can be told without a compiler."""

from __future__ import annotations

import pytest

from cl_compiler.codegen.triton.core import CoreTile, core_tiles, products_alive, registers
from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import (
    Accumulate,
    Compute,
    Diagonal,
    Gemm,
    GradientTile,
    Instruction,
    Mode,
    ScalarRef,
    TileProgram,
    TileRef,
    VectorRef,
)
from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.codegen.triton.emit import plan_of

CASES = {case.name: case for case in zoo.cases()}


def product(value: int) -> Gemm:
    return Gemm(value, f"sim_{value}", 1, 0)  # type: ignore[arg-type]


def total(value: int) -> Accumulate:
    return Accumulate("sum", (f"sum_{value}",), (value,), 1)


def mask_of(value: int, tile: int) -> Compute:
    return Compute(value, "gt", (TileRef(tile), VectorRef("v", 0)), is_mask=True)


def filled(value: int, tile: int, mask: int) -> Compute:
    return Compute(value, "fill_where", (TileRef(tile), TileRef(mask), ScalarRef(0)))  # type: ignore[arg-type]


SEPARATE = [product(0), total(0), product(1), total(1)]
MASKED = [product(0), mask_of(1, 0), product(2), filled(3, 2, 1), total(3)]
TWICE = [product(0), mask_of(1, 0), product(2), filled(3, 2, 1), total(3),
         product(4), mask_of(5, 4), product(6), filled(7, 6, 5), total(7)]  # fmt: skip
PATCHED = [product(0), Diagonal(1, 0, "self", "fill", 1), product(2), total(1), total(2)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("instructions", "gradients", "alive"),
    [
        (SEPARATE, [], 1),
        (MASKED, [], 2),
        (TWICE, [], 2),
        (PATCHED, [], 2),
        (TWICE, [3], 4),  # what the first two became leaves at the end
        (TWICE, [7], 2),
        ([product(0), product(1), total(0), total(1)], [], 2),
        ([total(9)], [], 0),
    ],
)
def test_products_count_while_something_made_of_them_is_read(
    instructions: list[Instruction], gradients: list[int], alive: int
):
    leave = tuple(GradientTile(f"sim_{g}", g, 1) for g in gradients)  # type: ignore[arg-type]
    assert products_alive(TileProgram("plain", tuple(instructions), {}, {}, leave)) == alive


def tiles(name: str, dtype: str, precision: str, arch: str) -> list[tuple[Pass, Mode, CoreTile]]:
    """Those of kernels that make statistics, which have launchers of their own."""
    plan, program = plan_of(CASES[name], dtype, 512, Tile(8192, 8192), precision=precision)
    return [
        (p, m, core_tiles(plan.problem, precision, p, (m,), arch)[m])
        for p in program.passes
        for m in program.modes
        if not p.gradients
    ]


def test_matrices_that_follow_each_other_share_registers():
    """Two pairs, each gone before the next: compiled for 32 columns they take 200 registers."""
    (pair,) = [
        (p.programs[mode], tile)
        for p, mode, tile in tiles("gist_relative", "bfloat16", "ieee", "sm_80")
        if mode == "bounded" and p.programs[mode].gemms == 4
    ]
    assert (pair[1].rows, pair[1].cols) == (128, 32)
    assert registers(*pair, "sm_80") > 216  # if all four were alive


@pytest.mark.parametrize(
    ("precision", "arch", "most"),
    [("tf32", "sm_80", 255), ("tf32", "sm_90", 0), ("ieee", "sm_80", 0)],
)
def test_safe_kernels_in_tf32_on_ampere_have_all_registers(precision: str, arch: str, most: int):
    dtype = "float32" if precision == "tf32" else "bfloat16"
    found = {mode: tile.most for _, mode, tile in tiles("clip", dtype, precision, arch)}
    assert found == {"bounded": 0, "running": most}
