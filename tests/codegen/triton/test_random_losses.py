"""Losses drawn from the grammar as Triton kernels in the interpreter: on a device, on a group.

As exact as dense fp32 PyTorch is on the same inputs (see ``tests.dense_fp32``).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from cl_compiler.lang.program import Schedule
from tests.codegen.triton.emit import program_of
from tests.random_losses import draw
from tests.ring.shards import schedules_of

Ask = Callable[..., dict[str, Any]]

ONCE_WRONG = {
    7: "a scalar that only elements of the diagonal read",
    48: "a gradient that reads no operand: nothing to multiply it with was passed",
    66: "an output on lines of its own",
    74: "a grid of positions alone",
    79: "logsubexp of elements of the diagonal",
    126: "an fp64 vector beside an fp32 tile of slots",
    29: "gradients of slots, to which blocks with an owner are added",
    166: "maxima near zero in a matrix that is its own transpose",
}
ALONE: tuple[Schedule, ...] = ("spill", "recompute", "panel")
SHARES = ([1, 2, 1], [2, 0, 3, 1])


def assert_right(interpret: Ask, seed: int) -> None:
    case, rng = draw(seed), Random(seed)
    arch, dtype = rng.choice(["sm_90", "gfx942"]), "float32"
    asked = {"case": f"random {seed}", "seed": seed, "dtype": dtype, "arch": arch, "limits": True}
    answers = [interpret(**asked, schedule=s) for s in ALONE if program_of(case, s) is not None]
    schedules = schedules_of(case)
    if schedules:
        shares = rng.choice(SHARES)
        node = 2 if len(shares) % 2 == 0 else len(shares)
        answers.append(interpret(**asked, ring=rng.choice(schedules), shares=shares, node=node))
    for found in answers:
        over = {n: e for n, e in found["errors"].items() if not e <= found["limits"][n]}
        assert not over, (seed, over, found["limits"])


@pytest.mark.parametrize("seed", ONCE_WRONG)
def test_those_that_were_wrong_once(interpret: Ask, seed: int) -> None:
    assert_right(interpret, seed)


@pytest.mark.full
@pytest.mark.parametrize("first", range(0, 200, 20))
def test_random_losses(interpret: Ask, first: int) -> None:
    for seed in range(first, first + 20):
        assert_right(interpret, seed)
