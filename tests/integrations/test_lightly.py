"""lightly's losses: against formulas written out here, and against lightly."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.lightly import DCLLoss, DCLWLoss, NTXentLoss
from tests.integrations.compare import assert_same, unit

NINF = float("-inf")


def views(rows: int, dim: int = 10):
    """Not of unit length: the losses normalise."""
    return unit(rows, dim, seed=1, scale=3.0), unit(rows, dim, seed=2, scale=0.2)


def logits_of(a, b, temperature):
    z = normalize(torch.cat([a, b]), dim=1)
    return (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), NINF)


@pytest.mark.parametrize("rows", [1, 7, 65])
def test_nt_xent(rows):
    a, b = views(rows)
    target = torch.arange(2 * rows).roll(rows)
    assert_same(
        lambda: NTXentLoss(0.3)(a, b),
        lambda: cross_entropy(logits_of(a, b, 0.3), target),
        [a, b],
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_dcl(weighted):
    a, b = views(7)

    def distance(a, b):
        return ((a - b) ** 2).sum(1)

    def formula():
        s = logits_of(a, b, 0.2)
        x, y = normalize(a, dim=1), normalize(b, dim=1)
        own = s[torch.arange(14), torch.arange(14).roll(7)]
        negatives = s.masked_fill(torch.eye(14, dtype=torch.bool).roll(7, 0), NINF)
        weight = torch.cat([distance(x, y), distance(y, x)]) if weighted else 1.0
        return (torch.logsumexp(negatives, 1) - weight * own).mean()

    loss = DCLLoss(0.2, weight_fn=distance if weighted else None)
    assert_same(lambda: loss(a, b), formula, [a, b])


def test_a_memory_bank_gives_the_negatives_and_turns_over():
    loss, seen = NTXentLoss(0.5, memory_bank_size=(8, 10)), []
    for step in range(4):
        a, b = unit(3, 10, seed=2 * step), unit(3, 10, seed=2 * step + 1)
        bank = loss.memory_bank.bank.clone()
        s = torch.cat([(a * b).sum(1, keepdim=True), a @ bank.double().T], 1) / 0.5
        expected = cross_entropy(s, torch.zeros(3, dtype=torch.long))
        torch.testing.assert_close(loss(a, b), expected, rtol=1e-12, atol=0)
        seen.append(int(loss.memory_bank.bank_ptr))
    assert seen == [3, 6, 0, 3]
    torch.testing.assert_close(loss.memory_bank.bank[:3], b.detach().float())
    loss(a.detach(), b)  # nothing trains: evaluation leaves the bank alone
    assert int(loss.memory_bank.bank_ptr) == 3


@pytest.mark.parametrize("size", [7, (7,), (7, 0), (1, 2, 3)])
def test_a_memory_bank_needs_a_number_and_a_dim(size):
    with pytest.raises(ArgumentError, match="memory_bank_size"):
        NTXentLoss(memory_bank_size=size)


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ArgumentError, match="temperature"):
        NTXentLoss(temperature=0.0)


# ---- beside the peer ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_losses_are_lightlys(rows, temperature):
    peer = pytest.importorskip("lightly.loss")
    a, b = views(rows)
    for ours, theirs in (
        (NTXentLoss(temperature), peer.NTXentLoss(temperature)),
        (DCLLoss(temperature), peer.DCLLoss(temperature)),
        (DCLWLoss(temperature, 0.4), peer.DCLWLoss(temperature, 0.4)),
    ):
        assert_same(lambda f=ours: f(a, b), lambda f=theirs: f(a, b), [a, b])


def test_the_memory_bank_is_lightlys():
    peer = pytest.importorskip("lightly.loss")
    ours, theirs = NTXentLoss(memory_bank_size=(7, 10)), peer.NTXentLoss(memory_bank_size=(7, 10))
    ours.double(), theirs.double()
    theirs.memory_bank.bank.copy_(ours.memory_bank.bank)
    for step in range(5):
        a, b = unit(3, 10, seed=2 * step), unit(3, 10, seed=2 * step + 1)
        value = ours(a, b)
        torch.testing.assert_close(value, theirs(a, b), rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_defaults_are_lightlys():
    peer = pytest.importorskip("lightly.loss")
    for ours, theirs in ((NTXentLoss(), peer.NTXentLoss()), (DCLLoss(), peer.DCLLoss())):
        assert ours.temperature == theirs.temperature
        assert ours.gather_distributed == theirs.gather_distributed


@pytest.mark.parametrize("loss", [NTXentLoss, DCLLoss, DCLWLoss])
def test_views_of_different_samples_are_refused(loss):
    with pytest.raises(ArgumentError, match="two views of the same samples"):
        loss()(unit(8, 5, seed=1), unit(4, 5, seed=2))
