"""What waits on the host comes back as it was, and leaves the device's memory meanwhile."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cl_compiler import GradientCache, compile_loss
from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.step import Stream, Tokens
from cl_compiler.step.offload import PARTS, ahead
from tests.step.encoders import SAMPLES, assert_same, batch, contrast, gradients, tower
from tests.step.host import NumpyHost

SUBSETS = [*chain.from_iterable(combinations(PARTS, n) for n in range(4))]


@pytest.fixture
def host(monkeypatch) -> NumpyHost:
    """Instead of the way to a GPU."""
    link = NumpyHost()
    monkeypatch.setattr("cl_compiler.step.grad_cache.link_to", lambda _: link)
    return link


class Named(nn.Module):
    """Takes a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tower(0, nn.Dropout(0.4))

    def forward(self, values, factor):
        return factor * self.inner(values)


@pytest.mark.parametrize("offload", SUBSETS, ids="+".join)
def test_a_step_is_the_same_bit_by_bit_wherever_its_parts_wait(monkeypatch, offload):
    a, b = Named(), tower(1, nn.Dropout(0.4))
    scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    inputs = {"values": batch(2), "factor": 0.5}, batch(3)

    def run(**options):
        torch.manual_seed(5)
        step = GradientCache([a, b], contrast, chunk_sizes=[4, 3], **options)
        value = step(*inputs, logit_scale=scale.exp())
        found, scale.grad = [value, scale.grad, torch.rand(3), *gradients(a, b)], None
        return found

    want = run()
    monkeypatch.setattr("cl_compiler.step.grad_cache.link_to", lambda _: NumpyHost())
    found = run(offload=offload, device="cuda")
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))


@pytest.mark.parametrize("offload", [(), PARTS], ids=["stays", "waits on the host"])
def test_frozen_towers_inputs_that_train_and_evaluation(host, offload):
    a, b = tower(0).requires_grad_(False), tower(1)
    x, y = batch(2).requires_grad_(), batch(3)
    plain = contrast(a(x), b(y))
    plain.backward()
    want, x.grad = [x.grad, *gradients(b)], None
    step = GradientCache([a, b], contrast, chunk_sizes=4, offload=offload, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(step(x, y), plain.detach())
    step(x, y)
    assert_same([x.grad, *gradients(b)], want)


def test_the_next_chunk_is_on_its_way_while_one_is_encoded(host):
    class Noting(nn.Module):
        def forward(self, value):
            host.log.append(f"encode {len(value)}")
            return value

    step = GradientCache(
        [Noting()], lambda x: x.sum(), chunk_sizes=5, offload=["inputs"], device="cuda"
    )
    with torch.no_grad():
        step(batch(2))
    assert host.log == ["copy 5", "copy 5", "encode 5", "copy 3", "encode 5", "encode 3"]


def test_nothing_is_begun_more_than_one_step_ahead():
    begun = []
    waiting = ahead(range(4), lambda n: begun.append(n) or n)
    assert [(n, list(begun)) for n in waiting] == [
        (0, [0, 1]),
        (1, [0, 1, 2]),
        (2, [0, 1, 2, 3]),
        (3, [0, 1, 2, 3]),
    ]


ROWS, WIDTH, DIM = 512, 6, 32


def wide(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, DIM))


def stage_peaks(offload) -> dict[str, int]:
    """Live bytes on the "device", from a loss that notes them when it begins and ends."""
    encoders, values = [wide(0), wide(1)], [torch.randn(ROWS, WIDTH) for _ in range(2)]
    for encoder in encoders:
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
    peaks = {}

    def loss_fn(x, y):
        peaks["encode"], live.peak_bytes = live.peak_bytes, live.live_bytes
        value = (x * y).sum()
        return value

    step = GradientCache(encoders, loss_fn, chunk_sizes=16, offload=offload, device="cuda")
    progress = []

    def note(stage: str, done: int, _: int) -> None:
        if stage == "backpropagate":
            progress.append(live.live_bytes)

    step.progress = note
    with LiveBytes() as live:
        step(*values)
    peaks["backpropagate"] = max(progress)
    return peaks


