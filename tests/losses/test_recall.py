"""The recall@k surrogate: what its paper says of one positive per row, and a refusal of more."""

from __future__ import annotations

import pytest
import torch

from cl_compiler import compile_loss, losses
from cl_compiler.errors import ArgumentError
from tests.integrations.compare import assert_same, unit

COLUMNS = torch.tensor([4, 9, 1, 7, 3, 3])  # nobody's id is 3


def test_one_positive_per_row_anywhere():
    """Ids put it where it is; columns that are no row's may share an id."""
    x, y = unit(4, 5, seed=1), unit(6, 5, seed=2)
    rows = torch.tensor([7, 4, 9, 1])
    loss_fn = compile_loss("auto", "4MiB", loss=losses.recall_at_k((1, 2)))

    def formula():
        sim = x @ y.T
        own = (rows[:, None] == COLUMNS).double()
        above = torch.sigmoid((sim - (sim * own).sum(1, keepdim=True)) / 0.1) * (1 - own)
        rank = 1 + above.sum(1)
        return sum(torch.sigmoid((rank - k) / 0.8).mean() for k in (1, 2))

    given = {"tau_rank": 0.1, "tau_k": 0.8, "row_ids": rows, "col_ids": COLUMNS}
    assert_same(lambda: loss_fn(x, y, **given), formula, [x, y])


def test_several_positives_of_a_row_are_refused():
    x, y = unit(4, 5, seed=1), unit(6, 5, seed=2)
    loss_fn = compile_loss("auto", "4MiB", loss=losses.recall_at_k((1,)))
    rows = torch.tensor([7, 4, 3, 1])
    with pytest.raises(
        ArgumentError, match=r"one positive per row, and row 2 \(id 3\) has several"
    ):
        loss_fn(x, y, tau_rank=0.1, tau_k=1.0, row_ids=rows, col_ids=COLUMNS)
