"""Train both arms alike, interleaved, so that every moment leaves a fair comparison.

What is dealt out is seconds: each arm gets the same time for each of its learning rates, from the
same initial weights and the same shuffles.  So every run finishes, on any machine.  The arm that
has used less time takes the next step, so that noise on the machine meets both and an interrupt
finds them equally far.  The validation modules choose the rate and the moment; the test modules are
looked at and never decide anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    "best_run",
    "learning_rate",
    "train",
]

_FEATURES_DROPPED = 0.5
_RATE_AT_1024 = 1e-3


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
    """Every arm at each of ``multiples`` of its ``learning_rate``, for ``run_s`` seconds."""

    multiples: tuple[float, ...]
    run_s: float
    stop: Callable[[], bool] = lambda: False
    """Asked between steps."""
    progress: Callable[[str, float], None] = lambda what, seconds: None
    """Called with what is being done and the seconds of training that were just added."""


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
    """One arm at one rate.

    is_complete: it had all its seconds; is_chosen: of its arm, the best on validation.
    """

    arm: str
    rate: float
    is_complete: bool
    is_chosen: bool
    evaluations: tuple[Evaluation, ...]


def learning_rate(multiple: float, batch: int) -> float:
    """``multiple`` of a rate in proportion to the batch (Goyal et al. 2017).

    On validation modules this came closer to the best rates at 700 and at 8,192 than a square root.
    """
    return multiple * _RATE_AT_1024 * batch / 1024


class Learner:
    """One arm at one rate in training: model, optimiser, its own random numbers, what it saw."""

    def __init__(self, arm: Arm, rate: float, data: Dataset, settings: ModelSettings) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = TwoTowers(settings.buckets, settings.dim)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=rate, fused=True)
        self.arm = arm
        self.rate = rate
        self.data = data
        self.steps = 0
        self.seconds = 0.0
        self.loss_seconds = 0.0
        self.loss = float("nan")
        self.evaluations: list[Evaluation] = []
        self._shuffles = torch.Generator().manual_seed(settings.seed)
        self._dropping = torch.Generator().manual_seed(settings.seed + 1)
        self._queue = data.train[:0]
        self._pairs = len(data.train)

    @property
    def epochs(self) -> float:
        return self.steps * self.arm.batch / self._pairs

    @property
    def step_s(self) -> float:
        """Mean seconds of a step."""
        return self.seconds / max(1, self.steps)

    def steps_in(self, epochs: int) -> int:
        """Whole steps that show at most ``epochs`` times the training pairs."""
        return epochs * len(self.data.train) // self.arm.batch

    def step(self) -> None:
        """One optimiser step; its seconds count, making the batch included.

        The rate rises in the first epoch, against a jolt at the start, and then stays.
        """
        started = time.perf_counter()
        rise = min(1.0, (self.steps + 1) * self.arm.batch / self._pairs)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * rise
        items = self._next_batch()
        text, code = (
            drop_features(bags.take(items), _FEATURES_DROPPED, self._dropping)
            for bags in (self.data.text, self.data.code)
        )
        model = self.model
        outputs = (model.text(text), model.code(code), model.logit_scale())
        # Cut between encoders and loss, so that the loss's own seconds can be told.
        x, y, scale = (output.detach().requires_grad_() for output in outputs)
        loss_started = time.perf_counter()
        loss = self.arm.function(x, y, scale)
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss_seconds += time.perf_counter() - loss_started
        self.optimiser.zero_grad()
        torch.autograd.backward(outputs, (x.grad, y.grad, scale.grad))
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

    def evaluate_where_it_stands(self) -> None:
        """An evaluation unless nothing was learned since the last one."""
        if self.steps > (self.evaluations[-1].steps if self.evaluations else 0):
            self.evaluate()

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
    """Train every arm at every rate.

    Returns:
        A run per arm and rate that got as far as one step; of each arm one is chosen.
    """
    runs: list[Run] = []
    for multiple in schedule.multiples:
        learners = [
            Learner(arm, learning_rate(multiple, arm.batch), data, settings) for arm in arms
        ]
        _give_seconds(learners, schedule)
        for learner in learners:
            learner.evaluate_where_it_stands()
            if learner.evaluations:
                runs.append(
                    Run(
                        learner.arm.name,
                        learner.rate,
                        _is_done(learner, schedule),
                        False,
                        tuple(learner.evaluations),
                    )
                )
        if schedule.stop():
            break
    chosen = [best_run([run for run in runs if run.arm == name]) for name in {r.arm for r in runs}]
    return tuple(replace(run, is_chosen=any(run is best for best in chosen)) for run in runs)


def best_run(runs: Sequence[Run]) -> Run:
    """The one whose best evaluation is best on validation; complete ones come before others."""
    candidates = [run for run in runs if run.is_complete] or runs

    def score(run: Run) -> float:
        return best_evaluation(run.evaluations).valid.mean_reciprocal_rank

    return max(candidates, key=score)


def best_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one with the best mean reciprocal rank on validation modules; the first of equals."""
    return max(evaluations, key=lambda evaluation: evaluation.valid.mean_reciprocal_rank)


def _give_seconds(learners: Sequence[Learner], schedule: Schedule) -> None:
    """A whole number of steps each, the one that comes nearest to ``run_s``, at least one."""
    while not schedule.stop():
        open_ones = [learner for learner in learners if not _is_done(learner, schedule)]
        if not open_ones:
            return
        learner = min(open_ones, key=lambda each: each.seconds)
        before = learner.seconds
        learner.advance()
        what = f"{learner.arm.name}, rate {learner.rate:.2g}"
        if learner.evaluations:
            what += f": recall@10 {learner.evaluations[-1].test.recall_at_10:.1%}"
        schedule.progress(what, learner.seconds - before)


def _is_done(learner: Learner, schedule: Schedule) -> bool:
    return learner.steps > 0 and learner.seconds + learner.step_s / 2 >= schedule.run_s
