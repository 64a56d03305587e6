"""Both arms are treated alike: batches, weights, epochs, seconds, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cl_compiler.cli.demo.arms import Arm, dense_arm, dense_loss, measure_bytes
from cl_compiler.cli.demo.comparison import compare, verdict
from cl_compiler.cli.demo.encoders import Bags, TwoTowers, drop_features, hash_bags, words
from cl_compiler.cli.demo.metrics import Retrieval
from cl_compiler.cli.demo.same_batch import run_same_batch, why_not
from cl_compiler.cli.demo.training import (
    Dataset,
    Evaluation,
    Learner,
    ModelSettings,
    Run,
    Schedule,
    best_run,
    learning_rate,
    train,
)

MODEL = ModelSettings(buckets=1 << 10, dim=16, seed=3)


def dataset(train_pairs: int = 100) -> Dataset:
    """Pair p has a word for p % 7 and one for p % 11; other words for text than for code."""
    train_items = torch.arange(train_pairs)
    text, code = (
        hash_bags(
            [f"{first[p % 7] * 3} {second[p % 11] * 3}" for p in range(train_pairs + 30)],
            train_items,
            max_words=8,
            buckets=MODEL.buckets,
        )
        for first, second in (("abcdefg", "hijklmnopqr"), ("gfedcba", "rqponmlkjih"))
    )
    rest = torch.arange(train_pairs, train_pairs + 30)
    return Dataset(text, code, train_items, rest[:10], rest[10:], torch.arange(20) // 2)


def arm(name: str, batch: int, function: Callable[..., Tensor] = dense_loss) -> Arm:
    return Arm(name, batch, function, measured_bytes=0)


class Clock:
    """A clock for ``training`` that only losses advance: no test depends on a quiet machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            self.now += seconds
            return dense_loss(x, y, scale)

        return loss


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("cl_compiler.cli.demo.training.time", made)
    return made


def run_of(name: str, rate: float, scores: list[float], is_complete: bool = True) -> Run:
    """A run whose n-th evaluation has the n-th validation score, an epoch and a second each."""
    return Run(
        name,
        rate,
        is_complete,
        True,
        tuple(
            Evaluation(
                epochs=epoch,
                whole_epochs=epoch,
                steps=epoch,
                seconds=float(epoch),
                train_loss=0.0,
                valid=Retrieval(10, 0, 0, 0, score),
                test=Retrieval(4, 0, score, 0, 0),
                test_ranks=torch.full((4,), round(1 / score)),
            )
            for epoch, score in enumerate(scores, start=1)
        ),
    )


@pytest.mark.parametrize("batch", [7, 33, 64, 100])
def test_every_pass_shows_every_pair_once_and_no_batch_repeats_one(batch: int) -> None:
    learner = Learner(arm("a", batch), 1e-3, dataset(), MODEL)
    batches = [learner._next_batch() for _ in range(50)]
    assert all(len(items.unique()) == batch for items in batches)
    seen = torch.cat(batches)
    passes = len(seen) // 100
    counts = torch.bincount(seen[: passes * 100], minlength=100)
    assert passes >= 3
    assert counts.tolist() == [passes] * 100
    assert not torch.equal(seen[:100], seen[100:200])


def test_arms_begin_with_the_same_weights_and_the_same_shuffle() -> None:
    torch.manual_seed(1)
    first = Learner(arm("a", 10), 1e-3, dataset(), MODEL)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = Learner(arm("b", 50), 1e-2, dataset(), MODEL)
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)
    small = torch.cat([first._next_batch() for _ in range(5)])
    assert torch.equal(small, second._next_batch())


def test_interleaving_does_not_change_a_run(clock: Clock) -> None:
    data = dataset()
    first, second = arm("a", 25, clock.taking(1.0)), arm("b", 50, clock.taking(2.0))

    def losses(arms: list[Arm]) -> list[float]:
        runs = train(arms, data, MODEL, Schedule((10.0,), 12.0))
        return [each.train_loss for each in runs[0].evaluations]

    alone = losses([first])
    assert len(set(alone)) == 3
    assert alone == losses([first, second])


def test_training_learns_and_an_epoch_is_what_it_says() -> None:
    for batch in (30, 64):
        learner = Learner(arm("a", batch), 1e-2, dataset(), MODEL)
        while learner.steps < learner.steps_in(10):
            learner.advance()
        found = learner.evaluations
        assert [each.whole_epochs for each in found] == list(range(1, 11))
        assert [each.steps for each in found] == [100 * k // batch for k in range(1, 11)]
        assert found[-1].valid.mean_reciprocal_rank > 0.9
        assert found[0].valid.mean_reciprocal_rank < 0.8


def test_a_step_is_the_one_that_autograd_would_take_in_one_piece() -> None:
    learner, plain = (Learner(arm("a", 50), 1e-2, dataset(), MODEL) for _ in range(2))
    learner.step()
    learner.step()
    for step in (1, 2):
        for group in plain.optimiser.param_groups:
            group["lr"] = 1e-2 * min(1.0, step / 2)  # two steps are the first epoch
        items = plain._next_batch()
        text, code = (
            drop_features(bags.take(items), 0.5, plain._dropping)
            for bags in (plain.data.text, plain.data.code)
        )
        model = plain.model
        loss = dense_loss(model.text(text), model.code(code), model.logit_scale())
        plain.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        plain.optimiser.step()
    for left, right in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)
    assert float(learner.model.log_scale.detach()) != pytest.approx(math.log(1 / 0.07), abs=1e-6)


