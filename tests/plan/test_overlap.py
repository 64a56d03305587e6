"""What products hide, against the closed forms of a ring and against the simulator."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from cl_compiler.errors import CompilerError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.lang.ring import CLUSTER_SCHEDULES, build_ring_program
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.clock import Clock, links_of, links_of_levels
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.exchange import Hop, hiding_rows
from cl_compiler.plan.lines import lines_of
from cl_compiler.plan.link_bytes import bytes_per_link
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.overlap import phases_of
from cl_compiler.plan.report import explain
from cl_compiler.plan.simulate import run, simulate
from cl_compiler.plan.types import Problem, Request
from cl_compiler.plan.wires import Wires
from cl_compiler.plan.work import work_of
from tests.plan.test_simulate import planned, request

# ---- the closed form ----------------------------------------------------------------------------

FLAT = {  # (FLOP/s, bytes/s of a link) -> rows: forward, backward of B, backward of C
    (200e12, 22e9): (9.1e3, 9.1e3, 4.5e3),  # 32 A800, one ring
    (600e12, 45e9): (13e3, 13e3, 6.7e3),  # 1024 H100, one ring
    (140e12, 10e9): (14e3, 14e3, 7e3),  # two 4090 over PCIe
}
ONE_NODE = {  # with latency, at widths from 256 to 4096: (least, most) rows
    (200e12, 160e9): ((1.3e3, 2.2e3), (1.3e3, 1.6e3), (0.6e3, 1.3e3)),  # 8 A800
    (600e12, 360e9): ((1.7e3, 3.4e3), (1.7e3, 2.5e3), (0.8e3, 2.2e3)),  # 8 H100
}
PHASES = (("ring_owner", "forward"), ("ring_travel", "backward"), ("ring_owner", "backward"))


def hidden_from(
    schedule: str, phase: str, width: int, flops_per_s: float, hop: Hop
) -> tuple[int, float]:
    """(b* by the planner's function, w·F / 2nβ) of one phase of clip in bf16."""
    problem = Problem(4096, 4096, width, "bfloat16")
    sweeps = plan_sweeps(find("clip"), "paired", frozenset({"x", "y", "logit_scale"}))
    program = build_ring_program(sweeps, owner_computes=schedule == "ring_owner")
    (of,) = (p for p in phases_of(program, problem) if p.name == phase)
    units = {"ring_owner": 5, "ring_travel": 4}[schedule]
    work = units * of.share
    assert work == pytest.approx({"forward": 1, "backward": units - 1}[phase])
    products_s = work * 2 * problem.M * problem.N * width / flops_per_s
    found = hiding_rows(products_s, problem, of.shard_bytes, (hop,))
    wire = of.shard_bytes / problem.M / width
    return found, wire * flops_per_s / (2 * work * hop.steps * hop.bytes_per_s)


@pytest.mark.parametrize("cluster", FLAT)
def test_the_batch_that_hides_communication_is_the_tables(cluster):
    """Published to two digits; no latency, so it depends on neither ranks nor width."""
    for (schedule, phase), wanted in zip(PHASES, FLAT[cluster], strict=True):
        for width in (512, 1024):
            hop = Hop(cluster[1], 0.0, 7, 1)
            found, limit = hidden_from(schedule, phase, width, cluster[0], hop)
            assert abs(found - limit) <= 1
            digit = 10 ** (len(str(int(wanted))) - 2)
            assert abs(found - wanted) <= 0.5 * digit + 1, (schedule, phase, found)


@pytest.mark.parametrize("cluster", ONE_NODE)
def test_latency_raises_it_within_the_tables_range(cluster):
    """3.4 µs a hop: narrow embeddings need more rows, wide ones tend to the limit."""
    for (schedule, phase), (least, most) in zip(PHASES, ONE_NODE[cluster], strict=True):
        hop = Hop(cluster[1], 3.4e-6, 7, 1)
        found = [
            hidden_from(schedule, phase, width, cluster[0], hop)[0]
            for width in (256, 512, 1024, 4096)
        ]
        assert found == sorted(found, reverse=True)
        assert least - 50 <= found[-1] and found[1] <= most + 50, (schedule, phase, found)


def test_messages_in_chunks_raise_it_by_their_latencies():
    """Two messages of a chunk of 512 rows, at every hop: a step's products are those of a chunk."""
    problem, hop = Problem(4096, 4096, 768, "bfloat16"), Hop(45e9, 10e-6, 7, 1)
    products_s, shard = 2e-3, 4096 * 768 * 2.0

    def left_s(rows: int, chunk: int) -> float:
        part = min(chunk, rows)
        message_s = 2 * hop.latency_s + shard * part / 4096 / hop.bytes_per_s
        return message_s - products_s * rows * part / 4096**2

    for chunk in (512, 1 << 20):
        found = hiding_rows(products_s, problem, shard, (hop,), 2, chunk)
        assert left_s(found, chunk) <= 0 < left_s(found - 1, chunk)
    assert hiding_rows(products_s, problem, shard, (hop,), 2, 512) > found


# ---- beside the simulator -----------------------------------------------------------------------

CLUSTERS = ("a800x8", "a800-4x8", "rtx4090x2")


@pytest.fixture
def tallied(monkeypatch) -> Counter:
    """Bytes over every level's links, by rank, of what is posted from now on."""
    sent = Counter()

    def tallying(exchange, default):
        def post(self, sent_bytes, what="send", links=None):
            of = links or default(self)
            levels = np.zeros(of.ranks, dtype=int) if of.wires is None else of.wires
            levels = levels // 2 if of.members == 0 else levels
            for rank, size in enumerate(np.broadcast_to(sent_bytes, of.ranks)):
                sent[rank, int(levels[rank])] += size
            return exchange(self, sent_bytes, what, of)

        return post

    for owner, default in ((Clock, lambda clock: clock.links), (Wires, None)):
        monkeypatch.setattr(owner, "exchange", tallying(owner.exchange, default))
    return sent


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "two_level", "both_ways"])
def test_bytes_per_link_are_those_that_are_simulated(schedule, tallied):
    """The busiest link of each kind, statistics not counted; processes are in ``tests/ring``."""
    asked = request("a800-4x8", 2048, schedule)
    plan, program = planned(asked)
    spec, ranks = asked.hardware, asked.group_size
    work = [
        replace(w, travel=replace(w.travel, vectors=0, folds=0)) for w in work_of(plan, program)
    ]
    clock = Clock(links_of(spec, ranks), np.ones(ranks))
    levels = links_of_levels(spec, ranks) if schedule == "two_level" else ()
    lines = lines_of(spec, schedule, ranks)
    run(clock, schedule, work, 2048, plan.cluster.chunk, 2, 4, levels, lines=lines)
    busiest = Counter()
    for (_, level), sent in tallied.items():
        busiest[level] = max(busiest[level], sent)
    found = [link.forward_bytes + link.backward_bytes for link in plan.cluster.links]
    assert [link.level for link in plan.cluster.links] == ["node", "device"]
    assert found == [busiest[0], busiest[1]]


