"""The experiment itself: pairs in, an ``Outcome`` out.

Prepares the features and the two arms, decides how many epochs this machine can afford, trains,
and compares.  It prints nothing but what it hands to the ``Screen``.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from itertools import pairwise

import torch

from cl_compiler.cli.demo.arms import (
    Arm,
    MemoryPoint,
    PlanLoss,
    compiled_arm,
    dense_arm,
    dense_loss,
    measure_bytes,
    memory_points,
)
from cl_compiler.cli.demo.collection import Collection
from cl_compiler.cli.demo.comparison import compare
from cl_compiler.cli.demo.encoders import hash_bags
from cl_compiler.cli.demo.harvest import Split, split
from cl_compiler.cli.demo.outcome import DataFacts, Outcome
from cl_compiler.cli.demo.screen import Interrupt, Screen, interruptible
from cl_compiler.cli.demo.settings import DemoSettings
from cl_compiler.cli.demo.training import (
    Dataset,
    Learner,
    ModelSettings,
    Run,
    Schedule,
    seconds_per_epoch,
    train,
    winner,
)
from cl_compiler.errors import ArgumentError
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["affordable_epochs", "conduct", "prepare_arms", "prepare_data"]

_MAX_TEXT_WORDS, _MAX_CODE_WORDS = 64, 160
_OVERRUN = 1.25  # how far training may exceed its time before it is cut short


def conduct(
    settings: DemoSettings,
    collection: Collection,
    harvest_s: float,
    screen: Screen,
    plan: PlanLoss,
) -> Outcome:
    """Run the whole comparison.

    Raises:
        ArgumentError: too few pairs for the batch, or no batch fits the budget.
        BudgetError: the compiled loss does not fit the budget at this batch.
        KeyboardInterrupt: before training began; later an interrupt ends it early instead.
    """
    marks = [("harvest", time.perf_counter() - harvest_s), ("hashing", time.perf_counter())]
    sides = split(collection.pairs)
    _check_sizes(settings, sides)
    with screen.bar("Hashing n-grams"):
        data = prepare_data(settings, sides)
    marks.append(("compiling and measuring", time.perf_counter()))
    with screen.bar("Compiling the loss, measuring memory"):
        arms, points = prepare_arms(settings, plan)
    for arm in arms:
        screen.say(
            f"{arm.name}: batch {arm.batch:,}, peak {format_bytes(arm.measured_bytes)} "
            f"of {format_bytes(settings.budget_bytes)}"
        )
    marks.append(("training, tuning, evaluation", time.perf_counter()))
    model = ModelSettings(settings.buckets, settings.dim, settings.seed)
    untrained = Learner(arms[0], 0.0, data, model).evaluate().test
    with interruptible() as interrupt:
        runs, epochs, ended = _train(settings, arms, data, model, screen, interrupt)
    marks.append(("", time.perf_counter()))
    chosen = [run for arm in arms if (run := winner(runs, arm.name, epochs)) is not None]
    both = len(chosen) == len(arms)
    return Outcome(
        ended=ended,
        budget_bytes=settings.budget_bytes,
        dim=settings.dim,
        seed=settings.seed,
        rates=settings.rates,
        epochs=epochs,
        epochs_asked=settings.epochs,
        data=_facts(collection, sides),
        arms=arms,
        memory=points,
        untrained=untrained,
        runs=runs,
        chosen=tuple(chosen),
        comparisons=compare(chosen[0], chosen[1], data.test_modules) if both else (),
        seconds_by_part=tuple((name, end - start) for (name, start), (_, end) in pairwise(marks)),
        machine=_machine(),
    )


def prepare_data(settings: DemoSettings, sides: Split) -> Dataset:
    """Hash every pair once; document frequencies come from the training pairs."""
    pairs = (*sides.train, *sides.valid, *sides.test)
    ends = torch.tensor([len(sides.train), len(sides.valid), len(sides.test)]).cumsum(0).tolist()
    train = torch.arange(ends[0])
    numbers: dict[str, int] = {}
    modules = [numbers.setdefault(pair.module, len(numbers)) for pair in sides.test]
    return Dataset(
        text=hash_bags(
            [pair.text for pair in pairs],
            train,
            max_words=_MAX_TEXT_WORDS,
            buckets=settings.buckets,
        ),
        code=hash_bags(
            [pair.code for pair in pairs],
            train,
            max_words=_MAX_CODE_WORDS,
            buckets=settings.buckets,
        ),
        train=train,
        valid=torch.arange(ends[0], ends[1]),
        test=torch.arange(ends[1], ends[2]),
        test_modules=torch.tensor(modules),
    )


def prepare_arms(
    settings: DemoSettings, plan: PlanLoss
) -> tuple[tuple[Arm, Arm], tuple[MemoryPoint, ...]]:
    """Both arms under the budget, and the bytes of both losses at the batch and three halvings."""
    batch, dim, budget_bytes = settings.batch, settings.dim, settings.budget_bytes
    compiled = compiled_arm(batch, dim, budget_bytes, plan)
    dense = dense_arm(dim, budget_bytes, max_batch=batch)
    smaller = [batch >> halvings for halvings in (3, 2, 1) if batch >> halvings > 0]
    full = MemoryPoint(
        batch,
        measure_bytes(dense_loss, batch, dim, "meta"),
        compiled.predicted_bytes or 0,
        compiled.measured_bytes,
    )
    return (compiled, dense), (*memory_points(smaller, dim, budget_bytes, plan), full)


def affordable_epochs(settings: DemoSettings, epoch_s: Sequence[float]) -> int:
    """How many of the epochs fit the time: every rate for every arm, then equal seconds.

    Args:
        settings: the epochs asked for, the rates and the seconds there are.
        epoch_s: seconds per epoch of each arm.
    """
    slowest_s, quickest_s = max(epoch_s), min(epoch_s)
    per_epoch_s = len(settings.rates) * sum(epoch_s) + slowest_s - quickest_s
    return max(1, min(settings.epochs, int(settings.seconds / per_epoch_s)))


def _train(
    settings: DemoSettings,
    arms: Sequence[Arm],
    data: Dataset,
    model: ModelSettings,
    screen: Screen,
    interrupt: Interrupt,
) -> tuple[tuple[Run, ...], int, str]:
    """(runs, epochs given to each, how it ended)."""
    started = time.perf_counter()
    epoch_s = [seconds_per_epoch(arm, data, model) for arm in arms]
    epochs = affordable_epochs(settings, epoch_s)
    extra = epochs * (max(epoch_s) / min(epoch_s) - 1)  # epochs that the quicker arm goes on for
    total = epochs * len(settings.rates) * len(arms) + extra
    screen.say(
        f"{epochs} epochs for each of {len(settings.rates)} rates and {len(arms)} losses: about "
        f"{format_seconds(time.perf_counter() - started + _duration_s(settings, epochs, epoch_s))}"
    )
    deadline = started + _OVERRUN * settings.seconds
    late = False

    def stop() -> bool:
        nonlocal late
        late = late or time.perf_counter() > deadline
        return late or interrupt.requested

    done = 0.0
    with screen.bar("Training") as advance:

        def progress(what: str, more: float) -> None:
            nonlocal done
            done += more
            advance(what, done, max(total, done))

        runs = train(arms, data, model, Schedule(settings.rates, epochs, stop, progress))
    ended = "interrupted" if interrupt.requested else "out of time" if late else "complete"
    return runs, epochs, ended


def _duration_s(settings: DemoSettings, epochs: int, epoch_s: Sequence[float]) -> float:
    tuning_s = len(settings.rates) * sum(epoch_s)
    return epochs * (tuning_s + max(epoch_s) - min(epoch_s))


def _check_sizes(settings: DemoSettings, sides: Split) -> None:
    if len(sides.train) < settings.batch:
        raise ArgumentError(
            f"a batch of {settings.batch:,} needs as many training pairs; the installed packages "
            f"gave {len(sides.train):,}; choose a smaller --batch"
        )
    if not sides.valid or not sides.test:
        raise ArgumentError(
            f"no module was left to validate or test on ({len(sides.valid)} and "
            f"{len(sides.test)} pairs); harvest more files"
        )


def _facts(collection: Collection, sides: Split) -> DataFacts:
    return DataFacts(
        train_pairs=len(sides.train),
        valid_pairs=len(sides.valid),
        test_pairs=len(sides.test),
        test_modules=len({pair.module for pair in sides.test}),
        packages=tuple((root.package, root.version) for root in collection.roots),
        collection_path=str(collection.path) if collection.path else None,
    )


def _machine() -> tuple[tuple[str, str], ...]:
    return (
        ("processor", platform.processor() or platform.machine()),
        ("cores", str(os.cpu_count())),
        ("PyTorch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("Python", platform.python_version()),
    )
