"""What a problem and a budget may be, and what is said about the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.plan import MemoryBudget, Problem, choose_plan, explain
from tests.plan.requests import request


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"slots": -1}, r"Problem\(slots=-1\): sizes are integers of at least 0"),
        ({"bank": 2.5}, r"Problem\(bank=2.5\)"),
        ({"M": 0}, r"Problem\(M=0\): sizes are integers of at least 1"),
        ({"D": True}, r"Problem\(D=True\)"),
        ({"N": "16"}, r"Problem\(N='16'\)"),
        ({"operands": {"guide": 0}}, r"Problem\(operands\['guide'\]=0\)"),
        ({"dtype": "int8"}, "use one of float64, float32, bfloat16, float16"),
    ],
)
def test_a_size_is_a_positive_integer(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Problem(**{"M": 4, "N": 4, "D": 4, **fields})


def test_numpys_integers_are_integers() -> None:
    problem = Problem(np.int64(8), 8, np.int32(4), slots=np.int8(2))
    assert problem == Problem(8, 8, 4, slots=2)
    assert {type(getattr(problem, name)) for name in ("M", "D", "slots")} == {int}


@pytest.mark.parametrize("text", ["300x400x64", "300 X 400 x 64", "300*400*64", "3_00,400,64"])
def test_a_problem_as_text(text: str) -> None:
    assert Problem.parse(text) == Problem(300, 400, 64)
    assert Problem.parse("300x64") == Problem(300, 300, 64)
    assert Problem.parse(Problem(1, 2, 3)) == Problem(1, 2, 3)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ((3, 4, 5), r"problem=\(3, 4, 5\): give Problem\(3, 4, 5\)"),
        ([3, 4], r'give Problem\(M, N, D\), or the sizes as text such as "1024x1024x512"'),
        ("many", "write MxNxD"),
        (16, "give Problem"),
    ],
)
def test_what_is_no_problem_is_answered_with_one(value: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Problem.parse(value)


def test_a_budget_is_bytes_however_it_was_written() -> None:
    for amount in ("16MiB", 16 << 20, float(16 << 20), np.int64(16 << 20), np.float32(16 << 20)):
        budget = MemoryBudget(amount)
        assert budget == MemoryBudget.parse(amount) == MemoryBudget(16 << 20)
        assert type(budget.device_bytes) is int
    assert MemoryBudget("1GiB", "2GiB").host_bytes == 2 << 30
    for amount in (None, "much", [1], float("nan"), -1):
        with pytest.raises(ArgumentError, match="as an amount of memory"):
            MemoryBudget(amount)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="at least 1 byte"):
        MemoryBudget(0)


def test_a_share_of_free_memory_does_not_follow_every_change() -> None:
    assert MemoryBudget.share_of(4000).device_bytes == 960
    assert MemoryBudget.share_of(4 * 1023) == MemoryBudget.share_of(4000)
    assert MemoryBudget.share_of(4096).device_bytes == 1024
    assert MemoryBudget.share_of(0).device_bytes == 1
    shares = [MemoryBudget.share_of(4 * n).device_bytes for n in range(16, 3000)]
    assert all(0.875 * n < share <= n for n, share in enumerate(shares, 16))


@pytest.mark.parametrize("hardware", ["xeon-amx-2c", "h100x1"])
def test_a_host_budget_is_said_to_have_no_effect(hardware: str) -> None:
    r = request(clip, hardware, rows=2048, budget={"device": "1GiB", "host": 1})
    said = "the host budget (1 B) has no effect: only the schedule host of a group keeps"
    assert said in explain(choose_plan(r))
    assert "host budget" not in explain(choose_plan(request(clip, hardware, rows=2048)))
