"""One set with itself on half rings: two shards meet once, and a tile stands for its transpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cl_compiler import lang as cl
from cl_compiler.errors import ScheduleError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.ring import HALF_RING
from cl_compiler.losses import find
from cl_compiler.plan.report import explain
from cl_compiler.plan.simulate import simulate
from cl_compiler.plan.travel import shards_sent
from cl_compiler.plan.types import MemoryBudget, Problem, Tile
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.ring import run_ranks
from tests import losses_zoo as zoo
from tests.ring.members import posted
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, split
from tests.ring.test_plan import Counting, Mirror, chosen, load, request
from tests.tiles import errors
from tests.zoo_case import Case, sample

ONE_SET = [case for case in zoo.cases() if case.loss.is_single_set]
SHARES = ((1, 1), (3, 1, 2), (2, 0, 3, 1))
MORE_SHARES = (
    (1,),
    (0, 1),
    (1, 2, 1, 1, 3),
    (1, 0, 2, 1, 3, 1),
    (1,) * 7,
    (1, 2, 0, 1, 3, 1, 1, 2),
)


@cl.define_loss
def hardest_other(margin):
    """Of one set: the most similar row that is no view of this one."""
    s = cl.similarity(cl.z, cl.z)
    hardest = cl.max(s, over=cl.cols, where=~cl.is_self & ~cl.is_positive)
    return cl.mean(cl.relu(margin + hardest - cl.at_positive(s, on=cl.rows)), over=cl.rows)


def check(case: Case, shares, *, rows: int = 22, limit: float = 1e-11, **how) -> None:
    drawn = sample(case, rows, rows, how.pop("width", 6), seed=rows + len(shares))
    cut = split(case, *drawn.is_positive.shape, shares)
    kind = how.get("dtype", "float64")
    found = run_group(emit_ring(case, HALF_RING, **how), drawn, cut, dtype=getattr(torch, kind))
    assert len(set(found.values)) == 1, "the value must be the same on every rank"
    worst = errors(found.result, drawn)
    assert max(worst.values()) < limit, (shares, how, worst)


@pytest.mark.parametrize("case", ONE_SET, ids=lambda case: case.name)
def test_losses_of_one_set(case):
    """Uneven and empty shards; chunks that end inside of a tile, and tiles that are not square."""
    for chunk, shares in zip((5, 1, 4), SHARES, strict=True):
        check(case, shares, chunk=chunk)


@pytest.mark.full
@pytest.mark.parametrize("shares", MORE_SHARES, ids=str)
@pytest.mark.parametrize("case", ONE_SET, ids=lambda case: case.name)
def test_any_number_of_ranks(case, shares):
    for chunk in (1, 4, 5, 64):
        check(case, shares, chunk=chunk, tile=Tile(3, 3))
        check(case, shares, chunk=chunk, tile=Tile(4, 2))


def test_a_maximum_must_be_found_again():
    """A tile on the diagonal has every pair twice, and products need not be symmetric."""
    case = Case("hardest_other", hardest_other, {"margin": 0.2}, positives="views")
    with pytest.raises(ScheduleError, match="bits of its transpose"):
        emit_ring(case, HALF_RING)


def test_gradients_that_nobody_needs_are_not_made():
    case = next(c for c in ONE_SET if c.name == "nt_xent")
    drawn = sample(case, 20, 20, 6, seed=4)
    cut = split(case, *drawn.is_positive.shape, (1, 2, 1))
    for needs in (frozenset(), frozenset({"logit_scale"})):
        text = emit_ring(case, HALF_RING, needs=needs)
        found = run_group(text, drawn, cut).result
        assert "addmm_(t0.T" not in text
        assert set(found.gradients) == needs
        worst = errors(found, drawn)
        assert max(worst[name] for name in ("value", *needs)) < 1e-11


def test_logits_beyond_the_range_of_exponentials():
    """Running maxima, of rows that stay and of rows that travel; see ``test_numerics``."""
    case = next(c for c in ONE_SET if c.name == "supcon")
    drawn = sample(case, 24, 24, 8, seed=9)
    with torch.no_grad():
        drawn.tensors["z"].mul_(20.0)
    z = drawn.tensors["z"].detach()
    scale = float(drawn.parameters["logit_scale"].detach())
    largest = scale * float((z @ z.T).fill_diagonal_(0.0).abs().max())
    assert largest > 1000
    cut = split(case, *drawn.is_positive.shape, (3, 0, 2, 2))
    text = emit_ring(case, HALF_RING, dtype="float32", width=8)
    found = errors(run_group(text, drawn, cut, dtype=torch.float32).result, drawn)
    assert max(found.values()) < 2.0**-23 * largest, found


@pytest.mark.parametrize(("ranks", "rows"), [(1, 12), (3, 12), (4, 12)])
def test_every_two_shards_meet_once(ranks, rows):
    """Tiles of both sides of the diagonal are made once, those on it whole."""
    case, tile = next(c for c in ONE_SET if c.name == "nt_xent"), 3
    module = load_source(emit_ring(case, HALF_RING, chunk=4, tile=Tile(tile, tile)), "test")
    drawn = sample(case, ranks * rows, ranks * rows, 6, seed=ranks)
    plain, areas = module._meetings, []

    def counted(i, i1, *rest):
        for j, j1, twice in plain(i, i1, *rest):
            areas.append((i1 - i) * (j1 - j))
            yield j, j1, twice

    module._meetings = counted
    z = drawn.tensors["z"].detach()
    scale = drawn.parameters["logit_scale"].detach()

    def run(hub, rank):
        ring = Counting(hub, rank, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
        return module.forward(ring, z[rank * rows : (rank + 1) * rows], scale)[0]

    run_ranks(ranks, run)
    whole = ranks * rows
    assert sum(areas) == (whole * whole + whole * tile) // 2


def asked_for(ranks: int, rows: int, width: int, schedule: str = HALF_RING, budget: str = "1GiB"):
    needs = frozenset({"z", "logit_scale"})
    asked = request(schedule, ranks, rows, width, budget)
    return replace(asked, loss=find("nt_xent"), positives="views", needs=needs)


def arguments(problem: Problem):
    z = torch.nn.functional.normalize(torch.randn(problem.M, problem.D), dim=1)
    return [z.requires_grad_(), torch.tensor(10.0, requires_grad=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_send_what_the_formulas_say(ranks):
    """With u = rows·D: [P/2]ue forward, [P/2]u(e+4) backward."""
    rows, width = 48, 24
    plan, module = load(asked_for(ranks, rows, width), chunk=16)

    def sent(hub, rank):
        ring = Counting(hub, rank, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
        module.Loss.apply(ring, *arguments(plan.problem))[0].backward()
        return ring.matrix_bytes

    u = rows * width
    assert plan.cluster.forward_bytes == ranks // 2 * u * 4
    assert plan.cluster.backward_bytes == ranks // 2 * u * (4 + 4)
    assert shards_sent(HALF_RING, ranks) == ranks // 2
    total = plan.cluster.forward_bytes + plan.cluster.backward_bytes
    assert run_ranks(ranks, sent) == [total] * ranks


def test_own_pieces_are_computed_in_tiles_no_wider_than_a_chunk(monkeypatch):
    """Pieces of as many tiles are not of as many columns, and tiles are what a rank holds."""
    monkeypatch.setattr("cl_compiler.plan.cluster.LEAST_CHUNK", 128)
    plan, module = load(asked_for(4, 1024, 64))
    assert plan.cluster.chunk == 128 < plan.tile.cols
    ring, inputs = Mirror(4, {"rows": (1024,) * 4, "cols": (1024,) * 4}), arguments(plan.problem)
    with LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    assert abs(live.peak_bytes - plan.peak_bytes) <= 0.01 * plan.peak_bytes


@pytest.mark.parametrize("tile", [32, 256, 1024, 4096])
def test_own_pieces_are_of_as_many_tiles(tile, monkeypatch):
    _, module = load(asked_for(4, 1024, 64))
    monkeypatch.setattr(module, "TILE_M", tile)
    operand = [torch.empty(0, 64)]
    pieces = module._own_pieces(1024, 8, operand, operand)
    met = [min(1024, (column // tile + 1) * tile) for column in range(1024)]
    for index, (first, past) in enumerate(pieces):
        eighths = {0: 0.5, 8: 0.5}.get(index, 1.0)  # half of a piece is left to the last one
        assert abs(sum(met[first:past]) - eighths / 8 * sum(met)) <= max(met)
    assert pieces[0][0] == 0 and pieces[-1][1] == 1024


@pytest.mark.full
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_rank_holds_what_was_predicted(ranks):
    """Processes of four ranks are in ``test_plan``, too."""
    plan, module = load(asked_for(ranks, 1024, 256))
    rows, inputs = (1024,) * ranks, arguments(plan.problem)
    ring = Mirror(ranks, {"rows": rows, "cols": rows})
    with LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    assert abs(live.peak_bytes - plan.peak_bytes) <= 0.01 * plan.peak_bytes


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_send_and_hold_what_was_planned(ranks):
    """A shard goes to the neighbour, its gradient home; four ranks are in ``test_plan``."""
    rows, width = 1024, 128
    u = rows * width
    for rank, outcome in enumerate(launch(posted, ranks, [HALF_RING], rows, width)):
        of = outcome.needed()[HALF_RING]
        after, home = (rank + 1) % ranks, (rank - 1) % ranks
        assert sum(of["sent"].values()) == of["planned_sent"] == u * (4 + 8)
        assert of["sent"][after] >= u * (4 + 4) and of["sent"][home] >= u * 4
        assert abs(of["live"] - of["planned_live"]) <= 0.05 * of["planned_live"], of
        assert of["chunk"] < rows


def test_planned_where_products_take_longest():
    """Half of the tiles, each with both products: 2 of 3 units, and the diagonal's tiles."""
    plan, program = chosen(asked_for(8, 4096, 256, "auto"))
    assert plan.cluster.schedule == HALF_RING
    units = 2 + plan.tile.rows / plan.problem.M / 2
    assert plan.units / 8 == pytest.approx(units, rel=1e-6)
    other, _ = chosen(asked_for(8, 4096, 256, "ring_travel"))
    assert other.units / 8 == pytest.approx(3)
    text = explain(plan)
    assert HALF_RING in text and "not ring_owner" in text
    assert program.passes[-1].symmetric
    with pytest.raises(ScheduleError, match=r"rows with cols.*Usable: ring_owner"):
        chosen(request(HALF_RING, 4, 1024, 64))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_simulated_products_are_those_of_half_the_matrix(ranks):
    """Without links to wait for, the slowest rank computes what was planned."""
    asked = asked_for(ranks, 4096, 256)
    spec = with_ranks(load_hardware("xeon-amx-2c"), ranks, ranks)
    plan, program = chosen(replace(asked, hardware=spec, budget=MemoryBudget.parse("1GiB")))
    found = simulate(plan, program, spec)
    products = plan.seconds - plan.cluster.exposed_s
    joined = found.compute_s - products
    assert 0 <= joined < 0.1 * products
    assert found.seconds >= found.compute_s
