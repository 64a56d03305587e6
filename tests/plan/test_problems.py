"""Sizes that no call could have, and sizes that nothing would read, are refused before planning."""

from __future__ import annotations

from typing import Any

import pytest

from cl_compiler.errors import ArgumentError
from cl_compiler.losses import find
from cl_compiler.plan import Problem
from cl_compiler.plan.problems import check_problem
from tests.losses_zoo import hard_negatives


@pytest.mark.parametrize(
    ("loss", "fields", "positives", "said"),
    [
        ("clip", {"slots": 4}, "diagonal", r"clip has no slots, so Problem\(slots=4\) would have"),
        (
            "clip",
            {"bank": 9},
            "ids",
            r"clip has no bank, so Problem\(bank=9\) would",
        ),
        ("clip", {"operands": {"w": 3}}, "diagonal", "clip has no operand w; leave its width out"),
        ("clip", {"M": 9}, "diagonal", "N is at least M; got M=9 N=8.*--positives ids"),
        ("nt_xent", {"M": 9}, "views", "nt_xent compares one set with itself.*M=9 N=8"),
        ("nt_xent", {"M": 9, "N": 9}, "views", r"even; got M=9\. Give 10; or use ids"),
        (hard_negatives, {}, "diagonal", r"give their number as Problem\(slots="),
        (hard_negatives, {"slots": 2, "operands": {"w": 3}}, "diagonal", "no operand w; it has "),
    ],
)
def test_what_cannot_be(loss: Any, fields: dict[str, Any], positives: Any, said: str) -> None:
    ir = find(loss) if isinstance(loss, str) else loss
    with pytest.raises(ArgumentError, match=said):
        check_problem(Problem(**{"M": 8, "N": 8, "D": 4, **fields}), ir, positives)


def test_what_can() -> None:
    check_problem(Problem(8, 9, 4), find("clip"), "diagonal")
    check_problem(Problem(9, 8, 4), find("clip"), "ids")
    check_problem(Problem(9, 9, 4), find("nt_xent"), "ids")
    name = next(op.name for op in hard_negatives.operands if op.name not in ("x", "y"))
    problem = Problem(8, 8, 4, slots=2, operands={name: 6})
    check_problem(problem, hard_negatives, "diagonal")
