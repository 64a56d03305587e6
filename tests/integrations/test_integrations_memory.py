"""Memory of drop-ins, returned gradients included: within their budgets, and beside the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cl_compiler.integrations.compiled import Compiled, default_budget_bytes
from cl_compiler.integrations.lightly import NTXentLoss as ViewsLoss
from cl_compiler.integrations.open_clip import ClipLoss, SigLipLoss
from cl_compiler.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss
from cl_compiler.losses.false_negatives import gist
from cl_compiler.runtime.live_bytes import LiveBytes

MIB = 1 << 20


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    raw = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(raw, dim=1).requires_grad_()


def peak_bytes(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> int:
    """Of a forward and a backward."""
    loss().backward()  # compiles
    for leaf in leaves:
        leaf.grad = None
    with LiveBytes() as live:
        loss().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return live.peak_bytes


def test_losses_stay_within_the_budget_that_they_choose():
    x, y = unit(1024, 256, 1), unit(1024, 256, 2)
    budget = default_budget_bytes([x, y])
    wanted = 8 * MIB + 1.25 * 2 * MIB
    assert wanted <= budget <= 1.125 * wanted
    for loss in (ClipLoss(), SigLipLoss()):
        assert peak_bytes(lambda f=loss: f(x, y, 10.0, -10.0), x, y) <= budget
    # The normalised copies and their gradients, [1024, 256] each, are PyTorch's.
    assert peak_bytes(lambda: ViewsLoss()(x, y), x, y) <= budget + 4 * 2 * MIB


def test_a_budget_of_ones_own_is_kept():
    x, y = unit(1024, 256, 1), unit(1024, 256, 2)
    loss = ClipLoss(memory_budget="4MiB")
    assert peak_bytes(lambda: loss(x, y, 10.0), x, y) <= 4 * MIB


def test_a_default_that_is_too_small_grows(monkeypatch):
    """Whoever gave no budget gets no budget error."""
    monkeypatch.setattr("cl_compiler.integrations.compiled.default_budget_bytes", lambda _: 50_000)
    x, y = unit(64, 512, 1), unit(64, 512, 2)
    value = Compiled("clip")(x, y, logit_scale=5.0)
    torch.testing.assert_close(value, ClipLoss()(x, y, 5.0))


# ---- beside the peers ---------------------------------------------------------------------------


def test_nt_xent_takes_a_hundredth_of_pytorch_metric_learnings():
    """Pain 2: theirs grows with B³."""
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = unit(256, 128, 1), torch.arange(128).repeat(2)
    ours, theirs = (
        peak_bytes(lambda f=f: f(x, labels), x) for f in (NTXentLoss(), peer.NTXentLoss())
    )
    print(f"NTXent 256 x 128: {ours / MIB:.2f} MiB, theirs {theirs / MIB:.0f} MiB")
    assert theirs >= 100 * ours


def test_supcon_beside_pytorch_metric_learnings():
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = unit(1024, 128, 1), torch.arange(128).repeat(8)
    ours, theirs = (
        peak_bytes(lambda f=f: f(x, labels), x)
        for f in (SupConLoss(memory_budget="3MiB"), peer.SupConLoss())
    )
    print(f"SupCon 1024 x 128: {ours / MIB:.2f} MiB, theirs {theirs / MIB:.0f} MiB")
    assert theirs >= 10 * ours


@pytest.mark.full
def test_clip_takes_a_twentieth_of_open_clips():
    peer = pytest.importorskip("open_clip.loss")
    x, y = unit(8192, 512, 1), unit(8192, 512, 2)
    scale = torch.tensor(10.0)
    ours, theirs = (
        peak_bytes(lambda f=f: f(x, y, scale), x, y) for f in (ClipLoss(), peer.ClipLoss())
    )
    print(f"ClipLoss 8192 x 512: {ours / MIB:.1f} MiB, theirs {theirs / MIB:.0f} MiB")
    assert theirs >= 20 * ours


@pytest.mark.full
def test_gist_takes_a_hundredth_of_sentence_transformers():
    """Pain 2: theirs broadcasts [B, B, D] twice.  Both at its best chunk: the whole batch."""
    peer = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    rows, dim = 512, 384
    x, y, guide_x, guide_y = (unit(rows, dim, n) for n in range(4))
    compiled = Compiled(gist())
    theirs_loss: Any = object.__new__(peer.CachedGISTEmbedLoss)
    torch.nn.Module.__init__(theirs_loss)
    for name, value in {
        "mini_batch_size": rows,
        "show_progress_bar": False,
        "temperature": 0.01,
        "margin": 0.0,
        "margin_strategy": "absolute",
        "contrast_anchors": True,
        "contrast_positives": True,
        "gather_across_devices": False,
        "similarity_fct": torch.nn.CosineSimilarity(dim=-1),
        "cross_entropy_loss": torch.nn.CrossEntropyLoss(),
    }.items():
        setattr(theirs_loss, name, value)
    guides = {"guide_x": guide_x.detach(), "guide_y": guide_y.detach()}

    def theirs():
        return theirs_loss.calculate_loss([[x], [y]], [[g] for g in guides.values()])

    def ours():
        return compiled(x, y, **guides, logit_scale=100.0, margin=0.0)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-5)
    mine, peers = peak_bytes(ours, x, y), peak_bytes(theirs, x, y)
    print(f"GIST 512 x 384: {mine / MIB:.1f} MiB, theirs {peers / MIB:.0f} MiB")
    assert peers >= 100 * mine