def test_every_run_of_both_arms_gets_the_same_seconds_to_the_nearest_step(clock: Clock) -> None:
    arms = [arm("slow", 50, clock.taking(3.0)), arm("quick", 50, clock.taking(0.7))]
    runs = train(arms, dataset(), MODEL, Schedule((1.0, 0.5), 10.0))
    assert [(run.arm, run.rate) for run in runs] == [
        (each.name, learning_rate(multiple, 50)) for multiple in (1.0, 0.5) for each in arms
    ]
    assert all(run.is_complete for run in runs)
    assert [run.evaluations[-1].steps for run in runs] == [3, 14, 3, 14]
    assert [run.evaluations[-1].seconds for run in runs] == pytest.approx([9.0, 9.8, 9.0, 9.8])


def test_stopping_leaves_both_arms_equally_far(clock: Clock) -> None:
    steps = 0

    def progress(what: str, seconds: float) -> None:
        nonlocal steps
        steps += 1

    arms = [arm("a", 10, clock.taking(1.0)), arm("b", 50, clock.taking(4.0))]
    schedule = Schedule((1.0, 0.5), 500.0, stop=lambda: steps >= 37, progress=progress)
    first, second = train(arms, dataset(), MODEL, schedule)
    assert [first.rate, second.rate] == [learning_rate(1.0, 10), learning_rate(1.0, 50)]
    assert not first.is_complete
    assert not second.is_complete
    assert abs(first.evaluations[-1].seconds - second.evaluations[-1].seconds) <= 4.0
    assert first.evaluations[-1].steps + second.evaluations[-1].steps == 37


def test_the_rate_is_chosen_on_validation_among_complete_runs(clock: Clock) -> None:
    low, high = run_of("a", 1.0, [0.3, 0.4]), run_of("a", 2.0, [0.2, 0.9, 0.3])
    assert best_run([low, high]) is high
    cut = run_of("a", 3.0, [0.95], is_complete=False)
    assert best_run([low, cut]) is low
    assert best_run([cut]) is cut
    learning = arm("a", 25, clock.taking(1.0))
    runs = train([learning], dataset(), MODEL, Schedule((1e-6, 400.0), 20.0))
    # Hardly any learning against much: validation tells them apart.
    scores = [max(e.valid.mean_reciprocal_rank for e in run.evaluations) for run in runs]
    assert scores[1] > scores[0]
    assert [run.is_chosen for run in runs] == [False, True]


def test_an_arm_is_reported_by_its_best_validation_and_not_by_its_best_test() -> None:
    compiled = run_of("compiled", 1.0, [0.05, 0.5, 0.2])
    dense = run_of("dense", 1.0, [0.04, 0.2, 1.0])
    better_test = replace(compiled.evaluations[2], test_ranks=torch.ones(4, dtype=torch.int64))
    compiled = replace(compiled, evaluations=(*compiled.evaluations[:2], better_test))
    at_time, at_epochs = compare([compiled, dense], torch.tensor([0, 0, 1, 1]))
    for found in (at_time, at_epochs):
        assert found.compiled.at is compiled.evaluations[1]
        assert found.dense.at is dense.evaluations[2]
        assert found.compiled.spent_s == 3.0


def test_at_the_same_epochs_each_arm_has_its_best_rate_so_far() -> None:
    compiled = run_of("compiled", 1.0, [0.1, 0.4])
    quick = replace(run_of("dense", 2.0, [0.3, 0.5, 0.5, 0.6]), is_chosen=False)
    steady = run_of("dense", 1.0, [0.2, 0.4, 0.6, 0.9])
    # On its way to a third epoch: of no concern at two.
    later = replace(compiled.evaluations[1], epochs=2.5, valid=Retrieval(10, 0, 0, 0, 9))
    compiled = replace(compiled, evaluations=(*compiled.evaluations, later))
    at_time, at_epochs = compare([compiled, quick, steady], torch.tensor([0, 0, 1, 1]))
    assert at_time.compiled.at is later
    assert at_time.dense.at is steady.evaluations[3]
    assert at_epochs.what == "same epochs"
    assert at_epochs.compiled.at is compiled.evaluations[1]
    assert at_epochs.dense.at is quick.evaluations[1]
    assert at_epochs.dense.spent_epochs == 2


def test_the_verdict_claims_nothing_that_chance_explains() -> None:
    same = run_of("compiled", 1.0, [0.5])
    tie, _ = compare([same, run_of("dense", 1.0, [0.5])], torch.arange(4))
    assert "neither batch is ahead" in verdict(tie)
    lost, _ = compare(
        [run_of("compiled", 1.0, [0.01]), run_of("dense", 1.0, [0.5])], torch.arange(4)
    )
    assert "dense loss (small batch) is ahead: -100.0" in verdict(lost)
    assert compare([same], torch.arange(4)) == ()


