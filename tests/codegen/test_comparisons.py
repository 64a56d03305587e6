"""Comparisons with a positive's own value: exact at that positive, whatever rounding does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler.plan.types import Tile
from tests.comparing_losses import CASES
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import sample


@pytest.mark.parametrize("name", CASES)
def test_a_positive_is_as_similar_as_itself(name: str) -> None:
    case, width = CASES[name], 20
    whole = sample(case, 70, 70, width, seed=1)
    tensors = {n: t.detach() for n, t in whole.tensors.items()}
    if "x" in tensors:  # near their positives, so that these are compared with others
        tensors["y"] = torch.nn.functional.normalize(tensors["x"] + 1.5 * tensors["y"], dim=1)
    tensors = {n: t.float() for n, t in tensors.items()}
    wanted = replace(whole, tensors={n: t.double().requires_grad_() for n, t in tensors.items()})
    given = replace(whole, tensors={n: t.requires_grad_() for n, t in tensors.items()})
    for schedule in schedules_of(case):
        for library in ("blas", "onednn"):
            text = emit(
                case, schedule, dtype="float32", width=width, tile=Tile(32, 32), library=library
            )
            found = errors(run(text, given), wanted)
            assert max(found.values()) < 1e-5, (schedule, library, found)
    for schedule in ring_schedules_of(case):
        text = emit_ring(case, schedule, dtype="float32", width=width, tile=Tile(32, 32))
        cut = split(case, 70, 70, (3, 2))
        found = errors(run_group(text, wanted, cut, dtype=torch.float32).result, wanted)
        assert max(found.values()) < 1e-5, (schedule, found)
