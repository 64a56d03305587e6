"""What a plan decides beside chunk sizes: the unit, what waits on the host, the loss's budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_compiler import GradientCache, compile_loss, plan_step
from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.step import Stream, Tokens
from tests.step.encoders import contrast, gradients, tower
from tests.step.host import NumpyHost
from tests.step.test_planner import SAMPLES, batch, encoder, step_peak


@pytest.fixture
def host(monkeypatch) -> NumpyHost:
    link = NumpyHost()
    for place in ("planner", "grad_cache"):
        monkeypatch.setattr(f"cl_compiler.step.{place}.link_to", lambda _: link)
    return link


def peak_of(plan, encoders, values, **options) -> int:
    step = GradientCache(encoders, plan.loss_fn, chunk_sizes=plan.chunk_sizes, **options)
    for _ in range(2):
        for module in encoders:
            module.zero_grad()
        with LiveBytes() as live:
            step(*values, logit_scale=3.0)
    return live.peak_bytes


def assert_close(found, want) -> None:
    """In fp32, relative to the largest gradient: that of a last bias is 0 but for rounding."""
    largest = max(tensor.abs().max().item() for tensor in want)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6 * largest)


# ---- the host -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["1100KiB", pytest.param("1MiB", marks=pytest.mark.full)])
def test_what_does_not_fit_waits_on_the_host(host, budget):
    """These budgets hold the loss's stage, but not cached gradients beside a chunk's graph."""
    encoders, values = [encoder(n, 192, 2, 64) for n in range(2)], (batch(2), batch(3))
    plan = plan_step(encoders, values, "clip", budget, device="cuda")
    assert {"inputs", "gradients"} <= set(plan.offload)
    measured = peak_of(plan, encoders, values, offload=plan.offload, device="cuda")
    assert measured <= plan.budget_bytes
    assert abs(plan.peak_bytes / measured - 1) <= 0.1
    assert plan.host_bytes >= 2 * SAMPLES * 64 * 4
    text = plan.explain()
    assert "waiting on the host: inputs, gradients" in text
    assert f"{plan.max_batch:,}" in text


def test_nothing_waits_where_all_of_it_fits(host):
    encoders, values = [encoder(n, 32, 1) for n in range(2)], (batch(2), batch(3))
    plan = plan_step(encoders, values, compile_loss("auto", "600KiB"), "64MiB", device="cuda")
    assert plan.offload == ()
    assert "nothing waits on the host" in plan.explain()
    measured = peak_of(plan, encoders, values, device="cuda")  # its inputs are on the device, whole
    assert abs(plan.peak_bytes / measured - 1) <= 0.1


def test_a_budget_of_the_host_is_kept(host):
    encoders, values = [encoder(n, 192, 2, 64) for n in range(2)], (batch(2), batch(3))
    budget = {"device": "1MiB", "host": "100KiB"}
    with pytest.raises(BudgetError, match="would wait on the host, and its budget is"):
        plan_step(encoders, values, "clip", budget, device="cuda")


def test_copies_that_no_encoder_hides_cost_time():
    values = (batch(2), batch(3))
    plan = plan_step([encoder(0, 32, 1)] * 2, values, compile_loss("auto", "600KiB"), "64MiB")
    assert plan.copy_seconds == 0
    assert "one memory: nothing is copied" in plan.explain()


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.full
def test_a_loss_gets_what_the_embeddings_leave():
    encoders, values = [encoder(n, 48, 2) for n in range(2)], (batch(2), batch(3))
    peaks = []
    for loss, budget in (("clip", "1MiB"), (clip, "2MiB")):
        plan = plan_step(encoders, values, loss, budget)
        embeddings = sum(e.embedding_bytes for e in plan.encoders)
        left = plan.budget_bytes - embeddings
        assert 15 / 16 * left <= plan.loss.limit_bytes <= left
        assert plan.loss.peak_bytes <= plan.loss.limit_bytes
        assert step_peak(encoders, values, plan.loss_fn, plan.chunk_sizes, logit_scale=3.0) <= (
            plan.budget_bytes
        )
        peaks.append(plan.loss.peak_bytes)
    assert peaks[0] < peaks[1]  # more room, larger tiles


def test_a_compiled_loss_keeps_to_the_smaller_of_two_budgets():
    encoders, values = [encoder(n, 48, 2) for n in range(2)], (batch(2), batch(3))
    small, large = compile_loss("auto", "400KiB"), compile_loss("auto", "1GiB")
    assert plan_step(encoders, values, small, "2MiB").loss_fn is small
    plan = plan_step(encoders, values, large, "2MiB")
    assert plan.loss.peak_bytes <= plan.loss.limit_bytes < 2 << 20
    assert large.variants == ()  # it was not called
    left = plan.loss_fn(*(v.requires_grad_() for v in values), logit_scale=2.0)
    torch.testing.assert_close(left, large(*values, logit_scale=2.0))


def test_a_named_loss_in_a_planned_step():
    a, b = encoder(0, 48, 2), encoder(1, 48, 2)
    x, y = batch(2), batch(3)
    compile_loss("auto", "1GiB", loss="infonce")(a(x), b(y), logit_scale=2.0).backward()
    want = gradients(a, b)
    step = GradientCache([a, b], "infonce", chunk_sizes="auto", memory_budget="1MiB")
    step(x, y, logit_scale=2.0)
    assert_close(gradients(a, b), want)
    with pytest.raises(ArgumentError, match="compiled for what a memory"):
        GradientCache([a, b], "infonce", chunk_sizes=4)
    with pytest.raises(BudgetError, match=r"beside .* of embeddings and inputs the loss has"):
        plan_step([a, b], (x, y), "infonce", "130KiB")


# ---- the unit -----------------------------------------------------------------------------------


class Reader(nn.Module):
    """Lists of token numbers → [n, 12]; pads each chunk to its longest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(50, 64), encoder(1, 64, 2)
        self.inside = nn.Linear(12, 64)
        self.most = 0

    def forward(self, texts):
        self.most = max(self.most, len(texts) * max(map(len, texts)))
        padded = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in texts], batch_first=True)
        hidden = torch.tanh(self.words(padded))
        mask = (padded > 0)[..., None]
        return self.out((hidden * mask).sum(1)[:, :12])


