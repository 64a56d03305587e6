"""open_clip's losses: against its formulas, written out here, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.lightly import NTXentLoss
from cl_compiler.integrations.open_clip import ClipLoss, SigLipLoss, patch
from cl_compiler.integrations.sentence_transformers import MultipleNegativesRankingLoss
from tests.integrations.compare import assert_same, unit


def clip_formula(x, y, scale):
    logits, target = scale * x @ y.T, torch.arange(len(x))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def siglip_formula(x, y, scale, bias):
    sign = 2 * torch.eye(len(x), len(y), dtype=x.dtype) - 1
    return -logsigmoid(sign * (scale * x @ y.T + bias)).sum() / len(x)


def drawn(rows: int, dim: int):
    """Images, texts, scale and bias; each trains."""
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    return unit(rows, dim, seed=1), unit(rows, dim, seed=2), scale, bias


@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (63, 100), (65, 384), (65, 640)])
def test_clip_of_odd_sizes(rows, dim):
    """Pain 9: any batch and any width; an uneven last batch (pain 3) is one of them."""
    x, y, scale, _ = drawn(rows, dim)
    assert_same(lambda: ClipLoss()(x, y, scale), lambda: clip_formula(x, y, scale), [x, y, scale])


@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (63, 100), (65, 384)])
def test_siglip_of_odd_sizes(rows, dim):
    """Pain 9."""
    x, y, scale, bias = drawn(rows, dim)
    loss, leaves = SigLipLoss(chunk_size=8), [x, y, scale, bias]
    assert_same(lambda: loss(x, y, scale, bias), lambda: siglip_formula(*leaves), leaves)


def test_a_dictionary_where_it_is_asked_for():
    x, y, scale, bias = drawn(5, 4)
    for loss in (ClipLoss(), SigLipLoss()):
        plain = loss(x, y, scale, bias)
        assert loss(x, y, scale, bias, output_dict=True) == {"contrastive_loss": plain}


def test_the_bias_of_a_softmax_has_the_gradient_zero():
    x, y, scale, bias = drawn(5, 4)
    value = ClipLoss()(x, y, scale, logit_bias=bias)
    assert torch.equal(value, ClipLoss()(x, y, scale))
    value.backward()
    assert bias.grad == 0


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_low_temperatures_stay_finite(scale):
    """Pain 7: a logit scale of 100 and more, in fp32, with a positive that is not the largest."""
    x, y, _, _ = drawn(33, 16)
    low = [t.detach().float().requires_grad_() for t in (x, y)]
    value = ClipLoss()(*low, scale)
    value.backward()
    exact = clip_formula(x, y, scale)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    assert all(torch.isfinite(t.grad).all() for t in low)


def test_several_ranks_need_a_group():
    x, y, scale, bias = drawn(4, 4)
    for loss in (ClipLoss(world_size=2), SigLipLoss(world_size=2)):
        with pytest.raises(ArgumentError, match=r"world_size=2, but torch\.distributed knows 1"):
            loss(x, y, scale, bias)


@pytest.mark.parametrize("kind", [ClipLoss, SigLipLoss])
def test_images_and_texts_are_pairs(kind):
    """Fewer of one side than of the other would be a batch that lost some."""
    x, y, scale, bias = drawn(6, 4)
    for images, texts in ((x[:5], y), (x, y[:5]), (x[:, :3], y)):
        with pytest.raises(ArgumentError, match="no pairs: give both the same shape"):
            kind()(images, texts, scale, bias)


@pytest.mark.parametrize("budget", ["much", -1, "12 parsecs"])
def test_a_budget_is_read_when_it_is_given(budget):
    for make in (ClipLoss, SigLipLoss, MultipleNegativesRankingLoss, NTXentLoss):
        model = [None] if make is MultipleNegativesRankingLoss else []
        with pytest.raises(ArgumentError):
            make(*model, memory_budget=budget)


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ArgumentError, match="'carousel' is no exchange"):
        SigLipLoss(dist_impl="carousel")


# ---- beside the peer ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("options", [{}, {"local_loss": True, "cache_labels": True}])
def test_clip_is_open_clips(rows, options):
    peer = pytest.importorskip("open_clip.loss")
    x, y, scale, bias = drawn(rows, 12)
    ours, theirs = ClipLoss(**options), peer.ClipLoss(**options)
    for extra in ({}, {"logit_bias": bias}):
        # the bias shifts all logits alike: theirs has a gradient of rounding errors, ours of zeros
        assert_same(
            lambda e=extra: ours(x, y, scale, **e),
            lambda e=extra: theirs(x, y, scale, **e),
            [x, y, scale, *extra.values()],
        )


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_siglip_is_open_clips(rows):
    peer = pytest.importorskip("open_clip.loss")
    leaves = drawn(rows, 12)
    assert_same(lambda: SigLipLoss()(*leaves), lambda: peer.SigLipLoss()(*leaves), leaves)
    assert_same(
        lambda: SigLipLoss()._loss(*leaves, negative_only=True),
        lambda: peer.SigLipLoss()._loss(*leaves, negative_only=True),
        leaves,
    )


def test_patched_open_clip_makes_our_losses(monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    for module in (open_clip, open_clip.loss, open_clip.factory):
        for name in ("ClipLoss", "SigLipLoss"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    patch()
    arguments = {"local_loss": False, "gather_with_grad": False, "rank": 0, "world_size": 1}

    class Args:
        distill = False
        model = "ViT-B-32"
        siglip = False
        loss_dist_impl = None
        horovod = False

    for name, value in arguments.items():
        setattr(Args, name, value)
    assert isinstance(open_clip.create_loss(Args), ClipLoss)
    Args.siglip = True
    assert isinstance(open_clip.create_loss(Args), SigLipLoss)
