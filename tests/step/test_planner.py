"""Planned steps: their peak is what was predicted and within the budget, and no trace is left."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from cl_compiler import GradientCache, compile_loss, plan_step
from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.step.chunks import Sizes
from cl_compiler.step.offload import Link
from cl_compiler.step.planner import StepPlan
from cl_compiler.step.towers import Tower, call_by_structure
from cl_compiler.units import counted
from tests.step.encoders import assert_same, contrast, gradients, tower
from tests.step.encoders import batch as values

SAMPLES, DIM = 701, 12
KIB = 1 << 10


def encoder(seed: int, width: int, layers: int, dim: int = DIM) -> nn.Sequential:
    torch.manual_seed(seed)
    inside = [part for _ in range(layers) for part in (nn.GELU(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(DIM, width), *inside, nn.Linear(width, dim))


def batch(seed: int, samples: int = SAMPLES) -> torch.Tensor:
    return torch.randn(samples, DIM, generator=torch.Generator().manual_seed(seed))


def step_peak(encoders, values, loss_fn, chunks, **arguments) -> int:
    """Of a step whose parameters have no gradients yet, when everything is compiled."""
    step = GradientCache(encoders, loss_fn, chunk_sizes=list(chunks))
    for _ in range(2):
        for module in encoders:
            module.zero_grad()
        with LiveBytes() as live:
            step(*values, **arguments)
    return live.peak_bytes


@pytest.mark.parametrize("budget", ["64MiB", "4MiB", "2MiB", "1500KiB", "1200KiB"])
def test_the_step_holds_its_budget_and_its_prediction(budget):
    """Two towers of different size; the smallest budget leaves chunks of a few samples."""
    a, b = encoder(0, 96, 5), encoder(1, 48, 3)
    values, loss_fn = (batch(2), batch(3)), compile_loss("auto", "600KiB")
    plan = plan_step([a, b], values, loss_fn, budget)
    measured = step_peak([a, b], values, loss_fn, plan.chunk_sizes, logit_scale=3.0)
    assert measured <= plan.budget_bytes
    assert abs(plan.peak_bytes / measured - 1) <= 0.1
    # The largest chunk that fits is found, up to a tenth; whether it is the fastest is measured.
    largest = [encoder.largest for encoder in plan.encoders]
    most = step_peak([a, b], values, loss_fn, largest, logit_scale=3.0)
    assert most <= plan.budget_bytes
    assert largest == [SAMPLES, SAMPLES] or most >= 0.9 * plan.budget_bytes


def dense(x, y, logit_scale=1.0):
    return contrast(x, y, logit_scale)


@pytest.mark.parametrize(
    ("encoders", "loss_fn"),
    [
        ((encoder(0, 64, 3), encoder(1, 64, 3).requires_grad_(False)), dense),
        ((encoder(0, 64, 3),) * 2, dense),
        ((encoder(0, 256, 1), encoder(1, 16, 1)), dense),  # parameters outweigh a chunk's graph
        (
            (nn.Sequential(encoder(0, 64, 2), nn.Dropout(0.3), nn.BatchNorm1d(DIM)),) * 2,
            compile_loss("auto", "600KiB", loss="infonce"),
        ),
    ],
    ids=["frozen", "shared", "wide", "noisy"],
)
def test_predictions_hold_for_other_steps(encoders, loss_fn):
    values = (batch(2), batch(3))
    whole = plan_step(encoders, values, loss_fn, "1GiB", loss_arguments={"logit_scale": 2.0})
    floor = max(whole.stages["loss and its gradients"], whole.peak_bytes // 3)
    for budget in (whole.peak_bytes + KIB, floor + 64 * KIB):
        plan = plan_step(encoders, values, loss_fn, budget, loss_arguments={"logit_scale": 2.0})
        measured = step_peak(encoders, values, loss_fn, plan.chunk_sizes, logit_scale=2.0)
        assert measured <= budget
        assert abs(plan.peak_bytes / measured - 1) <= 0.1


def test_no_last_chunk_of_one_sample():
    """BatchNorm refuses one; 701 = 100 · 7 + 1."""
    sizes = Sizes(Tower(0, tower(0), 1, call_by_structure, None).job(batch(2), Link()))
    assert [sizes.without_a_single(size, SAMPLES) for size in (100, 99, 350, 2, 701)] == [
        99,
        99,
        349,
        2,
        701,
    ]


@pytest.mark.parametrize("budget", ["2MiB", "1200KiB"])
def test_planning_itself_holds_the_budget(budget):
    """It may be all that the device has."""
    a, b = encoder(0, 96, 5), encoder(1, 48, 3)
    loss_fn = compile_loss("auto", "600KiB")
    values = (batch(2), batch(3))
    loss_fn(*(v.clone().requires_grad_() for v in values), logit_scale=1.0).backward()
    with LiveBytes() as live:
        plan = plan_step([a, b], values, loss_fn, budget)
    assert live.peak_bytes <= plan.budget_bytes


def test_memory_that_runs_out_while_planning_is_a_lesson():
    a = Short(encoder(0, 48, 2), 100, "graph")
    plan = plan_step([a, a], (batch(2), batch(3)), compile_loss("auto", "600KiB"), "1GiB")
    assert max(plan.chunk_sizes) <= 100


def test_planning_leaves_no_trace():
    a = nn.Sequential(encoder(0, 32, 1), nn.BatchNorm1d(DIM), nn.Dropout(0.5))
    b = encoder(1, 32, 1)
    scale = torch.tensor(2.0, requires_grad=True)
    for parameter in b.parameters():
        parameter.grad = torch.ones_like(parameter)
    values = (batch(2), batch(3))
    buffers = [t.clone() for t in a.buffers()]
    states = torch.get_rng_state(), random.getstate()
    plan_step([a, b], values, dense, "16MiB", loss_arguments={"logit_scale": scale.exp()})
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(torch.equal(t, u) for t, u in zip(a.buffers(), buffers, strict=True))
    assert all(p.grad is None for p in a.parameters())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in b.parameters())
    assert scale.grad is None


def test_a_budget_that_nothing_fits_says_what_would():
    values = (batch(2), batch(3))
    encoders = [encoder(0, 32, 1), encoder(1, 32, 1)]
    with pytest.raises(BudgetError, match=r"the loss takes .* whatever the chunks"):
        plan_step(encoders, values, dense, "1MiB")
    with pytest.raises(BudgetError, match="with chunks of two samples it takes"):
        plan_step(encoders, values, compile_loss("auto", "600KiB"), "20KiB")
    with pytest.raises(ArgumentError, match="1 input for 2 encoders"):
        plan_step(encoders, values[:1], dense, "1MiB")


def test_a_dense_loss_that_does_not_fit_is_not_run():
    """Its bytes are found out on the meta device."""
    a = encoder(0, 8, 1)
    with LiveBytes() as live, pytest.raises(BudgetError):
        plan_step([a, a], (batch(2), batch(3)), dense, "8MiB", samples=1 << 20)
    assert live.peak_bytes < 8 << 20


def test_a_sample_stands_for_larger_batches():
    a, b = encoder(0, 64, 3), encoder(1, 64, 3)
    loss_fn = compile_loss("auto", "600KiB")
    plan = plan_step([a, b], (batch(2, 128), batch(3, 128)), loss_fn, "1500KiB", samples=SAMPLES)
    values = (batch(4), batch(5))
    measured = step_peak([a, b], values, loss_fn, plan.chunk_sizes, logit_scale=3.0)
    assert plan.samples == SAMPLES
    assert measured <= plan.budget_bytes
    assert abs(plan.peak_bytes / measured - 1) <= 0.1


def test_the_largest_batch_is_one_that_fits():
    a, b = encoder(0, 64, 3), encoder(1, 64, 3)
    loss_fn = compile_loss("auto", "2MiB")
    values = (batch(2, 256), batch(3, 256))
    plan = plan_step([a, b], values, loss_fn, "1MiB")
    assert plan.max_batch > 256
    again = plan_step([a, b], values, loss_fn, plan.budget_bytes, samples=plan.max_batch)
    assert again.peak_bytes <= plan.budget_bytes


def test_the_plan_explains_itself():
    a = encoder(0, 64, 3)
    frozen = encoder(1, 64, 3).requires_grad_(False)
    plan = plan_step([a, frozen], (batch(2), batch(3)), compile_loss("auto", "600KiB"), "1500KiB")
    text = plan.explain()
    chunks = counted(plan.encoders[0].chunks, "chunk")
    assert f"{chunks} of {plan.chunk_sizes[0]} (the fastest of those up to " in text
    assert "one pass: it does not train" in text
    assert text.count("<- the step's") == 1
    assert f"{plan.max_batch:,}" in text
    assert isinstance(plan, StepPlan)
    assert plan.seconds > 0


# ---- in GradientCache ---------------------------------------------------------------------------


def test_auto_finds_chunks_at_the_first_batch_and_keeps_them():
    a, b = encoder(0, 64, 3), encoder(1, 64, 3)
    loss_fn = compile_loss("auto", "600KiB")
    step = GradientCache([a, b], loss_fn, chunk_sizes="auto", memory_budget="1500KiB")
    step(batch(2), batch(3), logit_scale=2.0)
    want, plan = gradients(a, b), step.plan
    assert step.chunk_sizes == plan.chunk_sizes
    assert max(plan.chunk_sizes) < SAMPLES
    GradientCache([a, b], loss_fn, chunk_sizes=list(plan.chunk_sizes))(
        batch(2), batch(3), logit_scale=2.0
    )
    for one, other in zip(gradients(a, b), want, strict=True):
        assert torch.equal(one, other)
    step(batch(4, 100), batch(5, 100), logit_scale=2.0)
    assert step.plan is plan
    step(batch(4, 800), batch(5, 800), logit_scale=2.0)
    assert step.plan.samples == 800


@pytest.mark.parametrize("given", [{"chunk_sizes": "auto"}, {"chunk_sizes": 4, "memory_budget": 9}])
def test_auto_and_a_budget_belong_together(given):
    with pytest.raises(ArgumentError, match='chunk_sizes="auto" and a budget'):
        GradientCache([tower(0)], contrast, **given)


class Short(nn.Module):
    """Has memory for a number of samples; ``where``: it runs out without or with a graph."""

    def __init__(self, inner: nn.Module, samples: int, where: str) -> None:
        super().__init__()
        self.inner, self.samples, self.where, self.calls = inner, samples, where, 0

    def forward(self, value):
        self.calls += 1
        if len(value) > self.samples and (self.where == "graph") == torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(value)


@pytest.mark.parametrize("where", ["no graph", "graph"])
def test_a_chunk_that_runs_out_of_memory_is_halved_once_and_for_good(where):
    a, b = Short(tower(0, nn.Dropout(0.3)), 4, where), tower(1)
    log_scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x, y = values(2), values(3)

    def run(step):
        torch.manual_seed(9)
        value = step(x, y, logit_scale=log_scale.exp())
        scale, log_scale.grad = log_scale.grad, None
        return [value, scale, *gradients(a, b)]

    step = GradientCache([a, b], contrast, chunk_sizes=8)
    found = run(step)
    assert step.chunk_sizes == (4, 8)
    assert_same(found, run(GradientCache([a, b], contrast, chunk_sizes=[4, 8])))
    a.calls = 0
    run(step)
    assert a.calls == 2 * 4  # the lesson was kept: no chunk fails again


def test_a_chunk_that_is_too_large_twice_is_an_error():
    a, b = Short(tower(0), 2, "graph"), tower(1)
    step = GradientCache([a, b], contrast, chunk_sizes=8)
    with pytest.raises(torch.OutOfMemoryError):
        step(values(2), values(3))
    assert gradients(a, b) == [None] * 8
    step(values(2), values(3))  # the lesson of the first try helps the next step
    assert step.chunk_sizes == (2, 8)


def test_no_second_try_where_gradients_were_there_before():
    """They may hold a part of the failed step's sum."""
    a, b = Short(tower(0), 4, "graph"), tower(1)
    for parameter in b.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = GradientCache([a, b], contrast, chunk_sizes=8)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step(values(2), values(3))
    assert "may hold a part of its sum" in caught.value.__notes__[0]
    assert step.chunk_sizes == (8, 8)


def test_other_errors_are_not_mistaken_for_missing_memory():
    class Broken(nn.Module):
        def forward(self, value):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    step = GradientCache([Broken(), tower(1)], contrast, chunk_sizes=8)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(values(2), values(3))
    assert step.chunk_sizes == (8, 8)
