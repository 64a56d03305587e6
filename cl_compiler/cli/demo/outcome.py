"""Everything that a run of the demonstration found, as one value and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cl_compiler.cli.demo.arms import Arm, MemoryPoint
from cl_compiler.cli.demo.comparison import Comparison, Row, verdict
from cl_compiler.cli.demo.metrics import Retrieval
from cl_compiler.cli.demo.same_batch import SameBatch
from cl_compiler.cli.demo.training import Evaluation, Run

__all__ = ["DataFacts", "Outcome", "to_json"]


@dataclass(frozen=True)
class DataFacts:
    """The pairs: how many of each kind, from what."""

    train_pairs: int
    valid_pairs: int
    test_pairs: int
    test_modules: int
    packages: tuple[tuple[str, str], ...]
    collection_path: str | None


@dataclass(frozen=True)
class Outcome:
    """``ended``: "complete" or "interrupted"; ``machine``: (what, value).

    ``same_batch``: both losses at the compiled arm's batch; None where ``no_same_batch`` says why.
    ``untrained``: what the initial weights retrieve from the test modules, the same for both arms.
    ``comparisons``: in the same memory, after the same time and after the same epochs.
    """

    ended: str
    budget_bytes: int
    dim: int
    seed: int
    run_s: float
    data: DataFacts
    arms: tuple[Arm, ...]
    memory: tuple[MemoryPoint, ...]
    same_batch: SameBatch | None
    no_same_batch: str
    untrained: Retrieval
    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    seconds_by_part: tuple[tuple[str, float], ...]
    machine: tuple[tuple[str, str], ...]

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


def to_json(outcome: Outcome) -> dict[str, Any]:
    """``outcome`` as JSON values; keys name their units, ranks per query are left out."""
    return {
        "ended": outcome.ended,
        "budget_bytes": outcome.budget_bytes,
        "dim": outcome.dim,
        "seed": outcome.seed,
        "seconds_per_run": outcome.run_s,
        "data": dataclasses.asdict(outcome.data),
        "arms": [_arm(arm) for arm in outcome.arms],
        "memory": [dataclasses.asdict(point) for point in outcome.memory],
        "same_batch": _same_batch(outcome.same_batch) if outcome.same_batch else None,
        "no_same_batch": outcome.no_same_batch,
        "untrained": dataclasses.asdict(outcome.untrained),
        "runs": [
            {
                "arm": run.arm,
                "rate": run.rate,
                "is_complete": run.is_complete,
                "is_chosen": run.is_chosen,
                "evaluations": [_evaluation(each) for each in run.evaluations],
            }
            for run in outcome.runs
        ],
        "comparisons": [_comparison(each) for each in outcome.comparisons],
        "seconds_by_part": dict(outcome.seconds_by_part),
        "machine": dict(outcome.machine),
    }


def _arm(arm: Arm) -> dict[str, Any]:
    return {
        "name": arm.name,
        "batch": arm.batch,
        "predicted_bytes": arm.predicted_bytes,
        "measured_bytes": arm.measured_bytes,
        "compile_s": arm.compile_s,
    }


def _same_batch(same: SameBatch) -> dict[str, Any]:
    return dataclasses.asdict(same) | {"largest_difference": same.largest_difference}


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "epochs": evaluation.epochs,
        "whole_epochs": evaluation.whole_epochs,
        "steps": evaluation.steps,
        "seconds": evaluation.seconds,
        "train_loss": evaluation.train_loss,
        "valid": dataclasses.asdict(evaluation.valid),
        "test": dataclasses.asdict(evaluation.test),
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "what": comparison.what,
        "verdict": verdict(comparison),
        "recall_at_10_gain": comparison.recall_at_10_gain,
        "standard_error": comparison.standard_error,
        "compiled": _row(comparison.compiled),
        "dense": _row(comparison.dense),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "rate": row.rate,
        "spent_epochs": row.spent_epochs,
        "spent_s": row.spent_s,
        "reported": _evaluation(row.at),
    }
