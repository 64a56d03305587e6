"""Kernels of losses that compare with the positive's own value, or are of positives alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.codegen.triton.emit import program_of
from tests.codegen.triton.test_interpreter import assert_right
from tests.comparing_losses import CASES
from tests.ring.shards import schedules_of

Ask = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", CASES)
def test_a_positive_is_as_similar_as_itself(interpret: Ask, name: str) -> None:
    case = CASES[name]
    asked = {"case": name, "dtype": "float32", "m": 21, "n": 21, "d": 20}
    for schedule in ("spill", "recompute", "panel"):
        if program_of(case, schedule) is not None:
            assert_right(interpret(**asked, schedule=schedule), 10.0, "float32")
    ring = interpret(**asked, ring=schedules_of(case)[0], shares=[1, 2, 1], node=3)
    assert_right(ring, 10.0, "float32")
