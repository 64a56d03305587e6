"""Every loss of the zoo, on threads that pass shards on, against the float64 reference."""

from __future__ import annotations

import pytest

from tests import losses_zoo as zoo
from tests.ring.shards import emit_ring, run_group, schedules_of, split
from tests.tiles import errors
from tests.zoo_case import sample

CASES = zoo.cases()
SHARES = {"two": (1, 1), "uneven": (3, 1, 2), "empty": (2, 0, 3, 1)}


def check(case, schedule: str, shares, *, seed: int, m: int = 11, n: int = 15) -> None:
    drawn = sample(case, m, n, seed=seed)
    rows, cols = drawn.is_positive.shape
    cut = split(case, rows, cols, shares)
    node = 2 if len(shares) % 2 == 0 else len(shares)
    found = run_group(emit_ring(case, schedule, node=node), drawn, cut)
    assert len(set(found.values)) == 1, "the value must be the same on every rank"
    worst = errors(found.result, drawn)
    assert max(worst.values()) < 1e-11, worst


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_loss_of_the_zoo_on_a_ring(case):
    """Schedules and ways to cut take turns; ``test_every_combination`` has all of them."""
    turn = CASES.index(case)
    usable = schedules_of(case)
    schedule = usable[turn % len(usable)]
    shares = list(SHARES.values())[(turn // 3) % 3]
    check(case, schedule, shares, seed=turn)


@pytest.mark.full
@pytest.mark.parametrize(
    "shares", [(1,), *SHARES.values(), (1, 2, 1, 1, 3), (1, 0, 2, 1, 3, 1), (0, 1)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_combination(case, shares):
    for schedule in schedules_of(case):
        check(case, schedule, shares, seed=1)
