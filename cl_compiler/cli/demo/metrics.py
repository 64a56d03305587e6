"""How well descriptions find their code: exact ranks, ties counted against the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Retrieval", "rank_of_own", "retrieval"]


@dataclass(frozen=True)
class Retrieval:
    """Over ``count`` queries, each with one right answer among ``count`` candidates."""

    count: int
    recall_at_1: float
    recall_at_10: float
    median_rank: float
    mean_reciprocal_rank: float


def rank_of_own(queries: Tensor, keys: Tensor, *, chunk_rows: int = 1024) -> Tensor:
    """Rank of key i for query i, by inner product; 1 is best.

    Keys that tie with the right one, and comparisons with NaN, count as ranked before it: a model
    that maps everything to one point, or diverged, is the worst and not the best.

    Args:
        queries: [P, D].
        keys: [P, D].
        chunk_rows: queries compared at a time; bounds the memory, not the result.

    Returns:
        [P] int64, from 1 to P.
    """
    ranks = []
    for start in range(0, len(queries), chunk_rows):
        sim = queries[start : start + chunk_rows] @ keys.T
        own = torch.diagonal(sim, offset=start).clone()
        ranks.append((~(sim < own[:, None])).sum(1))
    return torch.cat(ranks)


def retrieval(ranks: Tensor) -> Retrieval:
    """Summarise ``ranks`` ([P] int64, 1 is best); the median of an even count is the middle."""
    ordered = ranks.double().sort().values
    count = len(ordered)
    return Retrieval(
        count=count,
        recall_at_1=float((ranks <= 1).double().mean()),
        recall_at_10=float((ranks <= 10).double().mean()),
        median_rank=float((ordered[(count - 1) // 2] + ordered[count // 2]) / 2),
        mean_reciprocal_rank=float((1 / ordered).mean()),
    )
