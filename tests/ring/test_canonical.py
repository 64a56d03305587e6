"""Results that do not depend on how many ranks there are, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import compile_loss
from cl_compiler.errors import ArgumentError, ScheduleError
from cl_compiler.lang.ring import CANONICAL, CANONICAL_CHUNK, canonical_obstacle
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.ring.members import CANONICAL_SHARES, canonical
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.test_plan import chosen, request
from tests.tiles import errors
from tests.zoo_case import sample

CHUNK, WIDTH = 32, 16
SHARES = ((1,), (1, 1), (2, 1, 1), (1, 0, 2, 1), (1, 1, 0, 1, 0, 1, 0, 0))


def obstacle(case) -> str:
    return canonical_obstacle(plan_sweeps(case.loss, case.positives, case.needs))


def bits(result) -> tuple[bytes, ...]:
    tensors = [torch.as_tensor(result.value), *result.gradients.values()]
    return tuple(t.detach().numpy().tobytes() for t in tensors)


def check(case, shares) -> None:
    """The same bits for every way to cut, and the reference's numbers."""
    drawn = sample(case, 4 * CHUNK, 4 * CHUNK, WIDTH, seed=len(case.name))
    found = set()
    for dtype in ("float32", "float64"):
        tile = Tile(CHUNK, CHUNK)
        source = emit_ring(case, CANONICAL, dtype=dtype, chunk=CHUNK, tile=tile, width=WIDTH)
        results = [
            run_group(source, drawn, split(case, *drawn.is_positive.shape, share), dtype=kind)
            for kind in (getattr(torch, dtype),)
            for share in shares
        ]
        found = {bits(r.result) for r in results}
        assert len(found) == 1, f"{case.name} in {dtype}: {len(found)} different results"
    plain = emit_ring(case, "ring_owner", width=WIDTH)
    cut = split(case, *drawn.is_positive.shape, SHARES[1])
    limits = errors(run_group(plain, drawn, cut).result, drawn)
    for name, error in errors(results[0].result, drawn).items():
        assert error <= max(1e-11, 3 * limits[name]), (case.name, name, error, limits[name])


@pytest.mark.parametrize("name", ["clip", "infonce_ids", "supcon", "entropy", "dual_softmax"])
def test_any_number_of_ranks_gives_the_same_bits(name):
    """Two statistics, ids, one set, a weighted mean, a statistic within another; empty shards."""
    check(next(c for c in zoo.cases() if c.name == name), SHARES)


@pytest.mark.full
@pytest.mark.parametrize("case", [c for c in zoo.cases() if not obstacle(c)], ids=lambda c: c.name)
def test_every_loss_that_can(case):
    check(case, SHARES[1:])


@pytest.mark.parametrize("ranks", [(1, 3), pytest.param((1, 2, 4, 8), marks=pytest.mark.full)])
def test_processes_give_the_same_bits(ranks):
    """Real groups; a shard that is no whole number of chunks is refused on every rank."""
    found: dict[str, set[str]] = {}
    for size in ranks:
        for rank, outcome in enumerate(launch(canonical, size)):
            digests = outcome.needed()
            text = digests.pop("refused")
            assert (
                f"multiple of {CANONICAL_CHUNK} rows" in text and "100 rows and 100 columns" in text
            )
            for what, digest in digests.items():
                found.setdefault(what, set()).add(digest)
            assert rank < len(CANONICAL_SHARES[size])
    assert len(found) > 16 and all(len(digests) == 1 for digests in found.values()), found


def test_what_cannot_be_canonical_says_why():
    by_name = {c.name: c for c in zoo.cases()}
    for name, words in (
        ("nt_xent", "two views"),
        ("moco", "bank"),
        ("batch_hard", "maximum"),
    ):
        assert words in obstacle(by_name[name]), name
    asked = replace(request("canonical", 2, 512, 8), loss=by_name["batch_hard"].loss)
    with pytest.raises(ScheduleError, match="maximum"):
        chosen(replace(asked, needs=frozenset({"x", "y"})))
    with pytest.raises(ArgumentError, match="pass group="):
        compile_loss("xeon-amx-2c", "16MiB", deterministic="canonical")


def test_canonical_is_taken_only_when_asked_for():
    plan, _ = chosen(request("canonical", 4, 2048, 64))
    assert plan.cluster.schedule == CANONICAL and plan.cluster.chunk == CANONICAL_CHUNK
    assert plan.tile == Tile(CANONICAL_CHUNK, CANONICAL_CHUNK)
    assert CANONICAL not in {
        name for name, _ in chosen(request("auto", 4, 2048, 64))[0].cluster.rejected
    }
