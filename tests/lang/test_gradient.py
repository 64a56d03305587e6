"""Symbolic gradients, evaluated densely, equal autograd of the oracle."""

from random import Random

import numpy as np
import pytest
import torch

from cl_compiler.lang import reference
from cl_compiler.lang.sweeps import plan_sweeps
from tests import edge_losses
from tests.lang.dense_plan import DensePlan
from tests.losses_zoo import cases
from tests.random_losses import draw
from tests.zoo_case import Case, Sample, sample

SIZES = ((5, 7), (4, 4), (1, 3))


def assert_plan_equals_oracle(drawn: Sample, needs: frozenset[str], tolerance: float) -> None:
    """The plan's value, outputs and gradients against the oracle's, relative to the largest."""
    dense = DensePlan(plan_sweeps(drawn.case.loss, drawn.case.positives, needs), drawn)
    value = drawn.reference()
    assert dense.value() == pytest.approx(value.item(), rel=tolerance, abs=tolerance)
    outputs = reference.evaluate_outputs(
        drawn.case.loss, drawn.tensors, drawn.parameters, **drawn.ids
    )
    for name, output in dense.outputs().items():
        np.testing.assert_allclose(output, outputs[name].numpy().ravel(), tolerance, tolerance)
    if not needs:
        return
    theirs = {n: g.numpy() for n, g in drawn.gradients(value).items() if n in needs}
    largest = max(np.abs(g).max() for g in theirs.values())
    for name, ours in dense.gradients().items():
        error = np.abs(ours - theirs[name]).max() / max(largest, 1e-3)
        assert error <= tolerance, f"d{name}: relative error {error:.1e}"


def draw_sample(seed: int) -> tuple[Case, Sample, frozenset[str]]:
    """A random loss with inputs of random sizes, and some of its gradients."""
    rng = Random(seed)
    case = draw(seed)
    m = rng.randint(2, 6)
    n = m + rng.randint(0, 4) if case.positives == "diagonal" else rng.randint(2, 8)
    drawn = sample(case, m, n, rng.randint(4, 7), seed=seed)
    some = rng.sample(sorted(case.needs), rng.randint(1, len(case.needs)))
    return case, drawn, frozenset(some)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_every_gradient_of_the_zoo(case, size):
    if case.positives == "ids" and size == (1, 3) and case.loss.is_single_set:
        pytest.skip("two embeddings may share no id")
    if case.positives == "paired" and size == (1, 3):
        pytest.skip("one row and one column: there may be no negatives")
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


@pytest.mark.parametrize(
    "seed",
    [*range(60), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(60, 200))],
)
def test_random_losses(seed):
    case, drawn, some = draw_sample(seed)
    value = drawn.reference()
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in drawn.gradients(value).values())
    for needs in (case.needs, some, frozenset()):
        assert_plan_equals_oracle(drawn, needs, 1e-9)


@pytest.mark.parametrize("drawn", edge_losses.samples(), ids=lambda s: s.case.name)
def test_what_a_mask_excludes_reaches_no_gradient(drawn):
    value = drawn.reference()
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in drawn.gradients(value).values())
    for needs in (drawn.case.needs, frozenset({"offset"}), frozenset({"x"})):
        assert_plan_equals_oracle(drawn, needs, 1e-10)
