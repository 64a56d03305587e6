"""Predicted seconds: work in units, measured rates, and what each rate changes."""

from __future__ import annotations

import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ir import LossIR
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.losses.self_supervised import nt_xent
from cl_compiler.losses.sigmoid import siglip
from cl_compiler.plan import Plan, Request, choose_plan
from cl_compiler.plan.cost import PARTS, waiting_per_byte
from cl_compiler.plan.space import Point, space_of
from cl_compiler.plan.types import Tile
from tests.plan.requests import EPYC, XEON, request, with_gemm


def plan_of(r: Request) -> Plan:
    return choose_plan(r)


@pytest.mark.parametrize(
    ("loss", "schedule", "units"),
    [
        (clip, "spill", 4.0),
        (clip, "recompute", 5.0),
        (infonce, "panel", 3.0),
        (siglip, "spill", 3.0),
        (siglip, "recompute", 4.0),
    ],
)
def test_a_schedule_does_the_work_that_the_table_says(
    loss: LossIR, schedule: str, units: float
) -> None:
    assert plan_of(request(loss, schedule=schedule)).units == pytest.approx(units)


def test_a_symmetric_matrix_takes_half_and_its_diagonal_tiles() -> None:
    plan = plan_of(request(nt_xent, schedule="spill"))
    assert plan.units == pytest.approx(2 * (1 + plan.tile.cols / 16384))


def test_keeping_every_tile_saves_one_unit_and_keeping_half_saves_half() -> None:
    r = request(clip, rows=8192, budget="4GiB")
    space = space_of(r, None, None)
    option = space.option("retain")
    units = [
        option.cost.flops(space.values(option, Tile(512, 1024), kept)) / (2 * 8192**2 * 512)
        for kept in (0, 64, 128)
    ]
    assert units == pytest.approx([4.0, 3.5, 3.0])


def test_a_gradient_that_nobody_needs_is_not_computed() -> None:
    assert plan_of(request(clip, needs=frozenset({"x"}), schedule="spill")).units == 3.0
    assert plan_of(request(clip, needs=frozenset(), schedule="spill")).units == 1.0


# Nanoseconds per pair, forward and backward, two threads of the machine that the preset describes.
MEASURED = [
    ("float32", "ieee", 12.3, 14.3),
    ("float32", "bf16", 5.3, 5.3),
]


@pytest.mark.parametrize(("dtype", "precision", "low", "high"), MEASURED)
def test_the_time_of_tiles_is_what_was_measured(
    dtype: str, precision: str, low: float, high: float
) -> None:
    r = request(clip, dtype=dtype, precision=precision, schedule="spill")
    found = plan_of(r).seconds / 16384**2 * 1e9
    assert 0.9 * low <= found <= 1.1 * high


# The emitted file, fp32, M = N = 4096, D = 512, one thread, CPU time of the best of three runs,
# PyTorch 2.13; ns per pair, forward and backward.
MEASURED_EPYC = [
    ("spill", Tile(128, 128), 73.0),
    ("spill", Tile(256, 256), 67.2),
    ("spill", Tile(512, 512), 63.9),
    ("spill", Tile(512, 1024), 59.1),
    ("spill", Tile(128, 4096), 65.5),
    ("spill", Tile(2048, 2048), 57.1),
    ("retain", Tile(512, 1024), 45.7),
    ("dense", Tile(4096, 4096), 48.6),
    ("recompute", Tile(512, 1024), 79.1),
]


def test_another_machine_takes_as_long_as_its_nominal_rates_say() -> None:
    space = space_of(request(clip, EPYC, rows=4096, budget="2GiB"), None, None)
    found = [
        space.point(s, tile, 32 if s == "retain" else int(s == "dense")).seconds / 4096**2 * 1e9  # type: ignore[arg-type]
        for s, tile, _ in MEASURED_EPYC
    ]
    measured = [ns for *_, ns in MEASURED_EPYC]
    for predicted, truth in zip(found, measured, strict=True):
        assert predicted == pytest.approx(truth, rel=0.15)
    # Whatever differs by more than a tenth is put in the right order.
    for a, x in zip(found, measured, strict=True):
        for b, y in zip(found, measured, strict=True):
            assert a > b or x <= 1.1 * y


