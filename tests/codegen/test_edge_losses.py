"""The emitted tiles stay finite where a mask leaves nothing, under every schedule."""

import pytest
import torch

from tests import edge_losses, tiles
from tests.lang.test_gradient import draw_sample

RUNS = [(s, schedule) for s in edge_losses.samples() for schedule in tiles.schedules_of(s.case)]


@pytest.mark.parametrize(
    ("drawn", "schedule"), RUNS, ids=[f"{s.case.name}-{schedule}" for s, schedule in RUNS]
)
def test_what_a_mask_excludes_reaches_no_tile(drawn, schedule):
    expected = drawn.reference()
    gradients = drawn.gradients(expected)
    result = tiles.run(tiles.emit(drawn.case, schedule, width=4), drawn)
    torch.testing.assert_close(result.value, expected.detach(), rtol=1e-10, atol=1e-12)
    for name, ours in result.gradients.items():
        torch.testing.assert_close(ours, gradients[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "seed",
    [
        327,  # an adjoint sum that no gradient reads
        265,  # a helper that only an output calls
        517,  # a sum whose gradient is stopped
        566,  # a sum read at positives
        590,  # a selection between a vector and its negative
        787,  # an output that is a constant
    ],
)
def test_random_losses_that_were_wrong_once(seed):
    case, drawn, some = draw_sample(seed)
    expected = drawn.reference()
    gradients = drawn.gradients(expected)
    width = next(iter(drawn.tensors.values())).shape[-1]
    scale = max(g.abs().max().item() for g in gradients.values())
    for needs in (case.needs, some):
        source = tiles.emit(case, width=width, needs=needs)
        result = tiles.run(source, drawn)
        torch.testing.assert_close(result.value, expected.detach(), rtol=1e-9, atol=1e-9)
        for name, ours in result.gradients.items():
            torch.testing.assert_close(
                ours.reshape(gradients[name].shape), gradients[name], rtol=0, atol=1e-9 * scale
            )
