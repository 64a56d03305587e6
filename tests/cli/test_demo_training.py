"""Both arms are treated alike: batches, weights, epochs, seconds, memory."""

from __future__ import annotations

import time
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
from cl_compiler.cli.demo.training import (
    Dataset,
    Evaluation,
    Learner,
    ModelSettings,
    Run,
    Schedule,
    train,
    winner,
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


def slowly(seconds: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        time.sleep(seconds)
        return dense_loss(x, y, scale)

    return loss


def run_of(name: str, rate: float, scores: list[float], is_complete: bool = True) -> Run:
    """A run whose n-th evaluation has the n-th validation score, an epoch and a second each."""
    return Run(
        name,
        rate,
        is_complete,
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


def test_interleaving_does_not_change_a_run() -> None:
    data = dataset()

    def losses(arms: list[Arm]) -> list[float]:
        schedule = Schedule((1e-2,), 3)
        return [e.train_loss for r in train(arms, data, MODEL, schedule) for e in r.evaluations][:3]

    alone = losses([arm("a", 25)])
    beside = losses([arm("a", 25), arm("b", 50)])
    assert alone == beside[:3]


def test_training_learns_and_an_epoch_is_what_it_says() -> None:
    runs = train([arm("a", 30), arm("b", 64)], dataset(), MODEL, Schedule((3e-3,), 10))
    for run, batch in zip(runs, (30, 64), strict=True):
        within = [each for each in run.evaluations if each.whole_epochs <= 10]
        assert [each.whole_epochs for each in within] == list(range(1, 11))
        assert [each.steps for each in within] == [100 * k // batch for k in range(1, 11)]
        assert run.is_complete
        assert within[-1].valid.mean_reciprocal_rank > 0.9
        assert within[0].valid.mean_reciprocal_rank < 0.8


def test_the_quicker_arm_goes_on_until_seconds_are_equal() -> None:
    arms = [arm("slow", 50, slowly(0.4)), arm("quick", 50, slowly(0.01))]
    slow, quick = train(arms, dataset(), MODEL, Schedule((1e-3,), 3))
    assert slow.evaluations[-1].whole_epochs == 3
    assert quick.evaluations[-1].whole_epochs > 3
    # It stops after the step during which the slow arm's time was reached.
    assert quick.evaluations[-1].seconds >= slow.evaluations[-1].seconds
    assert quick.evaluations[-1].steps * 0.01 < slow.evaluations[-1].seconds


def test_stopping_leaves_both_arms_equally_far() -> None:
    steps = 0

    def progress(what: str, epochs: float) -> None:
        nonlocal steps
        steps += 1

    arms = [arm("a", 10), arm("b", 50)]
    schedule = Schedule((1e-3, 1e-2), 50, stop=lambda: steps >= 37, progress=progress)
    first, second = train(arms, dataset(), MODEL, schedule)
    assert {first.rate, second.rate} == {1e-3}
    assert not first.is_complete
    assert abs(first.evaluations[-1].epochs - second.evaluations[-1].epochs) <= 0.5
    assert first.evaluations[-1].steps + second.evaluations[-1].steps == 37


def test_the_rate_is_chosen_on_validation_within_the_common_epochs() -> None:
    early, late = run_of("a", 1.0, [0.3, 0.4]), run_of("a", 2.0, [0.2, 0.3, 0.9])
    assert winner([early, late], "a", epochs=2) is early
    assert winner([early, late], "a", epochs=3) is late
    cut = run_of("a", 3.0, [0.8], is_complete=False)
    assert winner([early, cut], "a", epochs=2) is early
    assert winner([cut], "a", epochs=2) is cut
    assert winner([early], "b", epochs=2) is None


def test_each_comparison_ends_where_the_shorter_run_ends() -> None:
    compiled, dense = run_of("compiled", 1.0, [0.05, 0.5]), run_of("dense", 1.0, [0.04, 0.2, 1.0])
    at_epochs, at_seconds = compare(compiled, dense, torch.tensor([0, 0, 1, 1]))
    assert at_epochs.what == "equal epochs"
    assert at_seconds.what == "equal seconds"
    for comparison in (at_epochs, at_seconds):
        assert comparison.dense.spent_epochs == 2
        assert comparison.compiled.at is compiled.evaluations[1]
        assert comparison.dense.at is dense.evaluations[1]


def test_a_state_between_two_epochs_is_not_compared_at_equal_epochs() -> None:
    compiled = run_of("compiled", 1.0, [0.05, 0.5])
    dense = run_of("dense", 1.0, [0.04, 0.2])
    later = replace(dense.evaluations[1], epochs=2.4, seconds=2.0, valid=Retrieval(10, 0, 0, 0, 9))
    dense = replace(dense, evaluations=(*dense.evaluations, later))
    at_epochs, at_seconds = compare(compiled, dense, torch.tensor([0, 0, 1, 1]))
    assert at_epochs.dense.at is dense.evaluations[1]
    assert at_epochs.dense.spent_epochs == 2
    assert at_seconds.dense.at is later


def test_the_verdict_claims_nothing_that_chance_explains() -> None:
    same = run_of("compiled", 1.0, [0.5])
    (tie, _) = compare(same, run_of("dense", 1.0, [0.5]), torch.arange(4))
    assert "neither arm is ahead" in verdict(tie)
    (lost, _) = compare(run_of("compiled", 1.0, [0.01]), same, torch.arange(4))
    assert "dense arm (small batch) is ahead: -100.0" in verdict(lost)


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


def test_dropping_zeroes_a_share_and_repeats_with_its_seed() -> None:
    bags = Bags(
        torch.zeros(10_000, dtype=torch.int64), torch.ones(10_000), torch.tensor([0, 10_000])
    )
    dropped = drop_features(bags, 0.5, torch.Generator().manual_seed(0))
    again = drop_features(bags, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.weights, again.weights)
    assert 0.45 < float((dropped.weights == 0).double().mean()) < 0.55


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
