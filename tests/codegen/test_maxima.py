"""Maxima near zero: their elements are found again, though products round more than they are.

A gradient goes to the elements that attain a maximum, within a tolerance that is relative to it.
The maximum of a row whose only positive is all but orthogonal to it is smaller than its products,
and these need not have the bits of their transposes: then a tile must not stand for both.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.lang import reference
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import Tile
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, Sample, sample

SIZES = ((8, 6), (70, 20), (72, 33), (134, 64))
"""Rows, features; the last tile of the diagonal is small: BLAS does not make those symmetric."""


@cl.define_loss
def nearest_view():
    """The most similar positive of every row of one set."""
    s = cl.similarity(cl.z, cl.z)
    return cl.mean(cl.exp(-cl.max(s, over=cl.cols, where=cl.is_positive)), over=cl.rows)


@cl.define_loss
def nearest_text():
    """The most similar positive of every row, and of every column."""
    s = cl.similarity(cl.x, cl.y)
    rows = cl.mean(cl.exp(-cl.max(s, over=cl.cols, where=cl.is_positive)), over=cl.rows)
    return rows + cl.mean(cl.exp(-cl.max(s, over=cl.rows, where=cl.is_positive)), over=cl.cols)


CASES = {
    "one set": Case("nearest_view", nearest_view, {}, positives="ids"),
    "two sets": Case("nearest_text", nearest_text, {}, positives="ids"),
}


def all_but_orthogonal(case: Case, rows: int, width: int) -> Sample:
    """Unit embeddings whose products with their positives are 1e-4, in numbers that fp32 has."""
    whole = sample(case, rows, rows, width, seed=rows)
    tensors = {n: t.detach() for n, t in whole.tensors.items()}
    halves = (tensors["z"][: rows // 2], tensors["z"][rows // 2 :]) if "z" in tensors else None
    x, y = halves or (tensors["x"], tensors["y"])
    y += (1e-4 - (x * y).sum(1, keepdim=True)) * x
    pairs = torch.arange(rows // 2).repeat(2) if halves else torch.arange(rows)
    return replace(
        whole,
        tensors={n: t.float().double() for n, t in tensors.items()},
        ids=dict.fromkeys(whole.ids, pairs),
        is_positive=reference.positive_mask(
            case.loss, rows, rows, **dict.fromkeys(whole.ids, pairs)
        ),
    )


def in_single(whole: Sample) -> Sample:
    return replace(whole, tensors={n: t.float().requires_grad_() for n, t in whole.tensors.items()})


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("name", CASES)
def test_their_elements_are_found_again(name: str, rows: int, width: int) -> None:
    case = CASES[name]
    whole = all_but_orthogonal(case, rows, width)
    wanted = replace(whole, tensors={n: t.requires_grad_() for n, t in whole.tensors.items()})
    for schedule in schedules_of(case):
        for library in ("blas", "onednn"):
            text = emit(
                case, schedule, dtype="float32", width=width, tile=Tile(64, 64), library=library
            )
            found = errors(run(text, in_single(whole)), wanted)
            assert max(found.values()) < 2e-6, (schedule, library, found)
    for schedule in ring_schedules_of(case):
        text = emit_ring(case, schedule, dtype="float32", width=width, tile=Tile(64, 64), chunk=30)
        cut = split(case, rows, rows, (3, 2))
        result = run_group(text, wanted, cut, dtype=torch.float32).result
        found = errors(result, wanted)
        assert max(found.values()) < 2e-6, (schedule, found)


@cl.define_loss
def logged_view(logit_scale):
    """A maximum that no gradient looks for: what is reported, and what is detached."""
    s = cl.similarity(cl.z, cl.z)
    hardest = cl.max(s, over=cl.cols, where=~cl.is_self)
    cl.output("hardest", hardest)
    row = cl.logsumexp(logit_scale * s, over=cl.cols, where=~cl.is_self)
    return cl.mean(row * cl.stop_gradient(hardest), over=cl.rows)


def test_what_no_gradient_looks_for_leaves_half_of_the_tiles() -> None:
    needs = frozenset({"z", "logit_scale"})
    plan = plan_sweeps(logged_view, "ids", needs)
    assert all(sweep.symmetric for sweep in plan.sweeps) and not plan.full_maxima
    plan = plan_sweeps(nearest_view, "ids", frozenset({"z"}))
    assert not any(sweep.symmetric for sweep in plan.sweeps) and plan.full_maxima
    assert all(s.symmetric for s in plan_sweeps(nearest_view, "ids", frozenset()).sweeps)
