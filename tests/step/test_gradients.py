"""A cached step leaves the gradients of the plain one, whatever goes in and comes out."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from torch import nn

from cl_compiler import GradientCache, compile_loss
from cl_compiler.step import Tokens, Whole
from cl_compiler.step.modules import modules_of
from tests.step.encoders import SAMPLES, assert_same, batch, contrast, gradients, tower


@pytest.mark.parametrize("sizes", [1, 4, SAMPLES, 100, [3, 5], Tokens(14), [2, Tokens(30)]])
def test_two_towers_and_a_learned_scale(sizes):
    a, b, log_scale = tower(0), tower(1), nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    x, y = batch(2), batch(3)
    plain = contrast(a(x), b(y), log_scale.exp())
    plain.backward()
    want, want_scale, log_scale.grad = gradients(a, b), log_scale.grad, None

    value = GradientCache([a, b], contrast, chunk_sizes=sizes)(x, y, logit_scale=log_scale.exp())

    assert not value.requires_grad
    torch.testing.assert_close(value, plain.detach(), rtol=1e-13, atol=0)
    assert_same([*gradients(a, b), log_scale.grad], [*want, want_scale])


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_compiled_loss(loss):
    a, b = tower(0), tower(1)
    scalars = {"logit_scale": torch.tensor(2.0, dtype=torch.float64, requires_grad=True)}
    if loss == "siglip":
        scalars["logit_bias"] = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    x, y = batch(2), batch(3)
    loss_fn = compile_loss("auto", "4MiB", loss=loss)
    loss_fn(a(x), b(y), **scalars).backward()
    want = [*gradients(a, b), *(s.grad.clone() for s in scalars.values())]
    for scalar in scalars.values():
        scalar.grad = None
    GradientCache([a, b], loss_fn, chunk_sizes=4)(x, y, **scalars)
    assert_same([*gradients(a, b), *(s.grad for s in scalars.values())], want)


def test_one_encoder_for_one_set():
    a = tower(0)
    views = torch.cat([batch(1), batch(2)])
    loss_fn = compile_loss("auto", "4MiB", loss="nt_xent")
    loss_fn(a(views), logit_scale=3.0).backward()
    want = gradients(a)
    GradientCache([a], loss_fn, chunk_sizes=5)(views, logit_scale=3.0)
    assert_same(gradients(a), want)


def test_four_encoders_of_which_two_are_one():
    a, b, c = tower(0), tower(1), tower(2)
    values = [batch(n, SAMPLES + 3 * n) for n in range(4)]

    def loss_fn(w, x, y, z):
        rows = torch.cat([w, x, y, z])
        return torch.logsumexp(rows @ rows.T, 1).mean() - (w @ x[: len(w)].T).diagonal().mean()

    loss_fn(*(m(v) for m, v in zip([a, b, a, c], values, strict=True))).backward()
    want = gradients(a, b, c)
    GradientCache([a, b, a, c], loss_fn, chunk_sizes=[4, 100, 3, 1])(*values)
    assert_same(gradients(a, b, c), want)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_gradients_in_fp32_are_those_of_the_plain_step(count):
    """To 5e-6 of the largest, with one to four encoders and chunks that do not divide the batch."""
    encoders = [tower(n, dtype=torch.float32) for n in range(count)]
    values = [batch(n, dtype=torch.float32) for n in range(count)]

    def loss_fn(*found):
        rows = torch.cat(found)
        return torch.logsumexp(rows @ rows.T, 1).mean() - rows.square().mean()

    loss_fn(*(m(v) for m, v in zip(encoders, values, strict=True))).backward()
    want = gradients(*encoders)
    GradientCache(encoders, loss_fn, chunk_sizes=[4, 5, 1, 100][:count])(*values)
    largest = max(w.abs().max().item() for w in want)
    for one, other in zip(gradients(*encoders), want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-6 * largest)


class Counting(nn.Module):
    """Counts how often it runs, and whether its loss wanted its gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, value):
        self.calls += 1
        return self.inner(value)


