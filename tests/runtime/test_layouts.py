"""What emitted code reads as it lies in memory, and what is copied, and counted, before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_compiler.api import find_loss, loss_signature
from cl_compiler.codegen.render import environment
from cl_compiler.runtime.arguments import ArgumentChecker
from cl_compiler.runtime.layouts import read_in_place, whole_rows

WIDE = torch.randn(6, 16)
FLAT = torch.randn(1 + 6 * 16)
LAYOUTS = {
    "whole": (WIDE, True, True),
    "rows of the whole": (WIDE[2:5], True, True),
    "one row": (WIDE[:1], True, True),
    "no rows": (WIDE[:0], True, True),
    "slots": (torch.randn(3, 4, 8), True, True),
    "half of the columns": (WIDE.chunk(2, dim=1)[1], True, False),
    "every second row": (WIDE[::2], True, False),
    "one of far rows": (WIDE[::6], True, False),
    "from an odd element on": (FLAT[1:].view(6, 16), True, False),
    "transposed": (WIDE.T, False, False),
    "the same row again": (WIDE[:1].expand(6, 16), False, False),
    "every second column": (WIDE[:, ::2], False, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_read_as_it_lies(name: str) -> None:
    operand, by_pytorch, by_kernels = LAYOUTS[name]
    assert (read_in_place(operand), whole_rows(operand)) == (by_pytorch, by_kernels)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_read_as_it_lies(name: str) -> None:
    operand: Tensor = LAYOUTS[name][0]
    copy = operand.clone(memory_format=torch.contiguous_format)
    assert whole_rows(copy) and torch.equal(copy, operand)


@pytest.mark.parametrize("name", LAYOUTS)
def test_emitted_files_copy_what_the_checker_would(name: str) -> None:
    """They stand alone, so each has the rule in its own words."""
    emitted: dict[str, Any] = {"torch": torch}
    exec(environment().get_template("triton/whole_rows.py.jinja").render(), emitted)
    operand = LAYOUTS[name][0]
    ready = emitted["_whole_rows"](operand)
    assert (ready is operand) == whole_rows(operand)
    assert whole_rows(ready) and torch.equal(ready, operand)


def test_a_call_whose_operand_begins_elsewhere_is_another_one_to_kernels() -> None:
    """What was found of an aligned operand, that it needs no copy, is not taken for its like."""
    signature = loss_signature(find_loss("clip"))
    calls = [(WIDE, WIDE), (FLAT[1:].view(6, 16), WIDE), (WIDE, FLAT[1:].view(6, 16))]
    kinds = {ArgumentChecker(signature, "cuda").kind(call, {"logit_scale": 1.0}) for call in calls}
    assert len(kinds) == 3
    on_cpu = {ArgumentChecker(signature, "cpu").kind(call, {"logit_scale": 1.0}) for call in calls}
    assert len(on_cpu) == 1
