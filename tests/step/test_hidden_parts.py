"""Encoders and losses that train what no argument names: attributes of objects, closures, lists."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_compiler import GradientCache, plan_step
from tests.step.encoders import assert_same, batch, contrast, gradients, tower
from tests.step.test_planner import Short


class Trainer:
    """Holds a model as training code does: not as a module."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = {"model": model}
        self.history = [0.0] * 10_000

    def encode(self, value):
        return self.parts["model"](value)


class RunsOutOnce(nn.Module):
    """Has no memory for its n-th forward with a graph."""

    def __init__(self, inner: nn.Module, failing: int) -> None:
        super().__init__()
        self.inner, self.left = inner, failing

    def forward(self, value):
        self.left -= torch.is_grad_enabled()
        if self.left == 0 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(value)


def hidden(model: nn.Module, how: str):
    """The model as an encoder that does not show it."""
    trainer, models = Trainer(model), [model]
    return {
        "method": trainer.encode,
        "attribute": lambda value: trainer.parts["model"](value),
        "list": lambda value: models[0](value),
    }[how]


WAYS = ["method", "attribute", "list"]


@pytest.mark.parametrize("how", WAYS)
def test_buffers_of_hidden_modules_are_updated_once(how):
    model, same, other = (tower(0, nn.BatchNorm1d(8)) for _ in range(3))
    x, y = batch(2, 14), batch(3, 14)
    GradientCache([hidden(model, how), other], contrast, chunk_sizes=4)(x, y)
    GradientCache([same, tower(0, nn.BatchNorm1d(8))], contrast, chunk_sizes=4)(x, y)
    assert model[2].num_batches_tracked == 4
    assert_same([*gradients(model)], [*gradients(same)])
    assert_same(list(model.buffers())[:2], list(same.buffers())[:2])


@pytest.mark.parametrize("how", WAYS)
def test_a_second_try_does_not_count_what_the_first_one_added(how):
    """The second chunk runs out of memory after the first one's gradient is there."""
    x, y = batch(2), batch(3)
    log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(a, b):
        return contrast(a, b, log_scale.exp())

    def run(failing, size):
        model, other = RunsOutOnce(tower(0), failing), tower(1)
        step = GradientCache([hidden(model, how), other], loss, chunk_sizes=[size, 4])
        step(x, y)
        assert step.chunk_sizes == (2, 4)
        found, log_scale.grad = log_scale.grad, None
        return [found, *gradients(model.inner, other)]

    assert_same(run(failing=2, size=4), run(failing=0, size=2))


def test_no_second_try_where_a_hidden_gradient_was_there_before():
    model, weight = Short(tower(0), 4, "graph"), torch.ones(5, dtype=torch.float64)
    weight.requires_grad_().grad = torch.ones_like(weight)
    step = GradientCache(
        [lambda value: tower(1)(value) * weight, model], contrast, chunk_sizes=[4, 8]
    )
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(batch(2), batch(3))
    assert "may hold a part of its sum" in caught.value.__notes__[0]


def test_planning_leaves_no_gradient_where_only_a_graph_shows_the_parameter():
    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    log_scale.grad = torch.tensor(7.0, dtype=torch.float64)
    inner = tower(1)
    plan_step(
        [lambda value: inner(value) * weight, inner],
        (batch(2), batch(3)),
        lambda a, b: contrast(a, b, log_scale.exp()),
        "1MiB",
    )
    assert weight.grad is None and log_scale.grad == 7 and gradients(inner) == [None] * 4


def test_memory_that_runs_out_is_approached_by_halves():
    """Nothing that is measured below 500 samples foretells it."""
    model = Short(tower(0), 500, "graph")
    plan = plan_step([model, model], (batch(2, 1000), batch(3, 1000)), contrast, "64MiB")
    assert all(400 < encoder.largest <= 500 for encoder in plan.encoders)


def test_larger_samples_are_planned_anew():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tower(0)

        def forward(self, value):  # [samples, length, width]
            return self.inner(value).mean(1)

    def values(length: int) -> torch.Tensor:
        return torch.randn(64, length, 6, dtype=torch.float64)

    step = GradientCache([Mean(), Mean()], contrast, chunk_sizes="auto", memory_budget="600KiB")
    step(values(2), values(2))
    first = step.plan
    step(values(2), values(2))
    assert step.plan is first
    step(values(400), values(400))
    assert step.plan is not first
    assert all(
        long < short for long, short in zip(step.chunk_sizes, first.chunk_sizes, strict=True)
    )


def test_one_encoder_of_both_sides_learns_for_both():
    model = Short(tower(0), 4, "graph")
    step = GradientCache([model, model], contrast, chunk_sizes=8)
    step(batch(2), batch(3))
    assert step.chunk_sizes == (4, 4)
