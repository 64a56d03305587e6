"""Gradient conventions, through what really reduces gradients: equal to one process's truth."""

from __future__ import annotations

import pytest
import torch

from tests.ring.conventions import several
from tests.ring.processes import launch

WRAPPED = [("ddp", "mean"), ("ddp", "sum"), ("fsdp", "mean"), ("none", "global")]
LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.mark.parametrize(
    ("sizes", "wrapped"),
    [
        ((9, 4), WRAPPED),
        ((5, 8, 1, 3), WRAPPED[:1]),
        *(pytest.param(s, WRAPPED, marks=pytest.mark.full) for s in ((7, 7), (5, 8, 1, 3))),
    ],
    ids=str,
)
def test_gradients_are_those_of_one_process(sizes, wrapped):
    """Encoders' and scale's, also where shards differ in length; all jobs in the same processes."""
    jobs = [(*how, sizes, dtype) for how in wrapped for dtype in LIMIT]
    outcomes = launch(several, len(sizes), jobs)
    for outcome in outcomes:
        for job, errors in zip(jobs, outcome.needed(), strict=True):
            assert max(errors.values()) < LIMIT[job[-1]], (job, errors)
