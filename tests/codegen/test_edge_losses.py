"""The emitted tiles stay finite where a mask leaves nothing, under every schedule."""

import pytest
import torch

from tests import edge_losses, tiles

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
