"""What hurts users of other packages, numbered; the pains that no other test has in its docstring.

1 gradients off by the number of ranks · 2 memory that should not be there · 3 uneven last batches ·
4 caching with checkpointing or gradients that are reduced twice · 5 random numbers, batches in
flight, frozen towers, autocast, accumulation · 6 wrong positives: rank offsets, misordered hard
negatives, duplicates, negative similarities · 7 low temperatures and precision ·
8 ``torch.compile`` · 9 odd sizes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize, softplus
from torch.utils.checkpoint import checkpoint

from cl_compiler import compile_loss
from cl_compiler.integrations.open_clip import ClipLoss, SigLipLoss
from cl_compiler.integrations.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from tests.integrations.compare import TextModel, WordBag, assert_same, texts, unit

TESTS = Path(__file__).parents[1]


def test_every_pain_has_a_test():
    """Its number is in the docstring of a test function."""
    found: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for numbers in re.findall(
                    r"\b[Pp]ains? ([\d, and]+)", ast.get_docstring(node) or ""
                ):
                    found |= {int(n) for n in re.findall(r"\d", numbers)}
    assert found >= set(range(1, 10))


# ---- 4: caching with checkpointing --------------------------------------------------------------


class Checkpointed(WordBag):
    """Recomputes its activations in the backward, inside of the cached second pass."""

    reentrant = False

    def forward(self, features):
        def inner(weight_only):
            return super(Checkpointed, self).forward(dict(features))["sentence_embedding"]

        root = torch.ones((), dtype=torch.float64, requires_grad=True)
        features["sentence_embedding"] = checkpoint(inner, root, use_reentrant=self.reentrant)
        return features


@pytest.mark.parametrize("reentrant", [False, True])
def test_cached_with_checkpoints_counts_gradients_once(reentrant):
    """Pain 4: "gradient computed twice" (sentence-transformers #3173, #2844)."""
    model, given = TextModel(0, dropout=0.3), [texts(8, seed=n) for n in range(2)]
    recomputing = TextModel(0)
    recomputing[0].__class__ = Checkpointed
    recomputing[0].reentrant = reentrant
    recomputing[0].dropout = nn.Dropout(0.3)
    recomputing.load_state_dict(model.state_dict())
    found = []
    for one in (model, recomputing):
        torch.manual_seed(4)
        CachedMultipleNegativesRankingLoss(one, mini_batch_size=3)(given, None).backward()
        found.append([p.grad for p in one.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)


# ---- 5: autocast around a cached loss -----------------------------------------------------------


def test_cached_under_autocast_reaches_every_weight():
    """Pain 5: a weight's cached cast must not cost it its gradient (GradCache #17)."""
    model = TextModel(0).float()
    given = [texts(8, seed=n) for n in range(2)]
    plain, cached = (
        MultipleNegativesRankingLoss(model),
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    )
    found = []
    for loss in (plain, cached):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss([dict(features) for features in given], None)
        value.backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one.abs().max() > 0
        # bf16 keeps 8 bits; sums over a handful of samples come in another order.
        torch.testing.assert_close(other, one, rtol=0, atol=2**-6 * one.abs().max().item())


# ---- 6: positives -------------------------------------------------------------------------------


def test_duplicates_are_no_negatives():
    """Pain 6: the same text twice in a batch (sentence-transformers #3189): give ids.

    ``infonce_pairs`` leaves a row's copies of its document out of its denominator.
    """
    x, y = unit(6, 5, seed=1), unit(4, 5, seed=2)
    document = torch.tensor([0, 1, 1, 2, 3, 0])  # which text each row belongs to
    ids = {"row_ids": document, "col_ids": document}
    pairs, plain = (compile_loss("auto", "4MiB", loss=n) for n in ("infonce_pairs", "infonce"))

    def formula():
        s = 8 * x @ y[document].T
        terms = []
        for row, own in enumerate(document):
            others = s[row][document != own]
            terms += [
                torch.logsumexp(torch.cat([others, t[None]]), 0) - t
                for t in s[row][document == own]
            ]
        return torch.stack(terms).mean()

    assert_same(lambda: pairs(x, y[document], logit_scale=8.0, **ids), formula, [x, y])
    once = torch.tensor([0, 1, 3, 4])  # one row of each text: nothing to leave out
    torch.testing.assert_close(
        pairs(x[once], y, logit_scale=8.0, row_ids=document[once], col_ids=torch.arange(4)),
        plain(x[once], y, logit_scale=8.0),
    )


def test_hard_negatives_keep_their_columns():
    """Pain 6: column k of the batch is document k of each query, whatever the number of columns."""
    leaves = [unit(5, 6, seed=n) for n in range(4)]
    own = CachedMultipleNegativesRankingLoss(
        TextModel(0), hardness_mode="hard_negatives", hardness_strength=3.0
    ).loss

    def formula():
        q, d, *hard = (normalize(e, dim=1) for e in leaves)
        logits = [20 * q @ d.T]
        for column in hard:
            s = q @ column.T
            raised = 3.0 * s.detach() * torch.eye(5, dtype=s.dtype)
            logits.append(20 * s + raised)
        return cross_entropy(torch.cat(logits, 1), torch.arange(5))

    assert_same(lambda: own.compute_loss_from_embeddings(leaves), formula, leaves)


# ---- 7: precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_confident_pairs_keep_their_gradient(scale):
    """Pain 7: 1 - p cancels where p is nearly 1 (Liger #1419); fp32 here, against float64."""
    exact = [unit(24, 16, seed=n) for n in range(2)]
    exact[1] = (exact[0].detach() + 0.05 * exact[1].detach()).requires_grad_()
    low = [t.detach().float().requires_grad_() for t in exact]
    sign = 2 * torch.eye(24, dtype=torch.float64) - 1
    softplus(-sign * (scale * exact[0] @ exact[1].T - scale / 2)).sum().div(24).backward()
    SigLipLoss()(*low, scale, -scale / 2).backward()
    for one, other in zip(low, exact, strict=True):
        # rows whose pairs are all settled have tiny gradients: relative to each row's own
        error = (one.grad.double() - other.grad).norm(dim=1) / other.grad.norm(dim=1)
        assert error.max() < 16 * scale * torch.finfo(torch.float32).eps


def test_the_scale_of_a_clamped_parameter():
    """Pain 7: where the clamp of the temperature is active, it has no gradient and no NaN."""
    x, y = unit(9, 8, seed=1), unit(9, 8, seed=2)
    log_scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    ClipLoss()(x, y, log_scale.exp().clamp(max=100.0)).backward()
    assert log_scale.grad == 0
    assert torch.isfinite(x.grad).all()


# ---- 8: torch.compile ---------------------------------------------------------------------------


def test_a_drop_in_inside_a_compiled_step():
    """Pain 8: open_clip #726, sentence-transformers #3768."""
    model = nn.Linear(8, 6, dtype=torch.float64)
    x, y, loss = unit(9, 8, seed=1), unit(9, 8, seed=2), ClipLoss()

    def step(a, b):
        return loss(normalize(model(a), dim=1), normalize(model(b), dim=1), 10.0)

    compiled = torch.compile(step, backend="eager")
    assert_same(lambda: compiled(x, y), lambda: step(x, y), [x, y, *model.parameters()])