@pytest.mark.parametrize("as_method", [False, True])
def test_a_frozen_tower_runs_once_and_its_gradient_is_not_computed(as_method):
    """Pain 5."""
    a, b = Counting(tower(0)), Counting(tower(1))
    b.requires_grad_(False)
    x, y = batch(2), batch(3)
    contrast(a(x), b(y)).backward()
    want = gradients(a)
    a.calls = b.calls = 0
    wanted = []

    def loss_fn(x, y):
        wanted.append((x.requires_grad, y.requires_grad))
        return contrast(x, y)

    GradientCache([a, b.forward if as_method else b], loss_fn, chunk_sizes=4)(x, y)
    assert (a.calls, b.calls) == (8, 4)
    assert wanted == [(True, False)]
    assert_same(gradients(a, b), [*want, None, None, None, None])


def test_a_function_that_turns_out_to_be_frozen_stops_at_its_second_chunk():
    a, b = tower(0), Counting(tower(1).requires_grad_(False))
    x, y = batch(2), batch(3)
    contrast(a(x), b(y)).backward()
    want = gradients(a)
    b.calls = 0
    GradientCache([a, lambda part: b(part)], contrast, chunk_sizes=4)(x, y)
    assert b.calls == 5
    assert_same(gradients(a), want)


def test_only_the_scale_trains():
    """Both towers are frozen: one pass each, and the loss's own gradient."""
    a, b = (Counting(tower(n).requires_grad_(False)) for n in range(2))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x, y = batch(2), batch(3)
    contrast(a(x), b(y), scale).backward()
    want, scale.grad, a.calls = scale.grad, None, 0
    GradientCache([a, b], contrast, chunk_sizes=4)(x, y, logit_scale=scale)
    assert a.calls == 4
    assert_same([scale.grad], [want])


def test_parameters_of_the_loss_get_their_gradient_once():
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, x, y):
            return contrast(x, y, self.log_scale.exp())

    a, b, loss_fn = tower(0), tower(1), Loss()
    x, y = batch(2), batch(3)
    loss_fn(a(x), b(y)).backward()
    want = gradients(a, b, loss_fn)
    GradientCache([a, b], loss_fn, chunk_sizes=4)(x, y)
    assert_same(gradients(a, b, loss_fn), want)


def test_an_input_that_trains():
    """A leaf, as in prompt tuning: it gets its gradient through a frozen encoder too."""
    a, b = tower(0).requires_grad_(False), tower(1)
    x, y = batch(2).requires_grad_(), batch(3)
    contrast(a(x), b(y)).backward()
    want, x.grad = [x.grad, *gradients(b)], None
    GradientCache([a, b], contrast, chunk_sizes=4)(x, y)
    assert_same([x.grad, *gradients(b)], want)


# -- structures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    tokens: torch.Tensor
    names: list[str]
    factor: float


Pair = namedtuple("Pair", "tokens factor")


class Encoding(UserDict):
    """As transformers' ``BatchEncoding``: a mapping, not a dict, with something besides."""

    def __init__(self, data, kind):
        super().__init__(data)
        self.kind = kind


