"""In which order a rank posts, computes and waits: what is its own hides messages at both ends."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
import torch

from benchmarks.rings import shards_of
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.travel import Travel, travels_of
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.ring import LoopbackRing, run_ranks
from tests import losses_zoo as zoo
from tests.ring.shards import emit_ring
from tests.ring.test_plan import Mirror, request

WIDTH = 512


class Logged(Mirror):
    """Also: what was posted, "rows" (ones) or "gradients" (others), and what was waited for."""

    def __init__(self, ranks: int, rows: int, log: list) -> None:
        super().__init__(ranks, {"rows": (rows,) * ranks})
        self.log = log

    def exchange(self, sent, received, *peers):
        super().exchange(sent, received, *peers)
        kinds = ["rows" if (t == 1.0).all() else "gradients" for t in sent]
        self.log += [(f"post {kind}", len(sent[0])) for kind in kinds]
        return kinds

    def wait(self, posted):
        self.log += [("wait", kind) for kind in posted]


def order_of(module: ModuleType, ranks: int, rows: int, gradients: bool) -> list:
    """Of one pass of shards of so many rows: the calls, and what was computed between them."""
    log: list = []
    x, home = torch.ones(rows, WIDTH), torch.zeros(rows, WIDTH)
    folds = [(module.SUM, home)] if gradients else []
    for first, (part,), into in module._shards(Logged(ranks, rows, log), "rows", (x,), folds):
        log.append(("own" if first != module.FAR else "other", len(part)))
        for gradient in into:
            gradient.fill_(2.0)
    return log


def test_own_rows_are_computed_while_the_first_message_comes_and_the_last_goes_home():
    """Two ranks, two chunks: rows and gradients are as long, so the own shard is shifted by half of
    a chunk.  The second chunk comes while the first is computed, in the other buffer."""
    assert order_of(shards_of(256), 2, 512, gradients=True) == [
        ("post rows", 256),
        ("own", 128),
        ("wait", "rows"),
        ("post rows", 256),
        ("other", 256),
        ("post gradients", 256),
        ("own", 256),
        ("wait", "rows"),
        ("other", 256),
        ("wait", "gradients"),
        ("post gradients", 256),
        ("own", 128),
        ("wait", "gradients"),
    ]


def test_one_chunk_on_three_ranks():
    assert order_of(shards_of(256), 3, 256, gradients=True) == [
        ("post rows", 256),
        ("own", 128),
        ("wait", "rows"),
        ("post rows", 256),
        ("other", 256),
        ("post gradients", 256),
        ("wait", "rows"),
        ("other", 256),
        ("wait", "gradients"),
        ("post gradients", 256),
        ("own", 128),
        ("wait", "gradients"),
    ]


def test_without_gradients_nothing_is_held_back():
    """Nothing comes home: all of the own rows are there to hide the first message."""
    found = order_of(shards_of(256), 2, 512, gradients=False)
    assert [step for step in found if step[0] == "own"] == [("own", 256), ("own", 256)]
    assert found[-1] == ("other", 256)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_row_meets_every_rank_once(ranks):
    """Shards of any lengths, some empty: ranks count themselves into every row's accumulator."""
    chosen = random.Random(ranks)
    for _ in range(6):
        lengths = [chosen.choice([0, 1, 7, 16, 33, 50]) for _ in range(ranks)]
        lengths[chosen.randrange(ranks)] = chosen.randint(1, 50)
        module = shards_of(chosen.choice([1, 5, 16, 64]))

        def met(hub, rank, lengths=lengths, module=module):
            ring = LoopbackRing(hub, rank, {"rows": tuple(lengths)})
            x = torch.full((lengths[rank], 3), float(rank))
            home, own = torch.zeros(lengths[rank], 3), []
            for first, (part,), (counts,) in module._shards(ring, "rows", (x,), [((0.0,), home)]):
                counts.add_(1 + 10 * part)
                if first != module.FAR:
                    own += range(first, first + len(part))
            return own, home

        for rank, (own, home) in enumerate(run_ranks(ranks, met, timeout_s=20.0)):
            assert own == list(range(lengths[rank])), lengths
            assert (home == ranks * (1 + 10 * rank)).all(), lengths


@pytest.mark.parametrize(
    ("operand", "accumulator", "eighths"),
    [(torch.float32, torch.float32, 4), (torch.bfloat16, torch.float32, 5)],
)
def test_the_simulator_holds_back_as_much(operand, accumulator, eighths):
    travel = Travel("backward", WIDTH, WIDTH)
    assert travel.held_back(operand.itemsize, accumulator.itemsize) == eighths / 8
    sent = torch.empty(0, WIDTH, dtype=operand)
    home = [torch.empty(0, WIDTH, dtype=accumulator), torch.empty(0)]
    *pieces, last = shards_of(256)._own_pieces(2048, 8, [sent], home)
    assert len(pieces) == 8 and pieces[0] == (0, 256 - 32 * eighths)
    assert last == (2048 - 32 * eighths, 2048)


def test_where_a_maximum_is_found_again_no_rows_are_held_back():
    """A later sweep looks for its elements bit for bit, in tiles that must be cut alike."""
    cases = {case.name: case for case in zoo.cases()}
    for name, holds in (("batch_hard", False), ("squared_hinge", True)):
        assert ("_own_pieces" in emit_ring(cases[name], "ring_travel")) == holds
    asked = request("ring_travel", 3, 1024, 64)
    _, program = choose_cluster_plan(asked, plan_sweeps(find("clip"), "paired", asked.needs))
    held = [t.held_back(4, 4) for t in travels_of(program, asked.problem)]
    assert held == [0.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_fill_no_node_are_refused(ranks):
    """An emitted file of rings of rings, on its own."""
    case = next(case for case in zoo.cases() if case.name == "clip")
    module = load_source(emit_ring(case, "two_level", node=4), "nodes")
    with pytest.raises(
        ValueError, match=f"{ranks} ranks are not nodes of NODE = 4: use a multiple"
    ):
        next(module._shards(Mirror(ranks, {"cols": (5,) * ranks}), "cols", (torch.ones(5, 3),)))
