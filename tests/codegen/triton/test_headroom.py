"""Kernels leave room for what multiplies shifted exponentials before their sum divides them.

Rows are their own positives, so that logits attain the bound that their norms give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import heavy_losses as heavy
from tests.codegen.triton.emit import program_of
from tests.codegen.triton.test_interpreter import assert_right
from tests.ring.shards import schedules_of

Ask = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("scale", [20.0, 60.0, 80.0, 700.0])
@pytest.mark.parametrize("name", heavy.CASES)
def test_they_do_not_overflow(interpret: Ask, name: str, scale: float) -> None:
    if name == "large_values" and scale > 80:
        pytest.skip("its values are beyond fp32")
    case = heavy.CASES[name]
    asked = {"case": name, "dtype": "float32", "m": 21, "n": 21, "d": 20, "found": True}
    asked["parameters"] = {"logit_scale": scale}
    answers = {
        schedule: interpret(**asked, schedule=schedule)
        for schedule in ("spill", "recompute", "panel")
        if program_of(case, schedule) is not None
    }
    answers["ring"] = interpret(**asked, ring=schedules_of(case)[0], shares=[1, 2, 1], node=3)
    for answer in answers.values():
        assert_right(answer, bound=scale, dtype="float32")
