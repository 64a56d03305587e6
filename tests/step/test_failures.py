"""An error in any stage leaves nothing behind, and says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_compiler import GradientCache
from cl_compiler.errors import ArgumentError
from cl_compiler.step import Tokens
from tests.step.encoders import assert_same, batch, contrast, gradients, tower


class FailsAt(nn.Module):
    """Raises at its n-th call; counts from zero."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def forward(self, value):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt("in the middle")
        return value


@pytest.mark.parametrize("call", [0, 3, 4, 6], ids=["first", "last", "second pass", "later"])
def test_an_interrupt_leaves_generators_buffers_and_gradients_as_they_were(call):
    a = tower(0, nn.Dropout(0.4), nn.BatchNorm1d(8), FailsAt(call))
    b, scale = tower(1, nn.Dropout(0.4)), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, y = batch(2, 14), batch(3, 14)
    torch.manual_seed(5)
    torch.rand(3)
    state, buffers = torch.get_rng_state(), [t.clone() for t in a.buffers()]
    step = GradientCache([a, b], contrast, chunk_sizes=4)

    with pytest.raises(KeyboardInterrupt):
        step(x, y, logit_scale=scale.exp())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, u) for t, u in zip(a.buffers(), buffers, strict=True))
    assert scale.grad is None
    assert set(gradients(a, b)) == {None}

    step(x, y, logit_scale=scale.exp())  # the same step again is as if nothing had been
    got = [*gradients(a, b), scale.grad, *a.buffers()]
    fresh, same = tower(0, nn.Dropout(0.4), nn.BatchNorm1d(8)), tower(1, nn.Dropout(0.4))
    scale.grad = None
    torch.set_rng_state(state)
    GradientCache([fresh, same], contrast, chunk_sizes=4)(x, y, logit_scale=scale.exp())
    assert_same(got, [*gradients(fresh, same), scale.grad, *fresh.buffers()])


def test_gradients_that_were_there_are_announced_as_touched():
    a, b = tower(0, FailsAt(6)), tower(1)
    step = GradientCache([a, b], contrast, chunk_sizes=4)
    a[0].weight.grad = torch.ones_like(a[0].weight)
    with pytest.raises(KeyboardInterrupt) as caught:
        step(batch(2, 14), batch(3, 14))
    assert "a part of its sum" in caught.value.__notes__[0]
    assert a[0].bias.grad is None


def test_an_error_in_the_loss():
    def broken(x, y):
        torch.rand(3)
        raise RuntimeError("broken")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        GradientCache([tower(0), tower(1)], broken, chunk_sizes=4)(batch(2), batch(3))
    assert torch.equal(torch.get_rng_state(), state)


def grows() -> nn.Module:
    class Grows(nn.Module):
        def forward(self, value):
            return value if torch.is_grad_enabled() else value[:, :3]

    return nn.Sequential(tower(0), Grows())


class Many(nn.Module):
    def forward(self, value):
        return {"hidden": value, "pooled": value.mean(1)}


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (lambda: nn.Sequential(tower(0), Many()), r"dict with hidden, pooled.*embedding="),
        (lambda: lambda value: value.mean(), r"shape \[\]"),
        (lambda: lambda value: value[:3], r"returned 3 rows for a chunk of 4 samples"),
        (lambda: lambda value: value[:, : len(value)], r"\[1, 1\].*chunks must agree"),
        (lambda: lambda value: value.long(), r"torch.int64, which have no gradient"),
        (grows, r"returned \[4, 5\] for a chunk that gave \[4, 3\] before"),
    ],
)
def test_what_an_encoder_returns(encoder, message):
    # Flatten(0) returns 20 rows for 4 samples, five per sample, which is allowed: the loss objects.
    step = GradientCache([encoder(), tower(1)], lambda x, y: x.mean() + y.mean(), chunk_sizes=4)
    if "20" in message:
        message, step.loss_fn = "loss function returned shape", lambda x, y: x
    with pytest.raises(ArgumentError, match=message):
        step(batch(2), batch(3))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda x, y: (x @ y.T).detach().mean(), "no graph although encoders train"),
        (lambda x, y: x @ y.T, r"returned shape \[13, 13\].*a scalar tensor"),
        (lambda x, y: {"value": x.mean()}, 'returned NoneType.*as "loss"'),
    ],
)
def test_what_a_loss_returns(loss_fn, message):
    with pytest.raises(ArgumentError, match=message):
        GradientCache([tower(0), tower(1)], loss_fn, chunk_sizes=4)(batch(2), batch(3))


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "auto", Tokens(0)])
def test_chunk_sizes(size):
    with pytest.raises(ArgumentError, match="chunk_sizes"):
        GradientCache([tower(0)], contrast, chunk_sizes=size)


def test_counts_of_arguments():
    with pytest.raises(ArgumentError, match="chunk_sizes has 3 entries for 2 encoders"):
        GradientCache([tower(0), tower(1)], contrast, chunk_sizes=[1, 2, 3])
    with pytest.raises(ArgumentError, match="1 input for 2 encoders"):
        GradientCache([tower(0), tower(1)], contrast, chunk_sizes=4)(batch(2))
    with pytest.raises(ArgumentError, match="no encoders"):
        GradientCache([], contrast, chunk_sizes=4)
    with pytest.raises(ArgumentError, match=r"a single Sequential.*\[model, model\]"):
        GradientCache(tower(0), contrast, chunk_sizes=4)


def test_an_input_with_a_history():
    value = batch(2).requires_grad_() * 2
    with pytest.raises(ArgumentError, match=r"input of encoder 0 \(Sequential\).*detach"):
        GradientCache([tower(0), tower(1)], contrast, chunk_sizes=4)(value, batch(3))