def test_what_waits_on_the_host_is_not_on_the_device(host):
    """Embeddings of both towers, ROWS * DIM * 4 bytes each, and as much of gradients."""
    one = ROWS * DIM * 4
    resident, waiting = stage_peaks(()), stage_peaks(PARTS)
    # When the loss begins all embeddings are on the device, wherever they waited.
    assert resident["encode"] >= 2 * one + 2 * ROWS * WIDTH * 4
    # Between chunks of the second pass: the gradients and inputs, or a few chunks of both.
    chunk = 16 * (DIM + WIDTH) * 4
    assert resident["backpropagate"] >= 2 * one + 2 * ROWS * WIDTH * 4
    assert waiting["backpropagate"] <= 4 * chunk + 1024
    only = stage_peaks(("gradients",))
    assert only["backpropagate"] <= 2 * ROWS * WIDTH * 4 + 4 * chunk + 1024


def test_a_compiled_loss_and_tokens(host):
    a, b, x, y = tower(0), tower(1), batch(2), batch(3)
    loss_fn = compile_loss("auto", "4MiB")
    loss_fn(a(x), b(y), logit_scale=2.0).backward()
    want = gradients(a, b)
    step = GradientCache([a, b], loss_fn, chunk_sizes=[Tokens(20), 4], offload=PARTS, device="cuda")
    step(x, y, logit_scale=2.0)
    assert_same(gradients(a, b), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": ["weights"], "chunk_sizes": 4}, "inputs, gradients, embeddings"),
        ({"offload": PARTS, "chunk_sizes": "auto", "memory_budget": "1GiB"}, "planner decides"),
    ],
)
def test_offload_that_does_not_fit(options, message):
    with pytest.raises(ArgumentError, match=message):
        GradientCache([tower(0)], contrast, **options)


# ---- batches that come in parts -----------------------------------------------------------------


class Parts:
    """Makes a new iterator each time, and counts them; shapes may change from one to the next."""

    def __init__(self, *readings) -> None:
        self.readings, self.count = readings, 0

    def __iter__(self):
        self.count += 1
        yield from self.readings[min(self.count, len(self.readings)) - 1]


@pytest.mark.parametrize("offload", [(), PARTS], ids=["stays", "waits on the host"])
def test_a_stream_is_read_twice_and_cut_where_its_parts_end(host, offload):
    a, b, x, y = tower(0, nn.Dropout(0.4)), tower(1), batch(2), batch(3)
    parts = Parts(x.split([5, 7, 1]))
    pieces = [part for whole in x.split([5, 7, 1]) for part in whole.split(3)]
    torch.manual_seed(5)
    contrast(torch.cat([a(piece) for piece in pieces]), b(y)).backward()
    want, drawn_after = gradients(a, b), torch.rand(3)
    torch.manual_seed(5)
    step = GradientCache([a, b], contrast, chunk_sizes=3, offload=offload, device="cuda")
    step(Stream(parts, SAMPLES), y)
    assert parts.count == 2
    assert_same(gradients(a, b), want)
    assert torch.equal(torch.rand(3), drawn_after)


def test_a_data_loader_draws_its_seed_from_the_generator_that_encoders_use():
    a, b, x, y = tower(0, nn.Dropout(0.4)), tower(1), batch(2), batch(3)
    loader = DataLoader(list(zip(x, range(SAMPLES), strict=True)), batch_size=5)

    def call(encoder, chunk):
        return encoder(chunk[0] if isinstance(chunk, list) else chunk)

    torch.manual_seed(5)
    parts = [part for part, _ in loader]
    contrast(torch.cat([a(part) for part in parts]), b(y)).backward()
    want, drawn_after = gradients(a, b), torch.rand(3)
    torch.manual_seed(5)
    GradientCache([a, b], contrast, chunk_sizes=100, call=call)(Stream(loader, SAMPLES), y)
    assert_same(gradients(a, b), want)
    assert torch.equal(torch.rand(3), drawn_after)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (lambda x: Stream(Parts(x.split(5)), 12), "12 samples, and its parts have 13 or more"),
        (lambda x: Stream(Parts(x.split(5)), 14), "14 samples, and its parts have 13:"),
        (lambda x: Stream(Parts(x.split(5), x.split(6)), 13), "the same ones each time"),
        (lambda x: Stream(iter(x.split(5)), 13), "used up after once"),
        (lambda x: Stream(x.split(5), 0), "at least one sample"),
    ],
)
def test_streams_that_cannot_be(stream, message):
    a, b = tower(0), tower(1)
    with pytest.raises(ArgumentError, match=message):
        GradientCache([a, b], contrast, chunk_sizes=5)(stream(batch(2)), batch(3))
    assert gradients(a, b) == [None] * 8
