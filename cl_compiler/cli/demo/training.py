"""Train both arms alike, interleaved, so that every moment leaves a fair comparison.

Every learning rate is tried by both arms for the same number of epochs, from the same initial
weights and the same shuffles.  The arm that has seen fewer pairs takes the next step, so that
noise on the machine meets both and an interrupt finds them equally far.  The rate that did best on
the validation modules stays; the arm that needed fewer seconds then goes on until both had equal
time.  The test modules are looked at and never decide anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_compiler.cli.demo.arms import Arm
from cl_compiler.cli.demo.encoders import Bags, TwoTowers, drop_features
from cl_compiler.cli.demo.metrics import Retrieval, rank_of_own, retrieval

__all__ = [
    "Dataset",
    "Evaluation",
    "Learner",
    "ModelSettings",
    "Run",
    "Schedule",
    "best_evaluation",
    "seconds_per_epoch",
    "train",
    "winner",
    "within_epochs",
]

_FEATURES_DROPPED = 0.5


@dataclass(frozen=True)
class Dataset:
    """Bags of P pairs, and which of them ([n] int64 each) serve what.

    ``test_modules``: [len(test)] int64, a number per module.
    """

    text: Bags
    code: Bags
    train: Tensor
    valid: Tensor
    test: Tensor
    test_modules: Tensor


@dataclass(frozen=True)
class ModelSettings:
    """The encoders: number of hashed features, width, seed of weights, shuffles and dropping."""

    buckets: int
    dim: int
    seed: int


@dataclass(frozen=True)
class Schedule:
    """Every rate for ``epochs``, then equal seconds; ``stop()`` is asked between steps."""

    rates: tuple[float, ...]
    epochs: int
    stop: Callable[[], bool] = lambda: False
    progress: Callable[[str, float], None] = lambda what, epochs: None
    """Called with what is being done and the epochs of training that were just added."""


@dataclass(frozen=True)
class Evaluation:
    """After ``epochs`` (pairs seen / training pairs) and ``seconds`` of training steps.

    ``whole_epochs`` counts those whose last whole step is done: with a large batch ``epochs`` lies
    a little below it.  ``test_ranks``: [len(test)] int64.
    """

    epochs: float
    whole_epochs: int
    steps: int
    seconds: float
    train_loss: float
    valid: Retrieval
    test: Retrieval
    test_ranks: Tensor


@dataclass(frozen=True)
class Run:
    """One arm at one rate.  ``is_complete``: it was given all the epochs of the schedule."""

    arm: str
    rate: float
    is_complete: bool
    evaluations: tuple[Evaluation, ...]


class Learner:
    """One arm at one rate in training: model, optimiser, its own random numbers, what it saw."""

    def __init__(self, arm: Arm, rate: float, data: Dataset, settings: ModelSettings) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = TwoTowers(settings.buckets, settings.dim)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=rate)
        self.arm = arm
        self.rate = rate
        self.data = data
        self.steps = 0
        self.seconds = 0.0
        self.loss = float("nan")
        self.evaluations: list[Evaluation] = []
        self._shuffles = torch.Generator().manual_seed(settings.seed)
        self._dropping = torch.Generator().manual_seed(settings.seed + 1)
        self._queue = data.train[:0]

    @property
    def epochs(self) -> float:
        return self.steps * self.arm.batch / len(self.data.train)

    def steps_in(self, epochs: int) -> int:
        """Whole steps that show at most ``epochs`` times the training pairs."""
        return epochs * len(self.data.train) // self.arm.batch

    def step(self) -> None:
        """One optimiser step; its seconds count, making the batch included."""
        started = time.perf_counter()
        items = self._next_batch()
        text, code = (
            drop_features(bags.take(items), _FEATURES_DROPPED, self._dropping)
            for bags in (self.data.text, self.data.code)
        )
        model = self.model
        loss = self.arm.function(model.text(text), model.code(code), model.logit_scale())
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.loss = loss.item()
        self.steps += 1
        self.seconds += time.perf_counter() - started

    def evaluate(self) -> Evaluation:
        """Look at validation and test modules; its time counts for neither arm."""
        valid = retrieval(self._ranks(self.data.valid))
        test_ranks = self._ranks(self.data.test)
        evaluation = Evaluation(
            self.epochs,
            self._whole_epochs(),
            self.steps,
            self.seconds,
            self.loss,
            valid,
            retrieval(test_ranks),
            test_ranks,
        )
        self.evaluations.append(evaluation)
        return evaluation

    def advance(self) -> None:
        """One step, and an evaluation when an epoch's last whole step is done."""
        self.step()
        done = self.evaluations[-1].whole_epochs if self.evaluations else 0
        if self._whole_epochs() > done:
            self.evaluate()

    def run(self, epochs: int) -> Run:
        complete = self.steps >= self.steps_in(epochs)
        return Run(self.arm.name, self.rate, complete, tuple(self.evaluations))

    def _whole_epochs(self) -> int:
        epochs = int(self.epochs)
        return epochs + 1 if self.steps >= self.steps_in(epochs + 1) else epochs

    def _next_batch(self) -> Tensor:
        """Shuffled passes one after another; a batch across two never holds a pair twice.

        A pair that waits in the queue comes last in the next pass, so no batch of at most
        ``len(train)`` pairs can meet it again.
        """
        batch = self.arm.batch
        while len(self._queue) < batch:
            order = torch.randperm(len(self.data.train), generator=self._shuffles)
            shuffled = self.data.train[order]
            waiting = torch.isin(shuffled, self._queue)
            self._queue = torch.cat([self._queue, shuffled[~waiting], shuffled[waiting]])
        items, self._queue = self._queue[:batch], self._queue[batch:]
        return items

    @torch.no_grad()
    def _ranks(self, items: Tensor) -> Tensor:
        queries = self.model.text(self.data.text.take(items))
        return rank_of_own(queries, self.model.code(self.data.code.take(items)))


