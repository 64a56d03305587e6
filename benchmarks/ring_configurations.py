"""What ``benchmarks.rings`` measures, listed before it is, and what it calibrates on.

No configuration has the size of a calibrated message.
"""

from __future__ import annotations

from dataclasses import dataclass

from cl_compiler.lang.ring import BOTH_WAYS, HALF_RING

WIDTH = 512
ROW_BYTES = 4 * WIDTH
RATE_BITS_PER_S = 800e6
"""Of every link; a slow one has half, and each of a rank's own wires."""
CALIBRATED_ROWS = (384, 1024, 1792, 3584)
"""Rows of the messages that links are calibrated with: 0.8 to 7.3 MB."""


@dataclass(frozen=True)
class Configuration:
    """One pass over a ring.

    ``chunk``: rows of a message; ``chunks``: of a shard; ``ratio``: seconds of a step's products
    over those of all that a rank sends meanwhile; ``gradients``: travel as well; ``slow``: rank 1
    sends over a link of half the rate.  ``schedule``: how shards travel.  ``own_wires``: a rank
    sends to each of the others over a link of its own, as where each neighbour has a wire.
    """

    ranks: int
    chunk: int
    chunks: int
    ratio: float
    gradients: bool
    slow: bool = False
    schedule: str = "ring_travel"
    own_wires: bool = False

    @property
    def least_ratio(self) -> float:
        """``ratio``, in the step of the ring that has the fewest products to what is sent.

        On half a ring that is the own shard, of which half of the tiles are made, and the facing
        one; both ways it is the own shard, beside which two are sent, where they share a link.
        """
        halved = {HALF_RING: True, BOTH_WAYS: not self.own_wires}
        return self.ratio / 2 if halved.get(self.schedule) else self.ratio


CONFIGURATIONS = tuple(
    Configuration(ranks, chunk, chunks, ratio, gradients)
    for ranks in (2, 3, 4)
    for chunk in (640, 1920)
    for chunks in (1, 4)
    for ratio in (0.5, 1.2, 2.0)
    for gradients in (False, True)
) + tuple(
    Configuration(ranks, 1280, chunks, ratio, gradients, slow=True)
    for ranks in (3, 4)
    for chunks in (1, 4)
    for ratio in (0.5, 1.2)
    for gradients in (False, True)
)

LINES = tuple(
    Configuration(ranks, chunk, chunks, ratio, True, schedule=HALF_RING)
    for ranks in (2, 3, 4)
    for chunk in (640, 1920)
    for chunks in (1, 4)
    for ratio in (0.5, 1.2, 2.4)
) + tuple(
    Configuration(ranks, chunk, chunks, ratio, False, schedule=BOTH_WAYS, own_wires=own_wires)
    for own_wires, ratios in ((False, (0.5, 1.2, 2.4)), (True, (0.5, 1.2, 2.0)))
    for ranks in (3, 4)
    for chunk in (640, 1920)
    for chunks in (1, 4)
    for ratio in ratios
)
"""Shards that go half of the way, or both ways; measured apart."""

OVERLAP = tuple(
    Configuration(ranks, chunk, chunks, ratio, gradients)
    for ranks in (2, 3, 4)
    for chunk, chunks in ((256, 2), (256, 4), (640, 8))
    for ratio in (1.2, 2.0)
    for gradients in (False, True)
)
"""Shards of 512, 1024 and 5120 rows, cut as the planner cuts them for such links."""

REAL_PRODUCTS = tuple(
    Configuration(2, chunk, 4, 1.2, gradients)
    for chunk in (640, 1920)
    for gradients in (False, True)
)
"""Two ranks that multiply matrices in place of waiting: two cores have room for no more."""

__all__ = [
    "CALIBRATED_ROWS",
    "CONFIGURATIONS",
    "LINES",
    "OVERLAP",
    "RATE_BITS_PER_S",
    "REAL_PRODUCTS",
    "ROW_BYTES",
    "WIDTH",
    "Configuration",
]
