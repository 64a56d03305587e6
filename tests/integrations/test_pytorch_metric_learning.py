"""pytorch-metric-learning's losses: against formulas written out here, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.pytorch_metric_learning import NTXentLoss, SupConLoss
from tests.integrations.compare import assert_same, unit

NINF = float("-inf")


def nt_xent_formula(s, positive, valid):
    negatives = torch.logsumexp(s.masked_fill(positive | ~valid, NINF), 1, keepdim=True)
    return (torch.logaddexp(s, negatives) - s)[positive].mean()


def supcon_formula(s, positive, valid):
    log_prob = s - torch.logsumexp(s.masked_fill(~valid, NINF), 1, keepdim=True)
    k = positive.sum(1)
    return -(torch.where(positive, log_prob, 0.0).sum(1)[k > 0] / k[k > 0]).mean()


def labelled(rows: int, seed: int, classes: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return unit(rows, 8, seed=seed, scale=2.0), torch.randint(classes, (rows,), generator=generator)


LOSSES = [(NTXentLoss, nt_xent_formula, 0.07), (SupConLoss, supcon_formula, 0.1)]


@pytest.mark.parametrize(("loss", "formula", "temperature"), LOSSES)
def test_one_set(loss, formula, temperature):
    x, labels = labelled(17, 1)
    labels[3] = 99  # a class of one: no positive
    not_self = ~torch.eye(17, dtype=torch.bool)
    positive = (labels[:, None] == labels) & not_self

    def expected():
        z = normalize(x, dim=1)
        return formula(z @ z.T / temperature, positive, not_self)

    assert_same(lambda: loss()(x, labels), expected, [x])


@pytest.mark.parametrize(("loss", "formula", "temperature"), LOSSES)
def test_references(loss, formula, temperature):
    (x, labels), (y, ref_labels) = labelled(9, 1), labelled(14, 2)
    positive = labels[:, None] == ref_labels

    def expected():
        s = normalize(x, dim=1) @ normalize(y, dim=1).T / temperature
        return formula(s, positive, torch.ones_like(positive))

    assert_same(lambda: loss()(x, labels, ref_emb=y, ref_labels=ref_labels), expected, [x, y])


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("labels", [[1, 2, 3], [4, 4, 4]])
def test_labels_without_positives_or_without_negatives_cost_nothing(loss, labels):
    x, _ = labelled(3, 1)
    for references in ({}, {"ref_emb": unit(2, 8, seed=3), "ref_labels": torch.tensor([4, 4])}):
        given = torch.tensor(labels)
        value = loss()(x, given, **references)
        assert value == 0
        value.backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
def test_what_is_not_compiled_is_refused(loss):
    x, labels = labelled(4, 1)
    with pytest.raises(ArgumentError, match="distance"):
        loss(distance=object())
    with pytest.raises(ArgumentError, match="indices_tuple"):
        loss()(x, labels, indices_tuple=(labels,) * 4)
    with pytest.raises(ArgumentError, match="ref_labels"):
        loss()(x, labels, ref_emb=x)


# ---- beside the peer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("rows", [5, 24])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.3}])
def test_losses_are_those_of_pytorch_metric_learning(name, rows, options):
    """Pain 2: its NTXent needs O(B³) for the same number."""
    peer = pytest.importorskip("pytorch_metric_learning.losses")
    mine = {"NTXentLoss": NTXentLoss, "SupConLoss": SupConLoss}[name](**options)
    theirs = getattr(peer, name)(**options)
    (x, labels), (y, ref_labels) = labelled(rows, 1), labelled(11, 2)
    assert_same(lambda: mine(x, labels), lambda: theirs(x, labels), [x])
    refs = {"ref_emb": y, "ref_labels": ref_labels}
    assert_same(lambda: mine(x, labels, **refs), lambda: theirs(x, labels, **refs), [x, y])


@pytest.mark.parametrize("loss", [NTXentLoss, SupConLoss])
@pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(1, dtype=torch.long), [0, 0, 1]])
def test_labels_that_are_not_one_of_each_row_are_refused(loss, labels):
    """Even those that make no pair."""
    x = unit(8, 4, seed=1)
    with pytest.raises(ArgumentError, match="for 8 embeddings"):
        loss()(x, labels)
    with pytest.raises(ArgumentError, match="ref_labels has shape"):
        loss()(x, torch.arange(8), ref_emb=x, ref_labels=labels)


def test_labels_may_be_a_list():
    x = unit(4, 4, seed=1)
    assert torch.equal(SupConLoss()(x, [0, 0, 1, 1]), SupConLoss()(x, torch.tensor([0, 0, 1, 1])))