class Flexible(nn.Module):
    """Takes its tokens in any of the structures, and a factor that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tower(0)

    def forward(self, tokens, factor=None, names=None):
        if isinstance(tokens, list):
            tokens = tokens[0]
        if factor is None:
            tokens, factor = tokens.tokens, tokens.factor
        assert names is None or len(names) == len(tokens)
        return {"pooled": factor * self.inner(tokens), "length": len(tokens)}


X, TEXTS = batch(2), [f"text {n}" for n in range(SAMPLES)]
STRUCTURES = {
    "dict": {"tokens": X, "factor": 0.5, "names": TEXTS},
    "encoding": Encoding({"tokens": X, "factor": 0.5}, "kind"),
    "read-only mapping": MappingProxyType({"tokens": X, "factor": 0.5}),
    "tuple": (X, 0.5, TEXTS),
    "whole": (X, Whole(torch.tensor([0.5], dtype=torch.float64)), TEXTS),
    "list inside": ([X], 0.5),
    "named tuple": Pair(X, 0.5),
    "dataclass": Record(X, TEXTS, 0.5),
    "array": {"tokens": X, "factor": torch.full((SAMPLES, 1), 0.5), "names": X.numpy()},
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_any_structure(name):
    a, b, y = Flexible(), tower(1), batch(3)
    contrast(a(X, 0.5)["pooled"], b(y)).backward()
    want = gradients(a, b)
    step = GradientCache(
        [a, b], contrast, chunk_sizes=4, embedding=[lambda output: output["pooled"], None]
    )
    step(STRUCTURES[name], y)
    assert_same(gradients(a, b), want)


def test_text_and_a_call_of_ones_own():
    """A list of strings is data; ``call`` decides how it reaches the encoder."""
    a, b, y = tower(0), tower(1), batch(3)
    rows = {text: row for text, row in zip(TEXTS, X, strict=True)}
    contrast(a(X), b(y)).backward()
    want = gradients(a, b)

    def call(encoder, chunk):
        return encoder(torch.stack([rows[t] for t in chunk]) if isinstance(chunk, list) else chunk)

    GradientCache([a, b], contrast, chunk_sizes=4, call=call)(TEXTS, y)
    assert_same(gradients(a, b), want)


def test_several_rows_per_sample():
    """An encoder of groups returns them one after another; the loss sees them as in one batch."""
    a, b = tower(0), tower(1)
    x, groups = batch(2), batch(3, 2 * SAMPLES).view(SAMPLES, 2, -1)

    def loss_fn(x, y):
        return contrast(x.repeat_interleave(2, 0), y)

    loss_fn(a(x), b(groups).flatten(0, 1)).backward()
    want = gradients(a, b)
    flat = [None, lambda output: output.flatten(0, 1)]
    GradientCache([a, b], loss_fn, chunk_sizes=4, embedding=flat)(x, groups)
    assert_same(gradients(a, b), want)


def test_what_the_loss_returns_comes_back_without_graphs():
    a, b, x, y = tower(0), tower(1), batch(2), batch(3)
    plain = contrast(a(x), b(y)).detach()

    def with_outputs(x, y):
        return contrast(x, y), {"cosines": (x * y).sum(1)}

    value, outputs = GradientCache([a, b], with_outputs, chunk_sizes=4)(x, y)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(outputs["cosines"], (a(x) * b(y)).sum(1).detach())
    assert not outputs["cosines"].requires_grad

    returned = GradientCache([a, b], lambda x, y: {"loss": contrast(x, y)}, chunk_sizes=4)(x, y)
    torch.testing.assert_close(returned["loss"], plain)


def test_without_gradients_it_evaluates():
    a, b, x, y = Counting(tower(0)), tower(1), batch(2), batch(3)
    with torch.no_grad():
        value = GradientCache([a, b], contrast, chunk_sizes=4)(x, y)
    assert a.calls == 4
    assert gradients(a, b) == [None] * 8
    torch.testing.assert_close(value, contrast(a(x), b(y)).detach())


def test_a_tower_that_the_loss_ignores_gets_no_gradient():
    a, b, x, y = tower(0), Counting(tower(1)), batch(2), batch(3)
    GradientCache([a, b], lambda x, y: x.square().mean(), chunk_sizes=4)(x, y)
    assert b.calls == 4
    assert gradients(b) == [None] * 4
    assert all(g is not None for g in gradients(a))


def test_modules_are_found_behind_functions_that_are_not_complete_yet():
    """A name that is bound later, and a long list of data, are no obstacle."""
    a, data, x, y = tower(0), [batch(2)] * 100, batch(2), batch(3)

    def encode(value):
        return finish(a(value)) + 0 * data[0].sum()

    before = modules_of(encode)

    def finish(value):
        return 2.0 * value

    assert (before, modules_of(encode)) == ((), (a,))
    contrast(encode(x), encode(y)).backward()
    want = gradients(a)
    GradientCache([encode, encode], contrast, chunk_sizes=4)(x, y)
    assert_same(gradients(a), want)