def test_what_a_gather_sends_straight_home_passes_only_links_in_between():
    """Of 32 ranks on 4 nodes, 24 are on another one."""
    asked = request("a800-4x8", 2048, "all_gather")
    plan, program = planned(asked)
    u = 2048 * 768
    phases = phases_of(program, plan.problem)
    machine = machine_of(hardware_graph(asked.hardware))
    between, inside = bytes_per_link(phases, "all_gather", machine, 32)
    assert (between.forward_bytes, inside.forward_bytes) == (31 * u * 2, 31 * u * 2)
    assert between.backward_bytes == 31 * u * 2 + 24 * u * 4
    assert inside.backward_bytes == 31 * u * 2 + 7 * u * 4


@pytest.mark.parametrize("preset", CLUSTERS)
def test_explain_shows_every_link_with_its_bytes(preset):
    plan, _ = planned(request(preset, 4096))
    text = explain(plan)
    lines = text[text.index("bytes per link") :].splitlines()[1 : 2 + len(plan.cluster.links)]
    assert len(plan.cluster.links) == (2 if preset == "a800-4x8" else 1)
    for line, link in zip(lines[1:], plan.cluster.links, strict=True):
        cells = line.split()
        assert cells[:2] == [f"{link.level}s", link.kind] and len(cells) == 2 + 4 * 2
    assert "memory at the peak" in text


@pytest.mark.parametrize("preset", CLUSTERS)
@pytest.mark.parametrize("rows", [1024, 4096])
def test_the_planned_schedule_is_about_the_fastest_that_is_simulated(preset, rows):
    """Closed forms choose; events say what it takes: within a tenth of the best."""
    took = {}
    for schedule in CLUSTER_SCHEDULES:
        asked = request(preset, rows, schedule)
        try:
            plan, program = choose_cluster_plan(
                asked, plan_sweeps(asked.loss, asked.positives, asked.needs)
            )
        except CompilerError:
            continue
        took[schedule] = simulate(plan, program, asked.hardware).seconds
    chosen = planned(request(preset, rows))[0].cluster.schedule
    assert len(took) > 2 and took[chosen] <= 1.1 * min(took.values()), (chosen, took)


def on_slow_links(asked: Request, by: float) -> Request:
    """The same on links that take so much longer."""
    links = [
        replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / by)
        for link in asked.hardware.links
    ]
    return replace(asked, hardware=replace(asked.hardware, links=tuple(links)))


BOUND_BY_LATENCY = [("a800-4x8", 1, 2048), ("h100-128x8", 1, 1024)]
"""What is accumulated is a message of its own, a step behind its shard."""
BOUND_BY_LINKS = [("rtx4090x2", 2), ("rtx4090x2", 8), ("mi300x8", 16), ("a800-4x8", 4)]


@pytest.mark.parametrize(
    ("preset", "by", "rows"),
    [*BOUND_BY_LATENCY, *((*slow, rows) for slow in BOUND_BY_LINKS for rows in (2048, 8192))],
)
def test_what_products_do_not_hide_is_what_is_simulated(preset, by, rows):
    """Where ranks wait for links: planned seconds are within a tenth of simulated ones, and what is
    chosen is within a twentieth of the fastest."""
    seconds, ratios = {}, {}
    for schedule in CLUSTER_SCHEDULES:
        asked = on_slow_links(request(preset, rows, schedule), by)
        try:
            plan, program = planned(asked)
        except CompilerError:
            continue
        seconds[schedule] = simulate(plan, program, asked.hardware).seconds
        ratios[schedule] = plan.seconds / seconds[schedule]
    chosen = planned(on_slow_links(request(preset, rows), by))[0].cluster.schedule
    assert len(ratios) > 2 and all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios
    assert seconds[chosen] <= 1.05 * min(seconds.values()), (chosen, seconds)
