"""The second pass does again what the first did: random numbers, buffers, types, checkpoints."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cl_compiler import GradientCache
from cl_compiler.step import Rows
from tests.step.encoders import (
    WatchesBackward,
    assert_same,
    batch,
    chunked,
    contrast,
    gradients,
    tower,
)

SIZE = 4


class Recorder(nn.Module):
    """Keeps what passed, in the order of the passes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, value):
        self.seen.append(value.detach().clone())
        return value


class Jitter(nn.Module):
    """Draws from the generators of Python and NumPy."""

    def forward(self, value):
        return value * (1 + random.random() / 8) + np.random.standard_normal() / 8


@pytest.mark.parametrize("noise", [lambda: nn.Dropout(0.4), Jitter])
def test_randomness_is_replayed_bitwise_and_goes_on_as_if_drawn_once(noise):
    a, b = tower(0, noise(), Recorder()), tower(1, noise())
    x, y = batch(2), batch(3)

    def seed() -> None:
        torch.manual_seed(5), random.seed(6), np.random.seed(7)

    seed()
    contrast(chunked(a, x, SIZE), chunked(b, y, SIZE)).backward()
    want, drawn_after = gradients(a, b), (torch.rand(3), random.random(), np.random.rand())
    a[3].seen.clear()

    seed()
    GradientCache([a, b], contrast, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a, b), want)
    first, second = a[3].seen[:4], a[3].seen[4:]
    assert len(second) == 4
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    got = (torch.rand(3), random.random(), np.random.rand())
    assert torch.equal(got[0], drawn_after[0]) and got[1:] == drawn_after[1:]


def test_a_loss_that_draws_random_numbers_does_not_disturb_the_encoders():
    a, b = tower(0, nn.Dropout(0.4)), tower(1)
    x, y = batch(2), batch(3)

    def noisy(x, y):
        return contrast(x + torch.rand_like(x), y)

    torch.manual_seed(5)
    noisy(chunked(a, x, SIZE), b(y)).backward()
    want, drawn_after = gradients(a, b), torch.rand(3)
    torch.manual_seed(5)
    GradientCache([a, b], noisy, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a, b), want)
    assert torch.equal(torch.rand(3), drawn_after)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_has_the_statistics_of_chunks_and_counts_once(momentum):
    def norm() -> nn.Module:
        return nn.BatchNorm1d(8, momentum=momentum)

    a, b = tower(0, norm()), tower(1, norm()).requires_grad_(False)
    same_a, same_b = tower(0, norm()), tower(1, norm()).requires_grad_(False)
    x, y = batch(2, 12), batch(3, 12)
    contrast(chunked(same_a, x, SIZE), chunked(same_b, y, SIZE)).backward()
    GradientCache([a, b], contrast, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a), gradients(same_a))
    for got, want in ((a, same_a), (b, same_b)):
        assert got[2].num_batches_tracked == 3
        assert_same(list(got[2].buffers())[:2], list(want[2].buffers())[:2])


