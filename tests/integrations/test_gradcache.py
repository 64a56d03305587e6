"""GradCache's class and decorators: against plain steps, and against GradCache."""

from __future__ import annotations

import importlib
import sys
from collections import UserDict

import pytest
import torch
from torch import nn

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.gradcache import GradCache, cached, cat_input_tensor
from tests.step.encoders import SAMPLES, assert_same, batch, contrast, gradients, tower


def wanted(a, b, x, y, **given):
    value = contrast(a(x), b(y), **given)
    value.backward()
    return value.detach(), gradients(a, b)


@pytest.mark.parametrize("sizes", [4, [3, 5], SAMPLES])
def test_a_step_leaves_the_gradients_of_the_plain_one(sizes):
    a, b, x, y = tower(0), tower(1), batch(2), batch(3)
    value, want = wanted(a, b, x, y, logit_scale=2.0)
    step = GradCache(models=[a, b], chunk_sizes=sizes, loss_fn=contrast)
    found = step(x, y, logit_scale=2.0, no_sync_except_last=False)
    assert not found.requires_grad
    torch.testing.assert_close(found, value, rtol=1e-13, atol=0)
    assert_same(gradients(a, b), want)


class Keywords(nn.Module):
    """Takes its input by position or by name, and gives more than embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tower(0)

    def forward(self, tokens, factor):
        return {"reps": self.inner(tokens) * factor}


FACTORS = torch.full((SAMPLES, 1), 0.5, dtype=torch.float64)
INPUTS = {
    "dict": {"tokens": batch(2), "factor": FACTORS},
    "UserDict": UserDict({"tokens": batch(2), "factor": FACTORS}),
    "list": [batch(2), FACTORS],
    "list and dict": ([batch(2)], {"factor": FACTORS}),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_as_gradcache_takes_them(kind):
    a, b, y = Keywords(), tower(1), batch(3)
    contrast(a(batch(2), 0.5)["reps"], b(y)).backward()
    want = gradients(a, b)
    pick = [lambda out: out["reps"] if isinstance(out, dict) else out]
    GradCache([a, b], 4, contrast, get_rep_fn=pick[0])(INPUTS[kind], y)
    assert_same(gradients(a, b), want)


def test_a_split_function_of_ones_own_and_uneven_chunks():
    a, b, x, y = tower(0), tower(1), batch(2), batch(3)
    _, want = wanted(a, b, x, y)

    def split(value, size):
        return [value[:1], *value[1:].split(size)]

    GradCache([a, b], 5, contrast, split_input_fn=split)(x, y)
    assert_same(gradients(a, b), want)


def test_a_frozen_tower():
    """Pain 5: GradCache itself raises, having no gradient to multiply with."""
    a, b, x, y = tower(0), tower(1).requires_grad_(False), batch(2), batch(3)
    _, want = wanted(a, b, x, y)
    GradCache([a, b], 4, contrast)(x, y)
    assert_same(gradients(a, b), want)


def test_dropout_is_the_same_in_both_passes():
    """Pain 5: of the two passes of each chunk, and of chunks one after another."""
    a, b = tower(0, nn.Dropout(0.5)), tower(1, nn.Dropout(0.5))
    x, y = batch(2), batch(3)
    torch.manual_seed(7)
    contrast(
        torch.cat([a(part) for part in x.split(4)]), torch.cat([b(part) for part in y.split(4)])
    ).backward()
    want = gradients(a, b)
    torch.manual_seed(7)
    GradCache([a, b], 4, contrast)(x, y)
    assert_same(gradients(a, b), want)


def test_mixed_precision_needs_a_scaler():
    with pytest.raises(ArgumentError, match="fp16=True needs scaler="):
        GradCache([tower(0)], 4, contrast, fp16=True)


def test_one_size_per_model():
    with pytest.raises(ArgumentError, match="3 chunk_sizes for 2 models"):
        GradCache([tower(0), tower(1)], [1, 2, 3], contrast)


# ---- the decorators -----------------------------------------------------------------------------


@cached
def encode(model, value):
    return model(value)


@cached
def encode_two(model, value):
    rows = model(value)
    return rows, 2 * rows[:, :2]


def test_decorators_by_hand():
    """Pain 5: keywords of ``cat_input_tensor`` break GradCache's own."""
    a, b, x, y = tower(0, nn.Dropout(0.4)), tower(1), batch(2), batch(3)
    torch.manual_seed(3)
    joined_plain = torch.cat([a(part) for part in x.split(4)])
    contrast(joined_plain, b(y), logit_scale=2.0).backward()
    want = gradients(a, b)

    torch.manual_seed(3)
    xs, fs = zip(*(encode(a, part) for part in x.split(4)), strict=True)
    ys, gs = zip(*(encode(b, part) for part in y.split(4)), strict=True)
    loss = cat_input_tensor(contrast)(list(xs), y=list(ys), logit_scale=2.0)
    loss.backward()
    for leaf, run in zip([*xs, *ys], [*fs, *gs], strict=True):
        run(leaf)
    assert_same(gradients(a, b), want)


def test_several_representations_of_one_call():
    a, x = tower(0), batch(2)
    rows = a(x)
    (rows.square().sum() + (2 * rows[:, :2]).exp().sum()).backward()
    want = gradients(a)
    first, second, run = encode_two(a, x)
    (first.square().sum() + second.exp().sum()).backward()
    run((first, second))
    assert_same(gradients(a), want)


# ---- beside the peer ----------------------------------------------------------------------------


@pytest.fixture
def peer(monkeypatch):
    """Its wheel installs ``gradcache``, and imports itself as ``grad_cache``."""
    module = pytest.importorskip("gradcache")
    if "grad_cache" not in sys.modules:
        monkeypatch.setitem(sys.modules, "grad_cache", module)
    return importlib.import_module("gradcache.grad_cache")


@pytest.mark.parametrize("sizes", [4, [3, 5]])
def test_a_step_is_gradcaches(peer, sizes):
    a, b, x, y = tower(0, nn.Dropout(0.3)), tower(1), batch(2), batch(3)
    found = []
    for kind in (GradCache, peer.GradCache):
        torch.manual_seed(5)
        value = kind([a, b], sizes, contrast)(x, y, logit_scale=3.0)
        found.append((value, gradients(a, b)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-13, atol=0)
    assert_same(found[0][1], found[1][1])
