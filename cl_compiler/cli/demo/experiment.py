"""The experiment itself: pairs in, an ``Outcome`` out.

Prepares the features and the two arms, runs both losses at the same batch, trains both in the same
memory and time, and compares.  It prints nothing but what it hands to the ``Screen``.
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
from cl_compiler.cli.demo.same_batch import (
    SameBatch,
    available_bytes,
    run_same_batch,
    why_not,
)
from cl_compiler.cli.demo.screen import Interrupt, Screen, interruptible
from cl_compiler.cli.demo.settings import DemoSettings
from cl_compiler.cli.demo.training import Dataset, Learner, ModelSettings, Run, Schedule, train
from cl_compiler.errors import ArgumentError
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["conduct", "prepare_arms", "prepare_data"]

_MAX_TEXT_WORDS, _MAX_CODE_WORDS = 64, 160
_SAME_BATCH_S = 20.0  # no further step of the dense loss at the large batch after this


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
    arms, points = prepare_arms(settings, plan, screen)
    for arm in arms:
        screen.say(
            f"{arm.name}: batch {arm.batch:,}, peak {format_bytes(arm.measured_bytes)} "
            f"of {format_bytes(settings.budget_bytes)}"
        )
    model = ModelSettings(settings.buckets, settings.dim, settings.seed)
    untrained = Learner(arms[0], 0.0, data, model).evaluate().test
    with interruptible() as interrupt:
        marks.append(("both losses at the same batch", time.perf_counter()))
        same_batch, no_same_batch = _same_batch(settings, arms[0], data, model, screen, interrupt)
        marks.append(("training and evaluation", time.perf_counter()))
        runs = _train(settings, arms, data, model, screen, interrupt)
    marks.append(("", time.perf_counter()))
    return Outcome(
        ended="interrupted" if interrupt.requested else "complete",
        budget_bytes=settings.budget_bytes,
        dim=settings.dim,
        seed=settings.seed,
        run_s=settings.run_s,
        data=_facts(collection, sides),
        arms=arms,
        memory=points,
        same_batch=same_batch,
        no_same_batch=no_same_batch,
        untrained=untrained,
        runs=runs,
        comparisons=compare(runs, data.test_modules),
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
    settings: DemoSettings, plan: PlanLoss, screen: Screen
) -> tuple[tuple[Arm, Arm], tuple[MemoryPoint, ...]]:
    """Both arms under the budget, and the bytes of both losses at the batch and three halvings."""
    batch, dim, budget_bytes = settings.batch, settings.dim, settings.budget_bytes
    with screen.bar(f"Compiling the loss for a batch of {batch:,}, measuring its memory"):
        compiled = compiled_arm(batch, dim, budget_bytes, plan)
    with screen.bar(f"Looking for the largest dense batch in {format_bytes(budget_bytes)}"):
        dense = dense_arm(dim, budget_bytes, max_batch=batch)
    smaller = [batch >> halvings for halvings in (3, 2, 1) if batch >> halvings > 0]
    with screen.bar(f"Measuring memory at {', '.join(f'{each:,}' for each in smaller)}"):
        points = memory_points(smaller, dim, budget_bytes, plan)
    full = MemoryPoint(
        batch,
        measure_bytes(dense_loss, batch, dim, "meta"),
        compiled.predicted_bytes or 0,
        compiled.measured_bytes,
    )
    return (compiled, dense), (*points, full)


def _same_batch(
    settings: DemoSettings,
    compiled: Arm,
    data: Dataset,
    model: ModelSettings,
    screen: Screen,
    interrupt: Interrupt,
) -> tuple[SameBatch | None, str]:
    """(what was found, why there is nothing)."""
    obstacle = why_not(compiled.batch, settings.dim, available_bytes())
    if obstacle:
        screen.say(f"No dense loss at the same batch: {obstacle}")
        return None, obstacle
    with screen.bar(f"Both losses at a batch of {compiled.batch:,}") as advance:
        found = run_same_batch(
            compiled,
            data,
            model,
            max_steps=settings.same_batch_steps,
            max_s=_SAME_BATCH_S,
            stop=lambda: interrupt.requested,
            progress=advance,
        )
    return found, "" if found else "the run was interrupted"


def _train(
    settings: DemoSettings,
    arms: Sequence[Arm],
    data: Dataset,
    model: ModelSettings,
    screen: Screen,
    interrupt: Interrupt,
) -> tuple[Run, ...]:
    screen.say(
        f"Each loss at {len(settings.multiples)} learning rates, "
        f"{format_seconds(settings.run_s)} of training each: "
        f"{format_seconds(settings.seconds)} and the evaluations"
    )
    done = 0.0
    with screen.bar("Training") as advance:

        def progress(what: str, more: float) -> None:
            nonlocal done
            done += more
            advance(what, done, max(settings.seconds, done))

        return train(
            arms,
            data,
            model,
            Schedule(settings.multiples, settings.run_s, lambda: interrupt.requested, progress),
        )


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
