"""What does not fit is refused with what would."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.plan import MemoryBudget, Request, choose_plan, max_batch
from cl_compiler.plan.limits import scaled
from tests.losses_zoo import hard_negatives
from tests.plan.requests import request


def at_rows(r: Request, rows: int) -> Request:
    return replace(r, problem=scaled(r.problem, rows))


def fits(r: Request) -> bool:
    try:
        choose_plan(r)
    except BudgetError:
        return False
    return True


IMPOSSIBLE = [
    request(clip, budget="60MiB"),
    request(clip, budget="300MiB", schedule="dense"),
    request(clip, budget="60MiB", schedule="retain"),
    request(infonce, budget="20MiB", dtype="bfloat16"),
    request(clip, rows=8192, cols=16384, budget="40MiB"),
    request(clip, "h100x1", rows=1 << 20, width=768, dtype="bfloat16", budget="2GiB"),
]


@pytest.mark.parametrize("r", IMPOSSIBLE, ids=lambda r: f"{r.loss.name}-{r.schedule}")
def test_the_error_names_the_smallest_budget_and_the_largest_batch(r: Request) -> None:
    with pytest.raises(BudgetError) as caught:
        choose_plan(r)
    text = str(caught.value)
    assert r.loss.name in text and f"D={r.problem.D}" in text
    least = re.search(r"memory_budget=(\d+)", text)
    batch = re.search(r"largest batch that fits is M=([\d,]+)", text)
    assert least is not None and batch is not None
    enough = int(least[1])
    assert fits(replace(r, budget=MemoryBudget(enough)))
    assert not fits(replace(r, budget=MemoryBudget(enough - 1)))
    rows = int(batch[1].replace(",", ""))
    assert fits(at_rows(r, rows)) and not fits(at_rows(r, rows + 1))


@pytest.mark.parametrize("schedule", ["auto", "spill", "retain", "dense"])
@pytest.mark.parametrize("budget", ["1MiB", "32MiB", "1GiB"])
def test_max_batch_fits_and_one_more_row_does_not(schedule: str, budget: str) -> None:
    r = request(clip, rows=4096, budget=budget, schedule=schedule)
    rows = max_batch(r)
    assert rows > 0
    assert fits(at_rows(r, rows)) and not fits(at_rows(r, rows + 1))


def test_max_batch_grows_with_the_budget_about_in_proportion() -> None:
    few, many = (max_batch(request(clip, budget=b)) for b in ("64MiB", "256MiB"))
    assert 3.8 < many / few < 4.2


def test_max_batch_keeps_the_shape_of_the_problem() -> None:
    square = max_batch(request(clip, rows=4096, budget="64MiB"))
    wide = max_batch(request(clip, rows=4096, cols=8192, budget="64MiB"))
    # Gradients of M + N rows: 2 M against 3 M.
    assert wide / square == pytest.approx(2 / 3, rel=0.05)


def test_no_batch_at_all_is_zero_and_said() -> None:
    r = request(clip, budget=1000)
    assert max_batch(r) == 0
    with pytest.raises(BudgetError, match="no batch fits"):
        choose_plan(r)


def test_a_device_smaller_than_the_budget_is_the_limit() -> None:
    r = request(clip, rows=1 << 22, budget="100GiB")
    with pytest.raises(BudgetError, match=r"the device has 8\.0 GiB"):
        choose_plan(r)
    plan = choose_plan(request(clip, rows=65536, budget="100GiB"))
    assert plan.peak_bytes <= 8 << 30 and "less than the budget" in " ".join(plan.notes)


def test_a_loss_over_slots_asks_for_their_number() -> None:
    with pytest.raises(ArgumentError, match=r"Problem\(slots="):
        choose_plan(request(hard_negatives))
