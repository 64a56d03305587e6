"""Words that the language has, and what it says of others."""

from __future__ import annotations

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.errors import LossDefinitionError
from tests.tiles import emit, errors, run, schedules_of
from tests.zoo_case import Case, sample


@cl.define_loss
def farthest(logit_scale):
    """Of every row, the element that is least like it, of some."""
    s = logit_scale * cl.similarity(cl.x, cl.y)
    least = cl.min(s, over=cl.cols, where=s > -1.0)
    return cl.mean(cl.softplus(-least), over=cl.rows)


def test_a_minimum_is_the_smallest_element() -> None:
    case = Case("farthest", farthest, {"logit_scale": 2.0})
    whole = sample(case, 11, 15, 6, seed=2)
    s = 2.0 * whole.tensors["x"] @ whole.tensors["y"].T
    least = s.masked_fill(s <= -1.0, torch.inf).amin(1)
    torch.testing.assert_close(whole.reference(), torch.nn.functional.softplus(-least).mean())
    for schedule in schedules_of(case):
        assert max(errors(run(emit(case, schedule), whole), whole).values()) < 1e-10, schedule


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("topk", "Tiles know no order of a row's elements: select by a threshold"),
        ("abs", r"Use abs\(v\)"),
        ("cosh", "The functions of the language are cl.exp"),
    ],
)
def test_a_word_that_there_is_not(word: str, said: str) -> None:
    assert not hasattr(cl, word)
    with pytest.raises(AttributeError, match=said):
        getattr(cl, word)


@pytest.mark.parametrize("ends", [tuple, list])
def test_a_loss_is_returned_alone(ends: type) -> None:
    def two(sim):
        return ends([cl.mean(cl.max(sim, over=cl.cols), over=cl.rows)])

    with pytest.raises(LossDefinitionError, match=r"return the loss alone.*cl.output\(name, value"):
        cl.define_loss(two)


def test_equality_is_no_comparison() -> None:
    def ties(sim):
        where = sim == cl.max(sim, over=cl.cols)
        return cl.mean(cl.sum(sim, over=cl.cols, where=where), over=cl.rows)

    with pytest.raises(LossDefinitionError, match=r"s >= cl\.max"):
        cl.define_loss(ties)