def test_chunks_of_tokens_are_planned_for_the_costliest():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 30, (128,), generator=generator).tolist()
    texts = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
    reader, b, y = Reader(), encoder(2, 48, 2), batch(3, 128)
    loss_fn = compile_loss("auto", "300KiB")
    units = [Tokens("auto"), "auto"]
    plan = plan_step([reader, b], (texts, y), loss_fn, "500KiB", chunk_sizes=units)
    size = plan.chunk_sizes[0]
    assert isinstance(size, Tokens) and size.per_chunk >= max(lengths)
    assert f"chunks of {size.per_chunk} tokens" in plan.explain()
    reader.most = 0
    measured = step_peak([reader, b], (texts, y), loss_fn, plan.chunk_sizes, logit_scale=2.0)
    assert measured <= plan.budget_bytes
    assert abs(plan.peak_bytes / measured - 1) <= 0.1
    assert reader.most <= size.per_chunk
    step = GradientCache([reader, b], loss_fn, chunk_sizes=units, memory_budget="500KiB")
    step(texts, y, logit_scale=2.0)
    assert isinstance(step.chunk_sizes[0], Tokens)


@pytest.mark.parametrize("sizes", [["auto", 4], [Tokens("auto"), Tokens(4)]])
def test_all_encoders_are_planned_or_none(sizes):
    with pytest.raises(ArgumentError, match="plan all of them"):
        GradientCache([tower(0), tower(1)], contrast, chunk_sizes=sizes, memory_budget="1MiB")
    with pytest.raises(ArgumentError, match="a plan finds them"):
        plan_step([tower(0)], (batch(2),), contrast, "1MiB", chunk_sizes=4)


def test_a_stream_is_planned_by_its_first_part():
    a, b, x, y = tower(0).float(), tower(1).float(), batch(2)[:, :6], batch(3)[:, :6]
    loss_fn = compile_loss("auto", "300KiB")
    compile_loss("auto", "1GiB")(a(x), b(y), logit_scale=1.0).backward()
    want = gradients(a, b)
    step = GradientCache([a, b], loss_fn, chunk_sizes="auto", memory_budget="1MiB")
    step(Stream(x.split(100), SAMPLES), y, logit_scale=1.0)
    assert step.plan.samples == SAMPLES
    assert step.chunk_sizes[0] <= 100
    assert_close(gradients(a, b), want)
