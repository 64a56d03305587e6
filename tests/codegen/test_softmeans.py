"""Means weighted with exponentials: sums of shifted ones leave room for what they weigh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from tests.dense_fp32 import limits
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, Sample, sample


@cl.define_loss
def expected_logit(logit_scale):
    """The mean of the logits, each weighted with its probability: as large as the logits are."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    rows = cl.mean(cl.softmean(s, s, over=cl.cols), over=cl.rows)
    return rows - cl.mean(cl.softmean(s, s, over=cl.rows), over=cl.cols)


CASE = Case("expected_logit", expected_logit, {"logit_scale": 1.0})
SCALES = (80.0, 200.0, 700.0, 20000.0)


def found_pairs(rows: int, scale: float) -> Sample:
    """Every row is its positive, so logits attain the bound that their norms give."""
    whole = sample(replace(CASE, parameters={"logit_scale": scale}), rows, rows, 8, seed=rows)
    x = whole.tensors["x"].detach().float().double()
    return replace(whole, tensors={"x": x.requires_grad_(), "y": x.clone().requires_grad_()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_they_do_not_overflow(rows: int, scale: float, dtype: str) -> None:
    kind = getattr(torch, dtype)
    whole = found_pairs(rows, scale)
    allowed = limits(whole) if dtype == "float32" else dict.fromkeys(("value", *CASE.needs), 1e-10)
    given = replace(
        whole, tensors={n: t.detach().to(kind).requires_grad_() for n, t in whole.tensors.items()}
    )
    for schedule in schedules_of(CASE):
        result = run(emit(CASE, schedule, dtype=dtype, width=8), given)
        found = errors(result, whole)
        assert all(e <= allowed[n] for n, e in found.items()), (schedule, found)
    cut = split(CASE, rows, rows, (2, 1))
    for schedule in ring_schedules_of(CASE):
        text = emit_ring(CASE, schedule, dtype=dtype, width=8)
        found = errors(run_group(text, whole, cut, dtype=kind).result, whole)
        assert all(e <= allowed[n] for n, e in found.items()), (schedule, found)
