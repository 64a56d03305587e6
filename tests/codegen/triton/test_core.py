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


def two_pairs_of_matrices(mode: Mode, arch: str) -> tuple[TileProgram, CoreTile]:
    """The kernel of four products, each pair of them gone before the next."""
    (found,) = [
        (p.programs[m], tile)
        for p, m, tile in tiles("gist_relative", "bfloat16", "ieee", arch)
        if m == mode and p.programs[m].gemms == 4
    ]
    return found


def test_matrices_that_follow_each_other_share_registers():
    """Compiled for 32 columns the kernel takes 155."""
    code, tile = two_pairs_of_matrices("running", "sm_90")
    assert (tile.rows, tile.cols) == (128, 32)
    assert registers(code, tile, "sm_90") > 216  # if all four were alive


def test_addresses_of_further_matrices_take_registers_where_there_are_no_descriptors():
    """For 32 columns Triton 3.7.1 takes all, and spills 8 bytes."""
    _, tile = two_pairs_of_matrices("bounded", "sm_80")
    assert (tile.rows, tile.cols, tile.most) == (128, 16, 255)


@pytest.mark.parametrize("arch", ["sm_120", "sm_121a"])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16x3"])
def test_consumer_blackwell_gets_the_tiles_of_ada(precision: str, arch: str):
    dtype = "bfloat16" if precision == "ieee" else "float32"
    assert tiles("clip", dtype, precision, arch) == tiles("clip", dtype, precision, "sm_89")


@pytest.mark.parametrize(
    ("precision", "arch", "most"),
    [
        ("tf32", "sm_80", 255),
        ("tf32", "sm_90", 0),
        ("ieee", "sm_80", 0),
        ("exact", "sm_90", 0),
        ("exact", "sm_100", 255),
    ],
)
def test_some_safe_kernels_have_all_registers(precision: str, arch: str, most: int):
    """exact: fp32 operands, multiplied as they are."""
    dtype = "bfloat16" if precision == "ieee" else "float32"
    precision = precision.replace("exact", "ieee")
    found = {mode: tile.most for _, mode, tile in tiles("clip", dtype, precision, arch)}
    assert found == {"bounded": 0, "running": most}
