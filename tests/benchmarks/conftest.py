"""Benchmarks collect garbage between turns: what was there before need not be looked at."""

from __future__ import annotations

import gc

import pytest
import torch._dynamo  # noqa: F401  compile_loss imports it: many objects more


@pytest.fixture(autouse=True, scope="module")
def what_exists_stays():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
