"""Means of nothing and derivatives that do not exist: as the words of the language promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler import lang as cl
from cl_compiler.errors import NoPositiveError
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.reference import evaluate

SCHEDULES = ("dense", "recompute", "spill")


@cl.define_loss
def mean_positive(sim, logit_scale):
    """The mean logit of a row's positives, squared: an error where a row has none."""
    own = cl.mean(logit_scale * sim, over=cl.cols, where=cl.is_positive)
    return cl.mean(own**2, over=cl.rows)


@cl.define_loss
def mean_near(sim):
    """The mean of a column's similarities above a half: an error where there is none."""
    return cl.sum(cl.mean(sim, over=cl.rows, where=sim > 0.5), over=cl.cols)


@cl.define_loss
def mean_near_or_zero(sim):
    """The same, where nothing counts as 0."""
    return cl.sum(cl.mean(sim, over=cl.rows, where=sim > 0.5, empty=0), over=cl.cols)


@cl.define_loss
def floored(sim):
    """log(0) is -inf, the maximum is finite, its gradient is not."""
    return cl.mean(cl.maximum(cl.log(cl.sum(sim**2, over=cl.cols)), -3.0), over=cl.rows)


@cl.define_loss
def chosen(sim):
    """The same value: what a mask excludes is never looked at."""
    energy = cl.sum(sim**2, over=cl.cols)
    return cl.mean(cl.where(energy > 0, cl.log(energy), -3.0), over=cl.rows)


def tensors(rows: int = 70, cols: int = 90) -> tuple[Tensor, Tensor]:
    """More than one tile; rows of different lengths; every column has a similarity above 1/2."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, 5, generator=generator, dtype=torch.float64) for k in (rows, cols))
    return x.requires_grad_(), y.requires_grad_()


def both(loss: LossIR, schedule: str, x: Tensor, y: Tensor, **given: object) -> list[list[Tensor]]:
    """(value, gradients) of the compiled loss and of the reference."""
    parameters = {n: given.pop(n) for n in loss.parameters}
    compiled = compile_loss("auto", "64MiB", loss=loss, schedule=schedule)
    values = [
        compiled(x, y, **parameters, **given),
        evaluate(loss, {"x": x, "y": y}, parameters, **given),  # type: ignore[arg-type]
    ]
    return [[v.detach(), *torch.autograd.grad(v, [x, y])] for v in values]


def assert_equal(found: list[list[Tensor]]) -> None:
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_without_an_element_fails_the_call(schedule: str) -> None:
    x, y = tensors()
    col_ids = torch.arange(90)
    assert_equal(
        both(mean_positive, schedule, x, y, logit_scale=2.0, row_ids=col_ids[:70], col_ids=col_ids)
    )
    lonely = col_ids[:70].clone()
    lonely[41] = 1000
    given = {"row_ids": lonely, "col_ids": col_ids}
    words = "mean over cols has no element for some of the rows"
    loss = compile_loss("auto", "64MiB", loss=mean_positive, schedule=schedule)
    with pytest.raises(NoPositiveError, match=words):
        loss(x, y, logit_scale=2.0, **given)
    with pytest.raises(NoPositiveError, match=words):
        evaluate(mean_positive, {"x": x, "y": y}, {"logit_scale": 2.0}, **given)


@pytest.mark.parametrize("rows", [70, 90])
def test_a_positive_for_every_row_needs_no_check(rows: int) -> None:
    x, y = tensors(rows)
    loss = compile_loss("auto", "64MiB", loss=mean_positive)
    value = loss(x, y, logit_scale=2.0)
    assert torch.allclose(value, (2 * (x * y[:rows]).sum(1)).square().mean())
    assert "NoPositiveError" not in loss.source


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_column_whose_mask_leaves_nothing_fails_the_call(schedule: str) -> None:
    x, y = tensors()
    assert_equal(both(mean_near, schedule, x, y))
    with torch.no_grad():
        y[63].zero_()
    loss = compile_loss("auto", "64MiB", loss=mean_near, schedule=schedule)
    with pytest.raises(NoPositiveError, match="mean over rows has no element for some of the cols"):
        loss(x, y)
    found = both(mean_near_or_zero, schedule, x, y)
    assert_equal(found)
    assert not found[0][2][63].any()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_derivative_that_is_nan_in_pytorch_is_nan(schedule: str) -> None:
    """0 · ∞: the maximum passes a gradient of 0 to a logarithm whose derivative is infinite."""
    x, y = tensors()
    with torch.no_grad():
        x[3].zero_()
    found = both(floored, schedule, x, y)
    assert_equal(found)
    value = torch.maximum((x @ y.T).square().sum(1).log(), torch.tensor(-3.0)).mean()
    pytorch = [value.detach(), *torch.autograd.grad(value, [x, y])]
    assert_equal([found[0], pytorch])
    assert torch.isfinite(pytorch[0]) and pytorch[1][3].isnan().all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_mask_excludes_has_no_derivative(schedule: str) -> None:
    """Unlike ``torch.where``, whose other branch turns the gradient into NaN."""
    x, y = tensors()
    with torch.no_grad():
        x[3].zero_()
    found = both(chosen, schedule, x, y)
    assert_equal(found)
    assert all(torch.isfinite(t).all() for t in found[0])
    others = [i for i in range(70) if i != 3]
    rest = x.detach()[others].requires_grad_()
    value = (rest @ y.T).square().sum(1).log().sum() / 70 - 3 / 70
    assert torch.allclose(found[0][0], value)
    assert torch.allclose(found[0][1][others], torch.autograd.grad(value, rest)[0])
