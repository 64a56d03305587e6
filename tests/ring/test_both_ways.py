"""Shards that travel both ways around the ring at once: half of the ranks each way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.ring import BOTH_WAYS
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.clock import Clock, links_of
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.exchange import hops_of
from cl_compiler.plan.lines import lines_of
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.report import explain
from cl_compiler.plan.simulate import run
from cl_compiler.plan.travel import Travel
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.plan.work import Work
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.ring import run_ranks
from tests import losses_zoo as zoo
from tests.ring.members import posted
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, run_group, schedules_of, split
from tests.ring.test_plan import Counting, Mirror, arguments, load, request
from tests.tiles import errors
from tests.zoo_case import sample

NAMES = ("clip", "supcon", "infonce_ids", "dual_softmax", "siglip")
"""Two statistics, one set, ids, a statistic within another, none."""
SHARES = ((1,), (1, 1), (3, 1, 2), (2, 0, 3, 1), (1, 2, 0, 1, 3, 1, 1, 2))


@pytest.mark.parametrize(
    "name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.full) for name in NAMES[2:])]
)
def test_losses_on_any_number_of_ranks(name):
    """Odd and even numbers, uneven and empty shards."""
    case = next(c for c in zoo.cases() if c.name == name)
    assert BOTH_WAYS in schedules_of(case)
    source = emit_ring(case, BOTH_WAYS)
    for shares in SHARES:
        drawn = sample(case, 21, 27, seed=len(shares))
        cut = split(case, *drawn.is_positive.shape, shares)
        found = run_group(source, drawn, cut)
        assert len(set(found.values)) == 1
        assert max(errors(found.result, drawn).values()) < 1e-11, shares


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_each_neighbour_gets_half(ranks):
    """Of P-1 shards a pass sends [P/2] on and the rest back, in a group of their own; u·e each."""
    rows, width = 48, 24
    plan, module = load(request(BOTH_WAYS, ranks, rows, width), chunk=16)
    u = rows * width

    def sent(hub, rank):
        to: dict[tuple[int, bool], int] = {}
        ring = Counting(hub, rank, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
        plain = ring._send

        def counted(tensors, target, second):
            matrices = [t for t in tensors if t.dim() > 1]
            size = sum(t.numel() * t.element_size() for t in matrices)
            to[target, second] = to.get((target, second), 0) + size
            plain(tensors, target, second)

        ring._send = counted
        module.Loss.apply(ring, *arguments(plan.problem))[0].backward()
        return {target: count for target, count in to.items() if count}

    passes = 3  # of the forward, and of each gradient
    on, back = ranks // 2 * passes * u * 4, (ranks - 1) // 2 * passes * u * 4
    cluster = plan.cluster
    assert (cluster.forward_bytes, cluster.backward_bytes) == (
        (ranks - 1) * u * 4,
        2 * (ranks - 1) * u * 4,
    )
    for rank, to in enumerate(run_ranks(ranks, sent)):
        wanted = {((rank + 1) % ranks, False): on, ((rank - 1) % ranks, True): back}
        assert to == {target: count for target, count in wanted.items() if count}


@pytest.mark.full
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_rank_holds_what_was_predicted(ranks):
    plan, module = load(request(BOTH_WAYS, ranks, 1024, 256))
    rows, inputs = (1024,) * ranks, arguments(plan.problem)
    ring = Mirror(ranks, {"rows": rows, "cols": rows})
    with LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    assert abs(live.peak_bytes - plan.peak_bytes) <= 0.01 * plan.peak_bytes


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_send_and_hold_what_was_planned(ranks):
    """Four ranks are in ``test_plan``."""
    u = 1024 * 128
    for rank, outcome in enumerate(launch(posted, ranks, [BOTH_WAYS], 1024, 128)):
        of = outcome.needed()[BOTH_WAYS]
        assert sum(of["sent"].values()) == of["planned_sent"] == (ranks - 1) * 3 * u * 4
        assert len(of["sent"]) == ranks - 1 and rank not in of["sent"]
        assert abs(of["live"] - of["planned_live"]) <= 0.05 * of["planned_live"], of


def with_links(spec: HardwareSpec, **changes) -> HardwareSpec:
    return replace(spec, links=tuple(replace(link, **changes) for link in spec.links))


def step_seconds(spec: HardwareSpec, products_s: float) -> float:
    """One pass in one chunk of a megabyte; statistics and sums cost next to nothing."""
    ranks = spec.world_size
    clock = Clock(links_of(spec, ranks), np.ones(ranks))
    work = [Work(Travel("forward", 1000, 0), products_s)]
    lines = lines_of(spec, BOTH_WAYS, ranks)
    return run(clock, BOTH_WAYS, work, 1000, 1000, 1, 4, lines=lines).seconds


def test_simulated_links_are_used_both_ways():
    """Products next to nothing: [P/2] messages where neighbours have wires of their own, and as
    many as on a ring where both ways leave by the same; products alone: P of them."""
    spec = load_hardware("mi300x8")
    message_s = 1e6 / spec.links[0].bandwidth_bytes_per_s
    own, shared = spec, with_links(spec, point_to_point=False)
    for of, messages in ((own, 4), (shared, 7)):
        latency_s = messages * spec.links[0].latency_s
        found = step_seconds(of, 1e-9)
        assert messages * message_s < found < messages * message_s * 1.02 + 3 * latency_s
        assert step_seconds(of, 1.0) == pytest.approx(8.0, rel=1e-3)


def test_which_hops_are_twice_as_fast():
    """Wires of their own, and a network that another rank of the node reaches the other way."""

    def sends(spec: HardwareSpec) -> list[int]:
        from cl_compiler.hardware.graph import hardware_graph

        machine = machine_of(hardware_graph(spec))
        return [hop.sends for hop in hops_of(BOTH_WAYS, machine, machine.ranks)]

    assert sends(load_hardware("mi300x8")) == [4]
    assert sends(load_hardware("h100x8")) == [7]
    assert sends(load_hardware("a800-4x8")) == [16, 31]
    assert sends(with_links(load_hardware("mi300x8"), full_duplex=False)) == [7]
    with pytest.raises(HardwareError, match="point_to_point = 'yes'"):
        with_links(load_hardware("mi300x8"), point_to_point="yes")


def test_planned_where_links_are_slow():
    """What is sent takes half as long; where links are shared it is no better than a ring."""
    spec, needs = load_hardware("mi300x8"), frozenset({"z", "logit_scale"})
    slow = tuple(
        replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / 16) for link in spec.links
    )
    spec = replace(spec, links=slow)
    problem, budget = Problem(4096, 4096, 768, "bfloat16"), MemoryBudget.parse("16GiB")
    asked = Request(find("nt_xent"), spec, budget, problem, "views", needs, "bf16", "auto", 0, 8)
    sweeps = plan_sweeps(asked.loss, "views", needs)
    plan, _ = choose_cluster_plan(asked, sweeps)
    assert plan.cluster.schedule == BOTH_WAYS and f"{BOTH_WAYS}: chunks" in explain(plan)
    ring, _ = choose_cluster_plan(replace(asked, schedule="ring_owner"), sweeps)
    assert plan.cluster.exchange_s == pytest.approx(ring.cluster.exchange_s * 4 / 7)
    switched = replace(asked, hardware=with_links(spec, point_to_point=False))
    plan, _ = choose_cluster_plan(switched, sweeps)
    assert plan.cluster.schedule != BOTH_WAYS
