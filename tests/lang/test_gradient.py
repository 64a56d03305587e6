"""Symbolic gradients, evaluated densely, equal autograd of the oracle."""

import os
import subprocess
import sys

import numpy as np
import pytest

from cl_compiler.lang.sweeps import plan_sweeps
from tests.lang.dense_plan import DensePlan
from tests.losses_zoo import cases
from tests.zoo_case import Sample, sample

SIZES = ((5, 7), (4, 4), (1, 3))


def assert_plan_equals_oracle(drawn: Sample, needs: frozenset[str], tolerance: float) -> None:
    """The plan's value, outputs and every gradient against the oracle's, relative to the largest."""
    dense = DensePlan(plan_sweeps(drawn.case.loss, drawn.case.positives, needs), drawn)
    value = drawn.reference()
    assert dense.value() == pytest.approx(value.item(), rel=tolerance, abs=tolerance)
    if not needs:
        return
    theirs = {n: g.numpy() for n, g in drawn.gradients(value).items() if n in needs}
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, ours in dense.gradients().items():
        error = np.abs(ours - theirs[name]).max() / max(largest, 1e-3)
        assert error <= tolerance, f"d{name}: relative error {error:.1e}"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_every_gradient_of_the_zoo(case, size):
    if case.positives == "ids" and size == (1, 3) and case.loss.is_single_set:
        pytest.skip("two embeddings may share no id")
    drawn = sample(case, *size, seed=sum(size))
    assert_plan_equals_oracle(drawn, case.needs, 1e-10)


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_value_without_gradients(case):
    assert_plan_equals_oracle(sample(case), frozenset(), 1e-10)


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_each_gradient_on_its_own(case):
    """A locked tower or a fixed scale changes what is folded; the rest must not notice."""
    drawn = sample(case, seed=3)
    for name in sorted(case.needs):
        assert_plan_equals_oracle(drawn, frozenset({name}), 1e-10)
