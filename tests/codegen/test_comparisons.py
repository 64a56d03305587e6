"""Comparisons with a positive's own value: exact at that positive, whatever rounding does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.plan.types import Tile
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.shards import schedules_of as ring_schedules_of
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, sample


@cl.define_loss
def semi_hard(logit_scale):
    """Negatives that are less similar than the positive; the positive is not."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.rows)
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=s < p), over=cl.rows)


@cl.define_loss
def semi_hard_by_a_constant(logit_scale):
    """The same with positives that have no gradient."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.stop_gradient(cl.at_positive(s, on=cl.rows))
    near = (cl.stop_gradient(s) > p - 5.0) & (s < p)
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=near), over=cl.rows)


@cl.define_loss
def rank(logit_scale):
    """How many columns are as similar as the positive, which is one of them."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.rows)
    number = cl.count(over=cl.cols, where=s >= p)
    return cl.mean(cl.log(number) - 0.1 * p, over=cl.rows)


@cl.define_loss
def rank_of_columns(logit_scale):
    """The same the other way round."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p = cl.at_positive(s, on=cl.cols)
    some = cl.sum(cl.exp(s - p), over=cl.rows, where=p <= s)
    return cl.mean(cl.log(1.0 + some) - 0.1 * p, over=cl.cols)


@cl.define_loss
def semi_hard_views(logit_scale):
    """Of two views of one set."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    p = cl.at_positive(s, on=cl.rows)
    where = (s < p) & ~cl.is_self
    return cl.mean(cl.sum(cl.relu(3.0 + s - p), over=cl.cols, where=where), over=cl.rows)


@cl.define_loss
def wrong_rows(logit_scale):
    """Only rows whose largest similarity is not their positive's."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p, top = cl.at_positive(s, on=cl.rows), cl.max(s, over=cl.cols)
    right = cl.where(2.0 * p >= 2.0 * top, 1.0, 0.0)
    return cl.mean(cl.relu(1.0 + top - p), over=cl.rows, where=top > p) + cl.mean(
        right, over=cl.rows
    )


@cl.define_loss
def wrong_columns(logit_scale):
    """The same of columns, by constants."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    p, top = cl.at_positive(s, on=cl.cols), cl.stop_gradient(cl.max(s, over=cl.rows))
    wrong = cl.where(cl.stop_gradient(p) < top, 1.0, 0.0)
    return cl.mean(cl.softplus(wrong - 0.1 * p), over=cl.cols)


@cl.define_loss
def wrong_views(logit_scale):
    """Of one set: the largest similarity to another row."""
    s = logit_scale * cl.similarity(cl.z, cl.z)
    p, top = cl.at_positive(s, on=cl.rows), cl.max(s, over=cl.cols, where=~cl.is_self)
    return cl.mean(cl.where(p >= top, cl.softplus(p), top), over=cl.rows)


CASES = {
    f"{loss.name} {positives}": Case(loss.name, loss, {"logit_scale": 10.0}, positives=positives)
    for loss, positives in (
        (semi_hard, "diagonal"),
        (semi_hard_by_a_constant, "diagonal"),
        (rank, "diagonal"),
        (rank_of_columns, "diagonal"),
        (rank_of_columns, "paired"),
        (semi_hard_views, "views"),
        (wrong_rows, "diagonal"),
        (wrong_columns, "paired"),
        (wrong_views, "views"),
    )
}


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