class Drift(nn.Module):
    """A buffer that moves with what it sees and changes what comes out, as a codebook does."""

    def __init__(self, *, replaces: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.replaces = replaces

    def forward(self, value):
        moved = self.mean + value.detach().mean(0)
        if self.replaces:
            self.mean = moved
        else:
            self.mean.copy_(moved)
        return value - self.mean


@pytest.mark.parametrize("replaces", [False, True])
def test_buffers_that_change_the_output_are_replayed(replaces):
    a, same, b = tower(0, Drift(replaces=replaces)), tower(0, Drift(replaces=replaces)), tower(1)
    x, y = batch(2), batch(3)
    contrast(chunked(same, x, SIZE), b(y)).backward()
    want = gradients(same, b)
    GradientCache([a, b], contrast, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a, b), want)
    assert_same([a[2].mean], [same[2].mean])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_encoders(reentrant):
    """Pains 4 and 5."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(6, 6).double(), tower(0, nn.Dropout(0.4))

        def forward(self, value):
            return checkpoint(self.inner, self.first(value), use_reentrant=reentrant)

    a, b, x, y = Checkpointed(), tower(1), batch(2), batch(3)
    torch.manual_seed(5)
    contrast(chunked(a, x, SIZE), b(y)).backward()
    want, drawn_after = gradients(a, b), torch.rand(3)
    torch.manual_seed(5)
    GradientCache([a, b], contrast, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a, b), want)
    assert torch.equal(torch.rand(3), drawn_after)


@pytest.mark.parametrize("cached_casts", [True, False])
def test_outer_autocast(cached_casts):
    """Pain 5.  Encoders run in bfloat16 in both passes, and every weight gets its gradient.

    It may be off from float64's by half as much again as that of the plain step is, and from the
    plain step's by 1e-2.
    """
    watch = WatchesBackward()
    a, b = (tower(n, watch, dtype=torch.float32) for n in range(2))
    x, y = (batch(n, dtype=torch.float32) for n in (2, 3))
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=cached_casts)
    kinds = []

    def loss_fn(x, y):
        kinds.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return contrast(x.float(), y.float())

    with autocast:
        plain = loss_fn(chunked(a, x, SIZE), chunked(b, y, SIZE))
    plain.backward()
    plainly = gradients(a, b)
    with autocast:
        value = GradientCache([a, b], loss_fn, chunk_sizes=SIZE)(x, y)
        assert torch.is_autocast_enabled("cpu")
    assert kinds == [(torch.bfloat16, True)] * 2
    assert torch.equal(value, plain.detach())
    assert watch.autocast == [False] * 16
    cached = gradients(a, b)
    contrast(a.double()(x.double()), b.double()(y.double())).backward()
    exact = torch.cat([g.flatten() for g in gradients(a, b)])
    errors = [
        (torch.cat([g.flatten() for g in found]) - exact).norm() / exact.norm()
        for found in (plainly, cached)
    ]
    assert 0 < errors[1] <= 1.5 * errors[0]
    apart = torch.cat([(c - p).flatten() for c, p in zip(cached, plainly, strict=True)]).norm()
    assert apart <= 1e-2 * torch.cat([p.flatten() for p in plainly]).norm()
    assert all(g.abs().max() > 0 for g in cached)


def test_the_scaler_multiplies_gradients_and_not_the_value():
    a, b, x, y = tower(0), tower(1), batch(2), batch(3)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    plain = contrast(a(x), b(y), scale)
    plain.backward()
    want, scale.grad = [*gradients(a, b), scale.grad], None
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step = GradientCache([a, b], contrast, chunk_sizes=SIZE, scaler=scaler)
    value = step(x, y, logit_scale=scale)
    torch.testing.assert_close(value, plain.detach())
    assert_same([*gradients(a, b), scale.grad], [64.0 * w for w in want])


def test_a_scaler_updates_the_weights_as_without_caching():
    weights = []
    for cached in (False, True):
        a, b, x, y = tower(0), tower(1), batch(2), batch(3)
        optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        if cached:
            GradientCache([a, b], contrast, chunk_sizes=SIZE, scaler=scaler)(x, y)
        else:
            scaler.scale(contrast(a(x), b(y))).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append([p.detach() for p in (*a.parameters(), *b.parameters())])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-13, atol=0)


def test_accumulation_over_steps():
    """Pain 5."""
    a, b = tower(0), tower(1)
    batches = [(batch(2 * n), batch(2 * n + 1)) for n in range(3)]
    for x, y in batches:
        (contrast(a(x), b(y)) / 3).backward()
    want = gradients(a, b)
    step = GradientCache([a, b], lambda x, y: contrast(x, y) / 3, chunk_sizes=SIZE)
    for x, y in batches:
        step(x, y)
    assert_same(gradients(a, b), want)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_encoders_use_one_graph(in_place):
    """Pain 8.  One compilation serves both passes, so that both draw the same random numbers."""
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(torch.is_grad_enabled())
        return graph.forward

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tower(0, nn.Dropout(0.4))

        def forward(self, value):
            return self.inner(value)

    plain, b, x, y = Encoder(), tower(1), batch(2, 12), batch(3, 12)
    torch.manual_seed(5)
    contrast(chunked(plain, x, SIZE), b(y)).backward()
    want = gradients(plain, b)
    a = Encoder()
    if in_place:
        a.compile(backend=backend)
    else:
        a = torch.compile(a, backend=backend)
    torch.manual_seed(5)
    GradientCache([a, b], contrast, chunk_sizes=SIZE)(x, y)
    assert compiled_graphs == [True]
    assert_same(gradients(a, b), want)


def test_a_step_inside_the_loss_of_another():
    """Two steps in flight share nothing, even of the same object."""
    a, b = tower(0, nn.Dropout(0.4)), tower(1, nn.Dropout(0.4))
    x, y, u, v = (batch(n) for n in range(2, 6))
    inner = GradientCache([a, b], contrast, chunk_sizes=3)

    def loss_fn(x, y):
        inner(u, v)
        return contrast(x, y)

    torch.manual_seed(5)
    reps = chunked(a, x, SIZE), chunked(b, y, SIZE)
    contrast(chunked(a, u, 3), chunked(b, v, 3)).backward()
    contrast(*reps).backward()
    want, drawn_after = gradients(a, b), torch.rand(3)
    torch.manual_seed(5)
    GradientCache([a, b], loss_fn, chunk_sizes=SIZE)(x, y)
    assert_same(gradients(a, b), want)
    assert torch.equal(torch.rand(3), drawn_after)


def test_progress_counts_samples_of_both_passes():
    a, b = tower(0), tower(1).requires_grad_(False)
    seen = []
    step = GradientCache([a, b], contrast, chunk_sizes=6, progress=lambda *told: seen.append(told))
    step(batch(2, 12), batch(3, 12))
    assert seen == [
        *(("encode", done, 24) for done in (6, 12, 18, 24)),
        ("backpropagate", 6, 12),
        ("backpropagate", 12, 12),
    ]
    GradientCache([a, b], contrast, chunk_sizes=6, progress=True)(batch(2, 12), batch(3, 12))


class OnDisk(Sequence):
    """Samples that are read when a slice is taken; counts what it hands out at once, and in all."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.most, self.read = values, 0, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key):
        found = list(self.values[key].clone())
        self.most, self.read = max(self.most, len(found)), self.read + len(found)
        return found


def test_a_batch_that_is_read_chunk_by_chunk():
    """Twice where it trains, and never more than a chunk at once."""
    a, b, x, y = tower(0, nn.Dropout(0.3)), tower(1), batch(2), batch(3)

    def call(encoder, chunk):
        return encoder(torch.stack(chunk))

    def run(first, second, **options):
        torch.manual_seed(1)
        GradientCache([a, b], contrast, chunk_sizes=4, **options)(first, second)
        return gradients(a, b)

    want = run(x, y)
    disks = OnDisk(x), OnDisk(y)
    assert_same(run(*map(Rows, disks), call=call), want)
    assert [(disk.most, disk.read) for disk in disks] == [(4, 2 * len(x))] * 2
