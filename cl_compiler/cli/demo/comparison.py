"""What the two arms' runs show, and what they do not.

Both had the same memory, and are compared after the same time and after the same epochs: where the
loss is most of a step, time decides; where the encoders are, epochs come closer.  Of each arm the
reported state is the one that did best on the validation modules up to there, over its rates and
over the moments of a run, alike for both.  A difference counts only where it exceeds twice its
standard error; the modules, not the functions, are what was drawn, so the error is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """``what``: "same time" or "same epochs"; ``recall_at_10_gain``: compiled minus dense."""

    what: str
    compiled: Row
    dense: Row
    recall_at_10_gain: float
    standard_error: float


def compare(runs: Sequence[Run], test_modules: Tensor) -> tuple[Comparison, ...]:
    """After the same time, then after the same epochs; () where an arm has no run.

    Every run had the same seconds, to the nearest step.  The epochs are those that the slower arm's
    chosen run had.
    """
    chosen = {run.arm: run for run in runs if run.is_chosen}
    if len(chosen) < 2:
        return ()
    time = [_row(chosen[arm], chosen[arm].evaluations) for arm in ("compiled", "dense")]
    epochs = min(run.evaluations[-1].whole_epochs for run in chosen.values())
    found = [_comparison("same time", time, test_modules)]
    if epochs > 0:
        rows = [_row_within(runs, arm, epochs) for arm in ("compiled", "dense")]
        found.append(_comparison("same epochs", rows, test_modules))
    return tuple(found)


def _row(run: Run, evaluations: Sequence[Evaluation]) -> Row:
    last = evaluations[-1]
    return Row(run.arm, run.rate, last.epochs, last.seconds, best_evaluation(evaluations))


def _row_within(runs: Sequence[Run], arm: str, epochs: int) -> Row:
    """The arm's best row on validation after ``epochs``, among its rates that came so far."""
    rows = []
    for run in runs:
        # One evaluation an epoch, at its end; a later one is of a run on its way to the next.
        first: dict[int, Evaluation] = {}
        for each in run.evaluations:
            first.setdefault(each.whole_epochs, each)
        within = [each for whole, each in first.items() if 0 < whole <= epochs]
        if run.arm == arm and epochs in first:
            rows.append(_row(run, within))
    return max(rows, key=lambda row: row.at.valid.mean_reciprocal_rank)


def _comparison(what: str, rows: Sequence[Row], test_modules: Tensor) -> Comparison:
    hits = [(row.at.test_ranks <= 10).double() for row in rows]
    gain, error = difference(hits[0], hits[1], test_modules)
    return Comparison(what, rows[0], rows[1], gain, error)


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
    where = f"In the same memory and the {comparison.what}"
    if abs(gain) <= 2 * error:
        return f"{where} neither batch is ahead beyond chance: {measured}."
    ahead = "compiled loss (large batch)" if gain > 0 else "dense loss (small batch)"
    return f"{where} the {ahead} is ahead: {measured}."
