"""Losses on shards in real processes, against float64: as exact as dense PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests import losses_zoo as zoo
from tests.dense_fp32 import dense
from tests.ring.numerics import WIDTH, Job, drawn, numpy_results
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, schedules_of, together
from tests.tiles import Result, errors

LOSSES = ("clip", "siglip", "infonce_ids", "nt_xent", "supcon", "dual_softmax", "debiased")
"""One of each kind: two statistics, none, ids, views, ids of one set, a statistic in another, the
difference of two."""
SHARES = {1: (1,), 2: (3, 2), 3: (2, 0, 1), 4: (1, 2, 3, 1), 8: (1, 2, 0, 1, 3, 1, 1, 2)}


def check(jobs: list[Job], ranks: int) -> None:
    everyone = [outcome.needed() for outcome in launch(numpy_results, ranks, jobs)]
    for number, job in enumerate(jobs):
        whole, cut = drawn(job)
        values = {results[number][0] for results in everyone}
        assert len(values) == 1, "the value must be the same on every rank"
        parts = [results[number][1] for results in everyone]
        grads = {
            name: together(whole, cut, name, [torch.from_numpy(p[name]) for p in parts])
            for name in parts[0]
        }
        found = errors(Result(torch.tensor(values.pop()), grads, {}), whole)
        dense_errors = errors(dense(whole, job.dtype), whole)
        for name, error in found.items():
            assert error <= max(2e-6, 3 * dense_errors[name]), (job, name, error)


def jobs_for(ranks: int, losses: tuple[str, ...], every: bool) -> list[Job]:
    jobs = []
    for turn, name in enumerate(losses):
        usable = schedules_of(drawn(Job(name, "", SHARES[ranks], 0))[0].case)
        if ranks % 2 or ranks == 2:  # one node of two, or nodes of one
            usable.remove("two_level")
        chosen = usable if every else [usable[(turn + ranks) % len(usable)]]
        jobs += [Job(name, schedule, SHARES[ranks], turn + ranks) for schedule in chosen]
    return jobs


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_losses_are_as_exact_as_dense_pytorch(ranks):
    """Uneven and empty shards; schedules take turns."""
    check(jobs_for(ranks, LOSSES, every=False), ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_schedule_is_as_exact(ranks):
    check(jobs_for(ranks, LOSSES, every=True), ranks)


MISSES = {
    "debiased_clamped": "ring_travel on 2, 0, 1 rows: d tau_plus is off by 4.2e-5, dense by 4.4e-6"
}
"""Known to miss, on CPUs with AVX2 and with AVX-512: terms cancel there, and dense happens to be
right.  Over many inputs neither is more exact (below)."""
CASES = [
    pytest.param(c, id=c.name, marks=pytest.mark.xfail(reason=MISSES[c.name], strict=False))
    if c.name in MISSES
    else pytest.param(c, id=c.name)
    for c in zoo.cases()
]


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_every_loss_is_as_exact(case):
    """All schedules that it can use, on threads; uneven and empty shards."""
    worse = []
    for ranks, shares in SHARES.items():
        job = Job(case.name, "", shares, 11 + ranks)
        whole, cut = drawn(job)
        dense_errors = errors(dense(whole, torch.float32), whole)
        for schedule in schedules_of(case):
            node = 2 if ranks % 2 == 0 else ranks
            source = emit_ring(case, schedule, dtype="float32", width=WIDTH, node=node)
            found = errors(run_group(source, whole, cut, dtype=torch.float32).result, whole)
            worse += [
                (schedule, shares, name, error, dense_errors[name])
                for name, error in found.items()
                if not error <= max(2e-6, 3 * dense_errors[name])
            ]
    assert not worse


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel"])
def test_what_cancels_is_as_exact_as_dense_pytorch_over_many_inputs(schedule):
    """Of the loss that misses on one: any other input may favour either, and none of them does."""
    (name,) = MISSES
    case = next(c for c in zoo.cases() if c.name == name)
    source = emit_ring(case, schedule, dtype="float32", width=WIDTH)
    found, dense_found = [], []
    for seed in range(100, 140):
        whole, cut = drawn(Job(name, "", SHARES[3], seed))
        result = run_group(source, whole, cut, dtype=torch.float32).result
        found.append(errors(result, whole)["tau_plus"])
        dense_found.append(errors(dense(whole, torch.float32), whole)["tau_plus"])
    ours, theirs = (torch.tensor(e, dtype=torch.float64) for e in (found, dense_found))
    for part in (0.25, 0.5, 0.75, 0.9, 1.0):
        assert ours.quantile(part) <= max(2e-6, 3 * theirs.quantile(part)), part
    assert int((ours > 3 * theirs).sum()) <= 2 * int((theirs > 3 * ours).sum())


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather"])
def test_logits_beyond_the_range_of_exponentials(schedule):
    """Sums that lost terms on one rank: all ranks redo the sweep, with running maxima.

    A logit of s is rounded by up to 2^-24·s where it is made, and again where it is remade.
    """
    whole, cut = drawn(Job("clip", schedule, (3, 0, 2), 5, scale=20.0))
    logits = 7.0 * whole.tensors["x"].detach() @ whole.tensors["y"].detach().T
    source = emit_ring(whole.case, schedule, dtype="float32", width=WIDTH)
    found = errors(run_group(source, whole, cut, dtype=torch.float32).result, whole)
    assert float(logits.abs().max()) > 1000
    assert max(found.values()) < 2.0**-23 * float(logits.abs().max()), found
