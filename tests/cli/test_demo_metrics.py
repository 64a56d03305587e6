"""Ranks against a brute-force count, and the differences between two arms."""

from __future__ import annotations

import math

import pytest
import torch

from cl_compiler.cli.demo.comparison import difference
from cl_compiler.cli.demo.metrics import rank_of_own, retrieval


def brute_force_rank(queries: torch.Tensor, keys: torch.Tensor, own: int) -> int:
    scores = [float((queries[own] * key).sum()) for key in keys]
    return sum(score >= scores[own] for score in scores)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_ranks_equal_a_brute_force_count_with_ties(chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # Small integers: products are exact, and many are equal.
    queries, keys = (torch.randint(-1, 2, (40, 3), generator=generator).float() for _ in range(2))
    expected = [brute_force_rank(queries, keys, own) for own in range(40)]
    assert rank_of_own(queries, keys, chunk_rows=chunk_rows).tolist() == expected
    assert len(set(expected)) > 5


def test_a_collapsed_model_ranks_last_and_not_first() -> None:
    same = torch.ones(30, 4)
    assert rank_of_own(same, same).tolist() == [30] * 30
    assert retrieval(rank_of_own(same, same)).recall_at_10 == 0


def test_a_diverged_model_ranks_last() -> None:
    queries = torch.eye(20)
    broken = queries.clone()
    broken[3] = math.nan
    ranks = rank_of_own(broken, queries)
    assert ranks[3] == 20
    assert ranks[4] == 1


def test_the_summary_by_hand() -> None:
    found = retrieval(torch.tensor([1, 10, 11, 2]))
    assert found.count == 4
    assert found.recall_at_1 == 0.25
    assert found.recall_at_10 == 0.75
    assert found.median_rank == 6.0
    assert found.mean_reciprocal_rank == pytest.approx((1 + 1 / 10 + 1 / 11 + 1 / 2) / 4)
    assert retrieval(torch.tensor([5, 1, 3])).median_rank == 3


def test_the_standard_error_counts_modules_and_not_queries() -> None:
    first = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64)
    second = torch.zeros(8, dtype=torch.float64)
    singles = difference(first, second, torch.arange(8))
    pairs = difference(first, second, torch.arange(8) // 2)
    assert singles[0] == pairs[0] == 0.5
    assert singles[1] == pytest.approx(math.sqrt(8 * 0.25) / 8)
    assert pairs[1] == pytest.approx(math.sqrt(4 * 1.0) / 8)  # as if there were 4 draws
