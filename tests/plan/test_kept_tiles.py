"""Tiles that are kept are new tensors each time: what the allocator makes of that."""

from __future__ import annotations

from cl_compiler.hardware import load_hardware
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.plan import choose_plan
from tests.plan.requests import request


def test_kept_tiles_that_glibc_would_map_each_time_are_not_taken() -> None:
    """Pages of a new tensor of 32 MiB are cleared whenever one is made."""
    plan = choose_plan(
        request(
            clip,
            load_hardware("epyc-zen4-2c"),
            rows=65536,
            width=512,
            budget="4GiB",
            schedule="retain",
        )
    )
    assert 8 * 2**20 <= plan.tile.rows * plan.tile.cols * 4 < 32 * 2**20
