"""What the planner says of a group, against what ranks really send and hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy as sp
import torch

from cl_compiler.codegen.ring.backend import plan_group
from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.ring import CLUSTER_SCHEDULES
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.cluster import choose_cluster_plan
from cl_compiler.plan.exchange import Hop, hiding_rows
from cl_compiler.plan.record import plan_from_json, plan_to_json
from cl_compiler.plan.report import explain
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.ring import Hub, LoopbackRing, run_ranks
from tests.ring.members import posted
from tests.ring.processes import launch

NEEDS = frozenset({"x", "y", "logit_scale"})


def request(
    schedule: str,
    ranks: int,
    rows: int,
    width: int,
    budget: str = "1GiB",
    hardware: str = "xeon-amx-2c",
) -> Request:
    return Request(
        find("clip"),
        with_ranks(load_hardware(hardware), ranks, ranks),
        MemoryBudget.parse(budget),
        Problem(rows, rows, width),
        "paired",
        NEEDS,
        "ieee",
        schedule,
        0,
        ranks,
    )


def chosen(asked: Request):
    return choose_cluster_plan(asked, plan_sweeps(asked.loss, asked.positives, asked.needs))


class Counting(LoopbackRing):
    """Also: bytes of matrices that are sent, statistics apart."""

    matrix_bytes = 0

    def _send(self, tensors, target, second=False):
        super()._send(tensors, target, second)
        if target != self.rank:
            matrices = [t for t in tensors if t.dim() > 1]
            self.matrix_bytes += sum(t.numel() * t.element_size() for t in matrices)


class Mirror(LoopbackRing):
    """A group in which every rank has this rank's shards: what one rank holds, without threads."""

    def __init__(self, ranks, lengths):
        super().__init__(Hub(ranks), 0, lengths)

    def exchange(self, sent, received, *peers):
        for source, target in zip(sent, received, strict=True):
            target.copy_(source)
        return []

    def gather(self, sent, received):
        return self.exchange(sent, received)

    swap = gather

    def numbers(self, *numbers):
        own = [torch.as_tensor(n, dtype=torch.float64).detach().reshape(()) for n in numbers]
        return torch.stack(own).expand(self.world_size, -1)


def load(asked: Request, chunk: int = 0):
    """(plan, module) of a request."""
    plan, program = chosen(asked)
    cluster = plan.cluster
    chunk = chunk or cluster.chunk
    schedule = cluster.schedule
    text = render_ring(plan, program, "test", cluster_schedule=schedule, chunk=chunk)
    return plan, load_source(text, "test")


def arguments(problem: Problem):
    """x and y of one rank, and a scale."""
    shape = (2, problem.M, problem.D)
    x, y = torch.nn.functional.normalize(torch.randn(*shape), dim=2).unbind()
    return [t.clone().requires_grad_() for t in (x, y, torch.tensor(10.0))]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather"])
