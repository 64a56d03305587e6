"""The hardware graph as the planner reads it."""

from __future__ import annotations

import math

import pytest

from cl_compiler.errors import ArgumentError
from cl_compiler.hardware import load_hardware, preset_names
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.plan import choose_plan, max_batch
from cl_compiler.plan.machine import WAYS, gemm_type, machine_of
from cl_compiler.plan.search import plan_candidates
from cl_compiler.plan.types import Tile
from tests.plan.requests import request


@pytest.mark.parametrize("name", preset_names())
def test_all_levels_of_a_preset_are_found_and_its_devices_add_up(name: str) -> None:
    spec = load_hardware(name)
    machine = machine_of(hardware_graph(spec))
    found = [o.name for o in machine.outer] + [machine.device] + [i.name for i in machine.inner]
    assert found == [level.name for level in spec.levels]
    assert machine.ranks == spec.world_size
    assert math.prod(i.share for i in machine.inner) == spec.cores
    assert all(i.total_bytes % i.memory_bytes == 0 for i in machine.inner)


@pytest.mark.parametrize("name", ["xeon-amx-2c", "h100x1", "mi300x1"])
@pytest.mark.parametrize(
    "tile", [Tile(512, 1024), Tile(64, 64), Tile(4096, 4096), Tile(128, 16384)]
)
def test_blocks_nest_fit_their_memory_and_leave_no_instance_idle(name: str, tile: Tile) -> None:
    machine = machine_of(hardware_graph(load_hardware(name)))
    around = tile
    for level, block in zip(machine.inner, machine.sub_tiles(tile, 4), strict=True):
        assert block.rows <= around.rows and block.cols <= around.cols
        slices = 64 * (block.rows + block.cols)
        assert 4 * (block.rows * block.cols + slices) <= level.memory_bytes
        blocks = math.ceil(around.rows / block.rows) * math.ceil(around.cols / block.cols)
        assert blocks >= level.share or block == Tile(16, 16)
        around = block


def test_data_lives_in_the_innermost_memory_that_holds_it() -> None:
    machine = machine_of(hardware_graph(load_hardware("xeon-amx-2c")))
    l3, l2, core = machine.inner
    assert machine.seconds_per_byte(1) == 1 / core.bytes_per_s
    assert machine.seconds_per_byte(l2.total_bytes) == 1 / l2.bytes_per_s
    assert machine.seconds_per_byte(l2.total_bytes + 1) == 1 / l3.bytes_per_s
    assert machine.seconds_per_byte(l3.total_bytes + 1) == 1 / machine.device_bytes_per_s
    # Two cores share the level around them and own the one inside.
    assert l2.bytes_per_s == 2 * 125e9 and l2.total_bytes == 4 << 20


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        ("float32", "ieee", ("float32", 1)),
        ("float32", "bf16", ("bfloat16", 1)),
        ("float32", "bf16x3", ("bfloat16", 3)),
        ("float32", "tf32", ("tf32", 1)),
        ("bfloat16", "ieee", ("float32", 1)),
        ("bfloat16", "bf16", ("bfloat16", 1)),
        ("float16", "auto", ("float16", 1)),
        ("float64", "bf16", ("float64", 1)),
        ("float32", "auto", ("bfloat16", 3)),
    ],
)
def test_precision_selects_the_rate_of_a_gpu(
    dtype: str, precision: str, expected: tuple[str, int]
) -> None:
    assert gemm_type(dtype, precision, load_hardware("h100x1")) == expected


def test_on_a_cpu_automatic_precision_of_float32_is_ieee() -> None:
    assert gemm_type("float32", "auto", load_hardware("xeon-amx-2c")) == ("float32", 1)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("schedule", ["auto", "recompute"])
def test_an_unknown_precision_is_refused_by_the_planner_itself(dtype, schedule):
    for planned in (choose_plan, plan_candidates, max_batch):
        with pytest.raises(ArgumentError, match="precision 'fp7': products are planned as auto"):
            planned(request(rows=256, dtype=dtype, precision="fp7", schedule=schedule))


@pytest.mark.parametrize("precision", WAYS)
def test_every_known_precision_has_a_rate(precision):
    name, products = gemm_type("float32", precision, load_hardware("h100x1"))
    assert products >= 1 and load_hardware("h100x1").gemm_rate(name) > 0
