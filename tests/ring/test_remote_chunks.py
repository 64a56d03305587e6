"""No rank ever holds more of the others' shards than the chunks that are here and on their way."""

from __future__ import annotations

import pytest

from tests.ring.processes import launch
from tests.ring.remote import held

MOST = {"ring_owner": 2, "both_ways": 4, "two_level": 4}
"""Of other ranks' rows: one matrix that is here and one that arrives, in each direction or ring."""


@pytest.mark.parametrize(
    "schedules",
    [["ring_owner"], pytest.param(["both_ways", "two_level"], marks=pytest.mark.full)],
    ids=str,
)
def test_a_rank_holds_two_chunks_of_others_at_most(schedules):
    """Every matrix as wide as the operands is looked at, in four processes on two nodes."""
    for outcome in launch(held, 4, schedules):
        for schedule, found in outcome.needed().items():
            assert 0 < found["matrices"] <= MOST[schedule], (schedule, found)
            assert found["largest_bytes"] <= found["chunk_bytes"], (schedule, found)
