"""What a run of the demonstration is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["QUICK", "DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """``seconds`` bounds the training, all learning rates of both arms together.

    same_batch_steps: steps of both losses at the same batch, beside the training proper.
    multiples: of each arm's own learning rate, tried by both in this order; the likeliest comes
        first in case of an interrupt.
    dim, buckets: width of the embeddings and number of hashed features (a power of two).
    max_files: parse only so many files of each package, and keep nothing; None: all of them.
    """

    out: Path
    batch: int = 8192
    budget_bytes: int = 8 << 20
    seconds: float = 44.0
    seed: int = 0
    dim: int = 64
    same_batch_steps: int = 5
    multiples: tuple[float, ...] = (1.0, 0.5)
    buckets: int = 1 << 15
    max_files: int | None = None

    @property
    def run_s(self) -> float:
        """Seconds of training for one arm at one rate."""
        return self.seconds / (2 * len(self.multiples))


QUICK = DemoSettings(
    out=Path(),
    batch=256,
    budget_bytes=256 << 10,
    seconds=3.0,
    dim=32,
    same_batch_steps=3,
    buckets=1 << 12,
    max_files=12,
)
"""A look at the machinery in seconds; its numbers mean nothing."""
