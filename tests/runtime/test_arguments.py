"""What a loss is called with: every mistake is an ``ArgumentError`` that says how to repair it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.api import find_loss, loss_signature
from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.arguments import ArgumentChecker

GENERATOR = torch.Generator().manual_seed(3)
X, Y = torch.randn(6, 8, generator=GENERATOR), torch.randn(6, 8, generator=GENERATOR)
IDS = torch.arange(6)
GIVEN = {"x": X, "y": Y, "logit_scale": torch.tensor(2.0)}


@pytest.fixture
def check() -> ArgumentChecker:
    return ArgumentChecker(loss_signature(find_loss("clip")), nonfinite=False)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"logit_scale": torch.tensor(2.0, device="meta")}, "logit_scale is on the meta device"),
        ({"x": X.to("meta")}, "x is on the meta device and has no elements"),
        ({"x": X.to_sparse()}, r"x has layout sparse_coo.*\.to_dense\(\)"),
        ({"y": Y.to_mkldnn()}, r"y has layout _mkldnn.*\.to_dense\(\)"),
        ({"logit_scale": torch.tensor(2j)}, r"logit_scale is complex.*\.real"),
        ({"logit_scale": 2j}, "logit_scale must be a number"),
        ({"logit_scale": "2"}, "logit_scale must be a number"),
        ({"row_ids": IDS.to("meta"), "col_ids": IDS}, "row_ids (is on the|on) meta"),
        ({"row_ids": IDS, "col_ids": IDS.to(torch.complex64)}, r"integers \[6\].*got complex64"),
        ({"row_ids": IDS, "col_ids": IDS.float()}, r"col_ids must be.*got float32 \[6\]"),
        ({"row_ids": IDS.to_sparse(), "col_ids": IDS}, "row_ids has layout sparse_coo"),
        ({"row_ids": [0, 1], "col_ids": IDS}, r"row_ids must be.*got <class 'list'>"),
    ],
)
def test_what_cannot_be_read_is_refused(check: ArgumentChecker, changed: Any, said: str) -> None:
    for _ in range(2):  # also where an earlier call was like this one
        with pytest.raises(ArgumentError, match=said):
            check((), {**GIVEN, **changed})


@pytest.mark.parametrize("number", [np.float32(2.5), np.float64(2.5), np.int64(3), 3, True])
def test_every_real_number_is_a_scalar(check: ArgumentChecker, number: Any) -> None:
    for _ in range(2):
        found = check((X, Y), {"logit_scale": number}).values["logit_scale"]
        assert found.dtype == torch.float64 and found.shape == () and found.item() == float(number)


def test_vectors_are_held_to_the_same_rules() -> None:
    @cl.define_loss
    def weighted(sim):
        """Each row's logsumexp, weighted."""
        rows = cl.row_input("weight") * cl.logsumexp(sim, over=cl.cols)
        return cl.mean(rows, over=cl.rows)

    check = ArgumentChecker(loss_signature(weighted), nonfinite=False)
    assert check((X, Y), {"weight": torch.ones(6)}).values["weight"].shape == (6,)
    with pytest.raises(ArgumentError, match=r"weight (is on the|on) meta"):
        check((X, Y), {"weight": torch.ones(6, device="meta")})
