"""The oracle agrees with formulas written by hand, in value and in every gradient."""

import pytest
import torch

from tests.losses_zoo import cases
from tests.zoo_case import sample


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
@pytest.mark.parametrize("seed", range(3))
def test_oracle_equals_the_formula_in_value_and_gradients(case, seed):
    drawn = sample(case, seed=seed)
    expected, value = drawn.expected(), drawn.reference()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = drawn.gradients(value), drawn.gradients(expected)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-12, msg=name)
