"""What the two arms' runs show, and what they do not.

Both had the same memory and the same seconds.  Of each arm the reported state is the one that did
best on the validation modules (early stopping, alike for both).  A difference counts only where it
exceeds twice its standard error; the modules, not the functions, are what was drawn, so the error
is theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_compiler.cli.demo.metrics import Retrieval
from cl_compiler.cli.demo.training import Evaluation, Run, best_evaluation

__all__ = ["Comparison", "Row", "compare", "difference", "verdict"]


@dataclass(frozen=True)
class Row:
    """One arm: what it was given (``spent_*``), and ``at``, the state it is reported by."""

    arm: str
    rate: float
    spent_epochs: float
    spent_s: float
    at: Evaluation

    @property
    def test(self) -> Retrieval:
        return self.at.test


@dataclass(frozen=True)
class Comparison:
    """``recall_at_10_gain``: compiled minus dense."""

    compiled: Row
    dense: Row
    recall_at_10_gain: float
    standard_error: float


def compare(compiled: Run, dense: Run, test_modules: Tensor) -> Comparison:
    """The best states of two runs that had the same seconds, to the nearest step."""
    rows = [
        Row(
            run.arm,
            run.rate,
            run.evaluations[-1].epochs,
            run.evaluations[-1].seconds,
            best_evaluation(run.evaluations),
        )
        for run in (compiled, dense)
    ]
    hits = [(row.at.test_ranks <= 10).double() for row in rows]
    gain, error = difference(hits[0], hits[1], test_modules)
    return Comparison(rows[0], rows[1], gain, error)


def difference(first: Tensor, second: Tensor, modules: Tensor) -> tuple[float, float]:
    """Mean of ``first - second`` over the queries and its standard error, clustered by module.

    Args:
        first: [P] fp64.
        second: [P] fp64.
        modules: [P] int64, from 0.
    """
    gain = first - second
    mean = gain.mean()
    by_module = torch.zeros(int(modules.max()) + 1, dtype=torch.float64)
    by_module.index_add_(0, modules, gain - mean)
    return float(mean), float(by_module.square().sum().sqrt() / len(gain))


def verdict(comparison: Comparison) -> str:
    """One sentence that claims no more than the numbers do."""
    gain, error = comparison.recall_at_10_gain, comparison.standard_error
    measured = f"{100 * gain:+.1f} ± {100 * error:.1f} points of recall@10"
    where = "In the same memory and the same seconds"
    if abs(gain) <= 2 * error:
        return f"{where} neither batch is ahead beyond chance: {measured}."
    ahead = "compiled loss (large batch)" if gain > 0 else "dense loss (small batch)"
    return f"{where} the {ahead} is ahead: {measured}."
