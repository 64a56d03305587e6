"""Sums of shifted exponentials leave room for what multiplies these before it is divided by them.

Rows are their own positives, so that logits attain the bound that their norms give.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.lang.headroom import weighs_exponentials
from cl_compiler.lang.schedules import build_program
from cl_compiler.lang.sweeps import plan_sweeps
from tests import heavy_losses as heavy
from tests import losses_zoo as zoo
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, Sample, sample


@cl.define_loss
def weighted_views(logit_scale):
    """Of one set, whose diagonal is left out of the exponentials first."""
    s = logit_scale * cl.similarity(cl.z, cl.z) * cl.col_input("weight")
    return cl.mean(cl.logsumexp(s, over=cl.cols, where=~cl.is_self), over=cl.rows)


CASES = ["expected_logit", "row_weights", "col_weights"]
SCALES = (80.0, 700.0, 20000.0)


def found_pairs(case: Case, rows: int, scale: float) -> Sample:
    whole = sample(replace(case, parameters={"logit_scale": scale}), rows, rows, 8, seed=rows)
    tensors = {n: t.detach().float().double() for n, t in whole.tensors.items()}
    tensors["y"] = tensors["x"].clone()
    tensors["y"][-1] = tensors["x"][0]  # but for one, so that gradients have not vanished
    return replace(whole, tensors={n: t.requires_grad_() for n, t in tensors.items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CASES)
def test_they_do_not_overflow(name: str, scale: float, dtype: str) -> None:
    case, kind = heavy.CASES[name], getattr(torch, dtype)
    allowed = 4 * torch.finfo(kind).eps * (4 + scale)  # roundings of a logit in its exponential
    for rows in (1, 2, 9):
        whole = found_pairs(case, rows, scale)
        tensors = {n: t.detach().to(kind).requires_grad_() for n, t in whole.tensors.items()}
        for schedule in schedules_of(case):
            text = emit(case, schedule, dtype=dtype, width=8)
            found = errors(run(text, replace(whole, tensors=tensors)), whole)
            assert max(found.values()) <= allowed, (rows, schedule, found)
        cut = split(case, rows, rows, (2, 1))
        for schedule in ring_schedules_of(case):
            text = emit_ring(case, schedule, dtype=dtype, width=8)
            found = errors(run_group(text, whole, cut, dtype=kind).result, whole)
            assert max(found.values()) <= allowed, (rows, schedule, found)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 60.0), ("float64", 500.0)])
def test_large_values_do_not_overflow(dtype: str, scale: float) -> None:
    """Nothing shifts such logits; the sums of what they weigh decide."""
    case, kind = heavy.CASES["large_values"], getattr(torch, dtype)
    allowed = 4 * torch.finfo(kind).eps * (4 + scale)
    whole = found_pairs(case, 9, scale)
    tensors = {n: t.detach().to(kind).requires_grad_() for n, t in whole.tensors.items()}
    for schedule in schedules_of(case):
        text = emit(case, schedule, dtype=dtype, width=8)
        found = errors(run(text, replace(whole, tensors=tensors)), whole)
        assert max(found.values()) <= allowed, (schedule, found)
    cut = split(case, 9, 9, (2, 1))
    for schedule in ring_schedules_of(case):
        text = emit_ring(case, schedule, dtype=dtype, width=8)
        found = errors(run_group(text, whole, cut, dtype=kind).result, whole)
        assert max(found.values()) <= allowed, (schedule, found)


def test_what_has_no_use_of_room_has_none() -> None:
    """The usual losses multiply by inverses of sums first, and are shifted as little as can be."""
    for name, wanted in (("clip", False), ("nt_xent", False), ("supcon", False), ("entropy", True)):
        case = next(case for case in zoo.cases() if case.name == name)
        program = build_program(plan_sweeps(case.loss, case.positives, case.needs), "spill")
        assert weighs_exponentials(program) == wanted, name
    sweeps = plan_sweeps(weighted_views, "views", frozenset({"z", "weight"}))
    assert weighs_exponentials(build_program(sweeps, "spill"))