def test_the_parts_add_up_and_each_follows_its_own_rate() -> None:
    from dataclasses import replace

    spec = load_hardware(XEON)

    def parts(hardware: object) -> dict[str, float]:
        space = space_of(request(clip, hardware), None, None)  # type: ignore[arg-type]
        found: Point = space.point("spill", Tile(512, 512), 0)
        assert found.seconds == pytest.approx(sum(found.parts))
        return dict(zip(PARTS, found.parts, strict=True))

    before = parts(spec)
    changes = {
        "matrix products": with_gemm(spec, 0.25),
        "exponentials": replace(spec, exp_per_s=spec.exp_per_s / 4),
        "operator launches": replace(spec, op_overhead_s=spec.op_overhead_s * 4),
    }
    for what, hardware in changes.items():
        after = parts(hardware)
        assert after[what] == pytest.approx(4 * before[what]), what
        assert {k: v for k, v in after.items() if k != what} == pytest.approx(
            {k: v for k, v in before.items() if k != what}
        )
    slower = parts(replace(spec, pass_per_s=spec.pass_per_s / 4))
    assert slower["elementwise passes"] == pytest.approx(4 * before["elementwise passes"])
    assert slower["operand copies and casts"] > before["operand copies and casts"]


def test_a_tile_that_leaves_the_cache_pays_for_it_and_one_that_fits_does_not() -> None:
    space = space_of(request(clip, budget="4GiB"), None, None)

    def beyond(tile: Tile) -> float:
        return space.point("spill", tile, 0).parts[PARTS.index("tiles beyond cache")]

    # Two buffers of 512x1024 floats fill the L2 caches of both cores exactly.
    assert beyond(Tile(512, 1024)) == 0
    assert 0 < beyond(Tile(1024, 1024)) < beyond(Tile(8192, 8192))


def test_products_wait_for_operands_that_the_caches_do_not_hold() -> None:
    """Of 4,096 rows and their gradients 16 MiB: the caches hold them. Of 65,536: 256 MiB."""

    def products(rows: int, tile: Tile, **more: object) -> float:
        space = space_of(request(clip, rows=rows, schedule="spill", **more), None, None)
        return space.point("spill", tile, 0).parts[PARTS.index("matrix products")]

    small, large = Tile(512, 1024), Tile(1024, 2048)
    assert products(4096, small, hardware=EPYC) == products(4096, large, hardware=EPYC)
    assert products(65536, small, hardware=EPYC) > 1.01 * products(65536, large, hardware=EPYC)
    on_gpu = space_of(request(clip, "h100x1", schedule="spill"), None, None).option("spill").cost
    assert not any(part.has(waiting_per_byte) for part in on_gpu.cost.parts)


def test_larger_problems_get_larger_tiles_where_the_budget_has_room() -> None:
    few, many = (
        choose_plan(request(clip, EPYC, rows, schedule="spill", budget="1GiB")).tile
        for rows in (4096, 65536)
    )
    assert many.rows * many.cols > few.rows * few.cols


def test_thin_tiles_copy_more_operand_per_pair() -> None:
    space = space_of(request(clip), None, None)

    def copies(tile: Tile) -> float:
        return space.point("spill", tile, 0).parts[PARTS.index("operand copies and casts")]

    assert copies(Tile(64, 8192)) > copies(Tile(128, 4096)) > copies(Tile(256, 2048)) > 0


def test_a_machine_without_the_rate_says_which_it_has() -> None:
    with pytest.raises(HardwareError, match="fp8"):
        choose_plan(request(clip, precision="fp8"))