def test_at_the_same_batch_only_the_loss_function_differs() -> None:
    def biased(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return dense_loss(x, y, scale) + 0.5 * scale / scale.detach()

    data = dataset()
    honest, off = (
        run_same_batch(arm("compiled", 50, function), data, MODEL, max_steps=4, max_s=60.0)
        for function in (dense_loss, biased)
    )
    assert honest is not None
    assert off is not None
    assert honest.steps == 4
    assert honest.compiled.losses == honest.dense.losses
    assert honest.compiled.test == honest.dense.test
    assert honest.dense.peak_bytes == measure_bytes(dense_loss, 50, MODEL.dim)
    assert off.dense.losses == honest.dense.losses
    expected = max(
        abs(a - b) / b for a, b in zip(off.compiled.losses, off.dense.losses, strict=True)
    )
    assert off.largest_difference == pytest.approx(expected)
    assert off.largest_difference > 0.05


def test_at_the_same_batch_time_ends_after_two_steps_and_a_stop_at_once(clock: Clock) -> None:
    compiled = arm("compiled", 50, clock.taking(5.0))
    found = run_same_batch(compiled, dataset(), MODEL, max_steps=9, max_s=0.0)
    assert found is not None
    assert found.steps == 2
    assert found.compiled.loss_s == found.compiled.step_s == 5.0
    assert found.dense.loss_s == 0.0
    stopped = run_same_batch(compiled, dataset(), MODEL, max_steps=9, max_s=9.0, stop=lambda: True)
    assert stopped is None


def test_the_dense_loss_is_left_out_where_memory_is_short() -> None:
    needed = 2 * measure_bytes(dense_loss, 512, 16, "meta")
    assert why_not(512, 16, needed) == ""
    assert why_not(512, 16, None) == ""
    assert "512" in why_not(512, 16, needed - 1)


def test_the_dense_batch_is_the_largest_that_fits() -> None:
    budget_bytes = 400_000
    found = dense_arm(16, budget_bytes, max_batch=4096)
    assert found.measured_bytes <= budget_bytes
    assert measure_bytes(dense_loss, found.batch + 8, 16) > budget_bytes
    assert found.batch > 64
    assert dense_arm(16, budget_bytes, max_batch=64).batch == 64


def test_words_split_identifiers() -> None:
    assert words("getHTTPResponse_code2(x)", 9) == ["get", "http", "response", "code", "2", "x"]
    assert words("a b c", 2) == ["a", "b"]


def test_bags_hold_the_features_of_their_own_item_alone() -> None:
    items = ["alpha beta", "", "gamma", "alpha beta"]
    bags = hash_bags(items, torch.tensor([0, 2]), max_words=8, buckets=1 << 12)
    alone = hash_bags(["gamma"], torch.tensor([0]), max_words=8, buckets=1 << 12)
    taken = bags.take(torch.tensor([2, 1, 0, 3]))
    bounds = taken.starts.tolist()
    first, empty, third, fourth = (taken.features[start:end] for start, end in pairwise(bounds))
    assert torch.equal(first, alone.features)
    assert len(empty) == 0
    assert torch.equal(third, fourth)
    # two words, one bigram, trigrams ^al alp lph pha ha$ and ^be bet eta ta$
    assert len(third) == 2 + 1 + 5 + 4


def test_dropping_leaves_out_a_share_of_each_bag_and_repeats_with_its_seed() -> None:
    bags = Bags(torch.arange(10_000), torch.rand(10_000), torch.tensor([0, 4_000, 4_000, 10_000]))
    dropped = drop_features(bags, 0.5, torch.Generator().manual_seed(0))
    again = drop_features(bags, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.features, again.features)
    assert 0.45 < len(dropped.features) / 10_000 < 0.55
    assert torch.equal(dropped.weights, bags.weights[dropped.features])
    first, empty, last = (
        dropped.features[start:end] for start, end in pairwise(dropped.starts.tolist())
    )
    assert len(empty) == 0
    assert 0.4 < len(first) / 4_000 < 0.6
    assert first.max() < 4_000 <= last.min()
    assert len(first) + len(last) == len(dropped.features)


def test_towers_begin_alike_so_that_shared_words_already_match() -> None:
    torch.manual_seed(0)
    model = TwoTowers(1 << 12, 32)
    items = ["apple", "bridge", "castle", "donkey", "engine", "forest", "guitar", "hammer"]
    bags = hash_bags(items, torch.arange(8), max_words=8, buckets=1 << 12)

    def found() -> float:
        sim = model.text(bags) @ model.code(bags).T
        return float((sim.argmax(1) == torch.arange(8)).double().mean())

    assert found() == 1.0
    torch.nn.init.normal_(model.code.table.weight)
    assert found() < 0.5
    assert float(model.logit_scale().detach()) == pytest.approx(1 / 0.07)
