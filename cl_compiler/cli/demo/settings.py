"""What a run of the demonstration is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["QUICK", "DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """``seconds`` bounds the training (tuning included), not the harvest and the compilation.

    rates: tried by both arms, in this order; they lie around the best rate of either, and the
        likeliest comes first in case that time runs out.
    dim, buckets: width of the embeddings and number of hashed features (a power of two).
    max_files: parse only so many files of each package, and keep nothing; None: all of them.
    """

    out: Path
    batch: int = 8192
    budget_bytes: int = 64 << 20
    epochs: int = 12
    seconds: float = 150.0
    seed: int = 0
    rates: tuple[float, ...] = (3e-3, 1e-3, 9e-3)
    dim: int = 128
    buckets: int = 1 << 15
    max_files: int | None = None


QUICK = DemoSettings(
    out=Path(),
    batch=256,
    budget_bytes=1 << 20,
    epochs=3,
    seconds=10.0,
    dim=32,
    buckets=1 << 12,
    max_files=12,
)
"""A look at the machinery in seconds; its numbers mean nothing."""
