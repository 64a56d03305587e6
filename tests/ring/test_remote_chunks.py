"""No rank ever holds more of the others' shards than the chunks that are here and on their way."""

from __future__ import annotations

import pytest

from tests.ring.processes import launch
from tests.ring.remote import held

MOST = {"ring_owner": 2, "both_ways": 3, "two_level": 4}
"""Matrices of other ranks' rows: one that is here and one that arrives, in each direction or ring.

Of four ranks, one way around has a single other rank, which sends nothing on.
"""


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
