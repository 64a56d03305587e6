"""Losses drawn from the grammar, on groups of ranks: uneven and empty shards, against float64."""

from __future__ import annotations

from random import Random

import pytest

from cl_compiler.errors import ScheduleError
from cl_compiler.lang.ir import View
from cl_compiler.lang.ring import CANONICAL, HOST, ring_obstacle
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import Tile
from tests.random_losses import draw
from tests.ring.shards import emit_ring, run_group, schedules_of, split
from tests.tiles import errors
from tests.zoo_case import Case, sample

SHARES = ((3, 2), (2, 0, 1), (1, 2, 3, 1), (0, 1), (1,))
FACTORS = (1, 1, 600, 5000)
"""Of logit_scale: a shared exponential, running maxima.  Exponentials have the relative error of
a logit's rounding, which grows like it."""


def assert_right(case: Case, schedule: str, seed: int, strip: int = 0) -> None:
    """Value and gradients, some of them, of logits of any size; ``strip``: in such strips."""
    rng = Random(seed)
    shares, factor = rng.choice(SHARES), rng.choice(FACTORS)
    tile, width = Tile(rng.choice((3, 4, 7)), rng.choice((2, 4, 9))), rng.choice((1, 6, 7))
    width = max(width, *(view.prefix or 1 for view in _views(case)))
    names = sorted(case.needs)
    needs = frozenset(rng.sample(names, rng.randint(1, len(names)))) if seed % 2 else case.needs
    whole = sample(case, 11, 15, width, seed=seed)
    if "logit_scale" in whole.parameters:
        whole.parameters["logit_scale"].data *= factor
    cut = split(case, *whole.is_positive.shape, shares)
    text = emit_ring(
        case, schedule, strip=strip, library="onednn" if strip else "blas", tile=tile, width=width,
        needs=needs, chunk=rng.choice((1, 4, 50)), node=2 if len(shares) == 4 else 1,
    )  # fmt: skip
    found = errors(run_group(text, whole, cut).result, whole)
    found = {what: error for what, error in found.items() if what in {"value", *needs}}
    drawn = (schedule, shares, strip, factor, tile, width, needs)
    assert max(found.values()) < 1e-10 * factor, (drawn, found)


def _views(case: Case) -> list[View]:
    leaves = case.loss.leaves.values()
    return [view for leaf in leaves for view in (leaf.left, leaf.right) if view is not None]


def assert_all_right(first: int, last: int) -> None:
    """Of every loss that a group has, two schedules, one of them in strips where tiles can be."""
    for seed in range(first, last):
        case, rng = draw(seed), Random(seed)
        if ring_obstacle(plan_sweeps(case.loss, case.positives, case.needs)):
            with pytest.raises(ScheduleError, match="group of ranks"):
                emit_ring(case, "ring_travel")
            continue
        schedules = schedules_of(case)
        assert_right(case, rng.choice(schedules), seed)
        in_strips = [s for s in schedules if s not in (HOST, CANONICAL)]
        if in_strips:
            assert_right(case, rng.choice(in_strips), seed, rng.choice((1, 2, 64)))


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_losses(first: int) -> None:
    assert_all_right(first, first + 10)


@pytest.mark.full
@pytest.mark.parametrize("first", range(40, 400, 20))
def test_more_random_losses(first: int) -> None:
    assert_all_right(first, first + 20)