def test_ranks_send_what_the_formulas_say(schedule, ranks):
    """With u = rows·D: (P-1)ue forward; backward 2(P-1)ue, or (P-1)u(e+4) with gradients."""
    rows, width = 96, 24
    plan, module = load(request(schedule, ranks, rows, width), chunk=32)

    def sent(hub, rank):
        ring = Counting(hub, rank, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
        module.Loss.apply(ring, *arguments(plan.problem))[0].backward()
        return ring.matrix_bytes

    u = rows * width
    backward = 2 * 4 if schedule == "ring_owner" else 4 + 4
    assert plan.cluster.forward_bytes == (ranks - 1) * u * 4
    assert plan.cluster.backward_bytes == (ranks - 1) * u * backward
    total = plan.cluster.forward_bytes + plan.cluster.backward_bytes
    assert run_ranks(ranks, sent) == [total] * ranks


def live_bytes(asked: Request) -> tuple[int, int]:
    """(predicted, measured) peak of one rank's forward and backward."""
    plan, module = load(asked)
    rows = (asked.problem.M,) * asked.group_size
    ring, inputs = Mirror(asked.group_size, {"rows": rows, "cols": rows}), arguments(asked.problem)
    with LiveBytes() as live:
        value = module.Loss.apply(ring, *inputs)[0]
        value.backward()
    return plan.peak_bytes, live.peak_bytes


@pytest.mark.parametrize("schedule", ["ring_owner", "ring_travel", "all_gather"])
def test_a_rank_holds_what_was_predicted(schedule):
    predicted, measured = live_bytes(request(schedule, 3, 1024, 256))
    assert abs(measured - predicted) <= 0.01 * predicted, (predicted, measured)


def test_the_batch_that_hides_communication_is_the_formulas_root():
    """At b*, a step's products take as long as its message."""
    plan, _ = chosen(request("ring_owner", 4, 1024, 256))
    problem, shard_bytes = plan.problem, 1_000_000
    slow, fast = Hop(2e8, 50e-6, 1, 4), Hop(2e9, 10e-6, 2, 1)
    b = sp.Symbol("b", positive=True)
    products_s = dict(plan.seconds_by_part)["matrix products"]
    products = products_s / (problem.M * problem.N) * b**2
    roots = []
    for hop in (slow, fast):
        message = shard_bytes / problem.M / hop.bytes_per_s * b + hop.latency_s
        roots.append(max(sp.solve(hop.steps * products - message, b)))
        assert abs(hiding_rows(products_s, problem, shard_bytes, (hop,)) - roots[-1]) <= 1
    assert abs(hiding_rows(products_s, problem, shard_bytes, (slow, fast)) - max(roots)) <= 1


def test_plans_say_what_was_weighed_and_survive_json():
    plan, _ = chosen(request("auto", 4, 2048, 128))
    assert plan.cluster.group_size == 4
    assert plan_from_json(plan_to_json(plan)) == plan
    text = explain(plan)
    assert "group of ranks" in text and plan.cluster.schedule in text
    others = set(CLUSTER_SCHEDULES) - {plan.cluster.schedule}
    assert {name for name, _ in plan.cluster.rejected} == others
    assert all(f"not {name}" in text for name in others)


def test_a_small_budget_takes_smaller_chunks_and_then_refuses():
    roomy, _ = chosen(request("ring_owner", 4, 8192, 64))
    u = 8192 * 64 * 4
    tight, _ = chosen(request("ring_owner", 4, 8192, 64, str(roomy.peak_bytes - u // 16)))
    assert tight.peak_bytes < roomy.peak_bytes
    with pytest.raises(BudgetError):
        chosen(request("ring_owner", 4, 8192, 64, "3MiB"))


def test_a_schedule_that_the_loss_cannot_use_is_refused():
    from tests import losses_zoo as zoo

    asked = replace(
        request("ring_owner", 2, 64, 8), loss=zoo.batch_hard, needs=frozenset({"x", "y"})
    )
    with pytest.raises(ScheduleError, match=r"maximum.*Usable: ring_travel, all_gather\."):
        chosen(asked)
    assert chosen(replace(asked, schedule="auto"))[0].cluster.schedule != "ring_owner"


def check_links(name: str, everyone: list[dict], node: int) -> None:
    """What explain() says of links: the busiest between nodes, and inside of them.

    A gather is one collective, of which nobody sees what passes where.
    """
    if name == "all_gather":
        return
    over = {"node": 0, "device": 0}
    for rank, of in enumerate(everyone):
        crossing = sum(n for peer, n in of["sent"].items() if peer // node != rank // node)
        over["node"] = max(over["node"], crossing)
        over["device"] = max(over["device"], sum(of["sent"].values()) - crossing)
    assert dict(everyone[0]["links"]) == over, name


@pytest.mark.parametrize(
    "schedules",
    [
        ["two_level", "half_ring", "both_ways"],
        pytest.param(
            ["ring_owner", "ring_travel", "all_gather", "canonical"], marks=pytest.mark.full
        ),
    ],
    ids=str,
)
def test_processes_send_and_hold_what_was_planned(schedules):
    """Four of them on two nodes: every schedule's bytes, and who gets them; live bytes to 5 %."""
    rows, width, ranks, node = 1024, 128, 4, 2
    u = rows * width
    backward = {"ring_travel": 4 + 4, "all_gather": 4 + 4}
    everyone = [o.needed() for o in launch(posted, ranks, schedules, rows, width)]
    for name in everyone[0]:
        check_links(name, [found[name] for found in everyone], node)
    for rank, found in enumerate(everyone):
        for name, of in found.items():
            forward = 2 * 4 if name == "canonical" else 4
            shards = ranks // 2 if name == "half_ring" else ranks - 1
            assert of["planned_sent"] == shards * u * (forward + backward.get(name, 8)), name
            assert sum(of["sent"].values()) == of["planned_sent"], (name, of)
            assert abs(of["live"] - of["planned_live"]) <= 0.05 * of["planned_live"], (name, of)
            assert of["chunk"] < rows
            held, largest = of["remote"]  # two chunks of a ring, and one of accumulators
            most = {"ring_owner": 2, "ring_travel": 3, "two_level": 4, "half_ring": 3}
            assert held <= most.get(name, 4) and largest <= of["chunk"] * width * 4, (name, of)
            assert held == 2 or name != "ring_owner"
        near, far, after = rank ^ 1, (rank + node) % ranks, (rank + 1) % ranks
        shard, nodes = u * (4 + 8), ranks // node
        if "ring_owner" in found:
            assert found["ring_owner"]["sent"] == {after: (ranks - 1) * shard}
        if "both_ways" in found:  # two of three shards on, one back
            assert found["both_ways"]["sent"] == {
                after: 2 * 3 * u * 4,
                (rank - 1) % ranks: 3 * u * 4,
            }
        if "half_ring" in found:  # two hops of shards, one of gradients, and gradients home
            assert found["half_ring"]["sent"] == {after: 2 * 2 * u * 4 + u * 4, far: u * 4}
        if "two_level" in found:
            between, inside = (nodes - 1) * shard, nodes * (node - 1) * shard
            assert found["two_level"]["sent"] == {far: between, near: inside}


@pytest.mark.parametrize("hardware", ["xeon-amx-2c", "h100x8"])
@pytest.mark.parametrize("schedule", ["auto", *CLUSTER_SCHEDULES])
def test_an_error_names_a_budget_that_will_do(hardware, schedule):
    """With all that is on its way, in PyTorch's tiles and in kernels; a byte less will not."""
    spec, loss = load_hardware(hardware), find("nt_xent" if schedule == "half_ring" else "clip")
    if schedule == "two_level":
        spec = with_ranks(spec, 4, 2) if spec.kind == "cpu" else load_hardware("a800-4x8")
    elif spec.kind == "cpu":
        spec = with_ranks(spec, 3, 3)
    needs = NEEDS if loss.name == "clip" else frozenset({"z", *loss.parameters})
    positives = "views" if loss.is_single_set else "paired"
    asked = Request(loss, spec, MemoryBudget.parse("2.5KiB"), Problem(700, 700, 96), positives,
                    needs, "ieee", schedule, 0, spec.world_size)  # fmt: skip
    sweeps = plan_sweeps(loss, positives, needs)
    with pytest.raises(BudgetError, match=r"the budget is 2\.5 KiB\. Give at least") as refusal:
        plan_group(asked, sweeps)
    least = refusal.value.least_bytes
    assert f"memory_budget={least}," in str(refusal.value)
    plan, _ = plan_group(replace(asked, budget=MemoryBudget(least)), sweeps)
    assert plan.peak_bytes <= least and schedule in ("auto", plan.cluster.schedule)
    with pytest.raises(BudgetError):
        plan_group(replace(asked, budget=MemoryBudget(least - 1)), sweeps)