def train(
    arms: Sequence[Arm], data: Dataset, settings: ModelSettings, schedule: Schedule
) -> tuple[Run, ...]:
    """Train every arm at every rate, then the best of each arm to equal seconds.

    Returns:
        A run per arm and rate that got as far as one evaluation; ``winner`` picks among them.
    """
    runs: list[Run] = []
    best: dict[str, Learner] = {}
    for rate in schedule.rates:
        learners = [Learner(arm, rate, data, settings) for arm in arms]
        _equal_epochs(learners, schedule)
        if schedule.stop():
            _evaluate_where_it_stands(learners)
        for learner in learners:
            if learner.evaluations:
                runs.append(learner.run(schedule.epochs))
                best[learner.arm.name] = _better(best.get(learner.arm.name), learner)
        if schedule.stop():
            return tuple(runs)
    _equal_seconds(list(best.values()), schedule)
    done = {(learner.arm.name, learner.rate): learner for learner in best.values()}
    return tuple(
        done[run.arm, run.rate].run(schedule.epochs) if (run.arm, run.rate) in done else run
        for run in runs
    )


def best_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the best mean reciprocal rank on validation modules; the first of equals."""
    return max(evaluations, key=lambda evaluation: evaluation.valid.mean_reciprocal_rank)


def within_epochs(evaluations: Sequence[Evaluation], epochs: int) -> list[Evaluation]:
    """One evaluation for each whole epoch up to ``epochs``: the first, at the epoch's end.

    A later one with as many whole epochs is of a run that was stopped on its way to the next.
    """
    first: dict[int, Evaluation] = {}
    for evaluation in evaluations:
        if evaluation.whole_epochs <= epochs:
            first.setdefault(evaluation.whole_epochs, evaluation)
    return list(first.values())


def winner(runs: Sequence[Run], arm: str, epochs: int) -> Run | None:
    """The run of ``arm`` whose rate did best on validation within ``epochs``.

    Complete runs come before others; None where the arm has no run.
    """
    mine = [run for run in runs if run.arm == arm]
    candidates = [run for run in mine if run.is_complete] or mine
    if not candidates:
        return None

    def score(run: Run) -> float:
        return best_evaluation(within_epochs(run.evaluations, epochs)).valid.mean_reciprocal_rank

    return max(candidates, key=score)


def seconds_per_epoch(arm: Arm, data: Dataset, settings: ModelSettings) -> float:
    """A guess from one step, after one that warms up; used to plan the run, never reported."""
    learner = Learner(arm, 1e-3, data, settings)
    learner.step()
    warm_up_s = learner.seconds
    learner.step()
    started = time.perf_counter()
    learner.evaluate()
    evaluation_s = time.perf_counter() - started
    return (learner.seconds - warm_up_s) * len(data.train) / arm.batch + evaluation_s


def _equal_epochs(learners: Sequence[Learner], schedule: Schedule) -> None:
    while not schedule.stop():
        open_ones = [each for each in learners if each.steps < each.steps_in(schedule.epochs)]
        if not open_ones:
            return
        _advance(min(open_ones, key=lambda learner: learner.epochs), schedule)


def _equal_seconds(learners: Sequence[Learner], schedule: Schedule) -> None:
    """The quicker arms go on; none takes a step that would begin after the slowest one's end.

    They are looked at where that leaves them, which is seldom the end of an epoch.
    """
    if not learners:
        return
    slowest_s = max(learner.seconds for learner in learners)
    for learner in learners:
        while learner.seconds < slowest_s and not schedule.stop():
            _advance(learner, schedule)
    _evaluate_where_it_stands(learners)


def _advance(learner: Learner, schedule: Schedule) -> None:
    before = learner.epochs
    learner.advance()
    what = f"{learner.arm.name}, rate {learner.rate:g}"
    if learner.evaluations:
        what += f": recall@10 {learner.evaluations[-1].test.recall_at_10:.1%}"
    schedule.progress(what, learner.epochs - before)


def _evaluate_where_it_stands(learners: Sequence[Learner]) -> None:
    for learner in learners:
        evaluated = learner.evaluations[-1].steps if learner.evaluations else 0
        if learner.steps > evaluated:
            learner.evaluate()


def _better(known: Learner | None, new: Learner) -> Learner:
    if known is None:
        return new
    scores = [best_evaluation(each.evaluations).valid.mean_reciprocal_rank for each in (known, new)]
    return new if scores[1] > scores[0] else known
