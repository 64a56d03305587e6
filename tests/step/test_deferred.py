"""The decorator pair: chunks encoded by hand, one loss, and backwards in any order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_compiler.errors import ArgumentError
from cl_compiler.step import deferred, joined
from tests.step.encoders import WatchesBackward, assert_same, batch, contrast, gradients, tower


@deferred
def encode(model, value, *, factor=1.0):
    return factor * model(value)


contrast_chunks = joined(contrast)
PARTS = [batch(n, 2 + n) for n in range(3)]
OTHERS = [batch(n + 10, 2 + n) for n in range(3)]


def towers() -> tuple[nn.Module, nn.Module]:
    return tower(0, nn.Dropout(0.4)), tower(1, nn.BatchNorm1d(8), nn.Dropout(0.2))


def test_gradients_are_those_of_one_graph():
    """Dropout is replayed in whatever order the backwards come; running statistics count once."""
    (a, b), (same_a, same_b) = towers(), towers()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    xs = [2.0 * same_a(part) for part in PARTS]
    ys = [same_b(part) for part in OTHERS]
    plain = contrast(torch.cat(xs), torch.cat(ys), logit_scale=scale)
    plain.backward()
    drawn_after, want_scale, scale.grad = torch.rand(3), scale.grad, None

    torch.manual_seed(5)
    xs = [encode(a, part, factor=2.0) for part in PARTS]
    ys = [encode(b, part) for part in OTHERS]
    value = contrast_chunks(xs, y=ys, logit_scale=scale)
    value.backward()
    for chunk in (*reversed(ys), *xs):
        chunk.backward()
    torch.testing.assert_close(value, plain)
    assert torch.equal(torch.rand(3), drawn_after)
    assert_same([*gradients(a, b), scale.grad], [*gradients(same_a, same_b), want_scale])
    assert_same(list(b[2].buffers())[:2], list(same_b[2].buffers())[:2])
    assert b[2].num_batches_tracked == 3


def test_two_steps_in_flight_share_nothing():
    """Pain 5."""
    (a, b), (same_a, same_b) = towers(), towers()
    torch.manual_seed(5)
    values = [contrast(same_a(u), same_b(v)) for u, v in zip(PARTS, OTHERS, strict=True)]
    for value in reversed(values):
        value.backward()
    torch.manual_seed(5)
    steps = [(encode(a, u), encode(b, v)) for u, v in zip(PARTS, OTHERS, strict=True)]
    for pair in reversed(steps):
        contrast_chunks(*pair).backward()
        for chunk in pair:
            chunk.backward()
    assert_same(gradients(a, b), gradients(same_a, same_b))


def test_autocast_of_the_forward_holds_for_its_repetition():
    watch = WatchesBackward()
    a = tower(0, watch, dtype=torch.float32)
    seen = []
    a.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        chunk = encode(a, batch(0).float())
        chunk.embedding.float().square().mean().backward()
    chunk.backward()
    assert seen == [torch.bfloat16] * 2
    with torch.autocast("cpu", torch.bfloat16):
        a(batch(0).float()).float().square().mean().backward(inputs=[a[0].weight])
    assert a[0].weight.grad is not None
    once = gradients(a)[0] / 2  # one from the chunk, one from the plain step
    chunk = encode(a, batch(0).float())
    chunk.embedding.square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        chunk.backward()
    assert seen[-2:] == [torch.float32] * 2
    assert watch.autocast == [False, True, False]  # the middle one is the plain step's, inside
    torch.testing.assert_close(gradients(a)[0], once, rtol=0, atol=3e-2 * once.abs().max().item())


def test_a_frozen_encoder_runs_once():
    a, b = tower(0).requires_grad_(False), tower(1)
    calls = []
    a.register_forward_hook(lambda *_: calls.append(1))
    x, y = encode(a, batch(2)), encode(b, batch(3))
    contrast_chunks(x, y).backward()
    assert x.embedding.grad is None
    x.backward()
    y.backward()
    assert len(calls) == 1
    got = gradients(b)
    contrast(a(batch(2)), b(batch(3))).backward()
    assert_same(got, gradients(b))


def test_a_failed_repetition_restores_and_can_be_done_again():
    a = tower(0, nn.Dropout(0.4), nn.BatchNorm1d(8))
    torch.manual_seed(5)
    chunk = encode(a, batch(2))
    chunk.embedding.square().mean().backward()
    state, buffers = torch.get_rng_state(), [t.clone() for t in a.buffers()]

    def fail(*_):
        raise RuntimeError("broken")

    hook = a[4].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        chunk.backward()
    hook.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, u) for t, u in zip(a.buffers(), buffers, strict=True))
    chunk.backward()
    got = gradients(a)
    torch.manual_seed(5)
    a(batch(2)).square().mean().backward()
    assert_same(got, gradients(a))


def test_mistakes_are_named():
    a = tower(0)
    chunk = encode(a, batch(2))
    with pytest.raises(ArgumentError, match="run the loss on it"):
        chunk.backward()
    chunk.embedding.mean().backward()
    chunk.backward()
    with pytest.raises(ArgumentError, match="backward ran twice"):
        chunk.backward()
    with pytest.raises(ArgumentError, match="returned dict: it must return the embeddings"):
        deferred(lambda model, value: {"pooled": model(value)})(a, batch(2))
