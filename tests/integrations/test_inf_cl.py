"""inf_cl's function in one process: against the cross-entropy that it computes on GPUs."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.inf_cl import cal_inf_loss
from tests.integrations.compare import assert_same, unit


@pytest.mark.parametrize(("rows", "dim"), [(1, 4), (37, 100), (64, 384)])
def test_any_size_and_width(rows, dim):
    """Pain 9; inf_cl wants D to be a multiple of head_dim, and its dK reads past ragged batches."""
    q, k = unit(rows, dim, seed=1), unit(rows, dim, seed=2)
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    assert_same(
        lambda: cal_inf_loss(q, k, scale=scale),
        lambda: cross_entropy(scale * q @ k.T, torch.arange(rows)),
        [q, k, scale],
    )


def test_labels_choose_columns_and_the_scale_may_be_left_out():
    q, k = unit(9, 6, seed=1, scale=4.0), unit(9, 6, seed=2)
    labels = torch.tensor([3, 3, 0, 8, 1, 1, 1, 5, 2])
    assert_same(lambda: cal_inf_loss(q, k, labels), lambda: cross_entropy(q @ k.T, labels), [q, k])


def test_the_signature_is_inf_cls():
    peer = pytest.importorskip("inf_cl")
    theirs = inspect.signature(peer.cal_inf_loss).parameters
    ours = inspect.signature(cal_inf_loss).parameters
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert list(ours).index(name) == list(theirs).index(name)


def test_labels_that_are_no_columns_are_refused():
    q = unit(9, 6, seed=1)
    with pytest.raises(ArgumentError, match=r"labels are numbers of columns.*given as scale="):
        cal_inf_loss(q, q, torch.tensor(20.0))
