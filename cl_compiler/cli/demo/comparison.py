"""What the two arms' runs show, and what they do not.

Of each arm the reported state is the one that did best on the validation modules up to the point of
comparison (early stopping, alike for both).  A difference counts only where it exceeds twice its
standard error; the modules, not the functions, are what was drawn, so the error is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_compiler.cli.demo.metrics import Retrieval
from cl_compiler.cli.demo.training import Evaluation, Run, best_evaluation, within_epochs

__all__ = ["Comparison", "Row", "compare", "difference", "verdict"]


_SAME_SECONDS = 1.02
"""Two arms end within a step of each other and never at the same instant."""


@dataclass(frozen=True)
class Row:
    """One arm at a point of comparison: ``spent_*`` up to there, ``at`` the state that is reported.

    ``spent_epochs`` and ``spent_s`` tell what the arm was given, ``at`` what it made of it.
    """

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
    """``what``: "equal epochs" or "equal seconds"; ``compiled`` minus ``dense`` in recall@10."""

    what: str
    compiled: Row
    dense: Row
    recall_at_10_gain: float
    standard_error: float


def compare(compiled: Run, dense: Run, test_modules: Tensor) -> tuple[Comparison, ...]:
    """At equal epochs and at equal seconds, as far as both arms got; () where one got nowhere."""
    runs = (compiled, dense)
    epochs = min(run.evaluations[-1].whole_epochs for run in runs)
    seconds = _SAME_SECONDS * min(run.evaluations[-1].seconds for run in runs)
    found = []
    by_epochs = [within_epochs(run.evaluations, epochs) for run in runs]
    if all(by_epochs):
        found.append(_comparison("equal epochs", runs, by_epochs, test_modules))
    by_seconds = [[each for each in run.evaluations if each.seconds <= seconds] for run in runs]
    if all(by_seconds):
        found.append(_comparison("equal seconds", runs, by_seconds, test_modules))
    return tuple(found)


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
    if abs(gain) <= 2 * error:
        return f"At {comparison.what} neither arm is ahead beyond chance: {measured}."
    ahead, batch = ("compiled", "large") if gain > 0 else ("dense", "small")
    return f"At {comparison.what} the {ahead} arm ({batch} batch) is ahead: {measured}."


def _comparison(
    what: str, runs: Sequence[Run], evaluations: Sequence[list[Evaluation]], modules: Tensor
) -> Comparison:
    compiled, dense = (
        Row(run.arm, run.rate, mine[-1].epochs, mine[-1].seconds, best_evaluation(mine))
        for run, mine in zip(runs, evaluations, strict=True)
    )
    hits = [(row.at.test_ranks <= 10).double() for row in (compiled, dense)]
    gain, error = difference(hits[0], hits[1], modules)
    return Comparison(what, compiled, dense, gain, error)
