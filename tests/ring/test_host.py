"""Shards in host memory, streamed through the device: right, as planned, and where they must be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cl_compiler.codegen.ring.backend import plan_and_print_ring
from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.errors import ArgumentError, BudgetError, ScheduleError
from cl_compiler.hardware import load_hardware
from cl_compiler.lang.ring import HOST
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.losses import find
from cl_compiler.plan.clock import Clock, links_of
from cl_compiler.plan.record import plan_from_json, plan_to_json
from cl_compiler.plan.report import explain
from cl_compiler.plan.simulate import run
from cl_compiler.plan.travel import HostLink, Travel
from cl_compiler.plan.types import MemoryBudget, Problem, Request
from cl_compiler.plan.work import Work
from cl_compiler.runtime.guard import IN_HOST, Record, check_agreement, check_place
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.ring import LoopbackRing, run_ranks
from tests import losses_zoo as zoo
from tests.ring.members import posted
from tests.ring.numerics import WIDTH, Job, drawn
from tests.ring.processes import launch
from tests.ring.shards import emit_ring, local, run_group, schedules_of, split
from tests.ring.streams import Stream, pretend
from tests.ring.test_plan import Counting, Mirror, arguments, chosen, request
from tests.tiles import errors
from tests.zoo_case import sample

NAMES = ("clip", "supcon", "infonce_ids", "dual_softmax", "siglip_plus", "moco")
"""Two statistics, one set, ids, a statistic within another, a grid of ids alone, a queue."""
SHARES = ((1,), (1, 1), (3, 1, 2), (2, 0, 3, 1), (1, 2, 0, 1, 3, 1, 1, 2))


def case_of(name: str):
    return next(c for c in zoo.cases() if c.name == name)


def check(source: str, case, shares, **how) -> None:
    whole = sample(case, 21, 27, seed=len(shares))
    cut = split(case, *whole.is_positive.shape, shares)
    found = run_group(source, whole, cut, **how)
    assert len(set(found.values)) == 1
    worst = errors(found.result, whole)
    assert max(worst.values()) < 1e-11, (shares, worst)


@pytest.mark.parametrize(
    "name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.full) for name in NAMES[2:])]
)
def test_losses_in_blocks_on_any_number_of_ranks(name):
    """Uneven and empty shards; blocks of 5 rows divide none of them."""
    case = case_of(name)
    assert HOST in schedules_of(case)
    source = emit_ring(case, HOST, resident=5)
    for shares in SHARES:
        check(source, case, shares)


@pytest.mark.parametrize("resident", [1, 100])
def test_blocks_of_one_row_and_of_all(resident):
    check(emit_ring(case_of("clip"), HOST, resident=resident), case_of("clip"), (3, 0, 2))


@pytest.mark.parametrize("late", [True, False])
def test_copies_on_a_stream_of_their_own(monkeypatch, late):
    """As late and as early as the waits of a file for GPUs allow; without a wait it is wrong."""
    prepare = pretend(monkeypatch.setattr, late=late)
    for name in ("clip", "nt_xent", "queue", "hard_negatives", "infonce_ids"):
        source = emit_ring(case_of(name), HOST, device="cuda")
        for shares in ((1,), (1, 1), (2, 0, 3, 1)):
            check(source, case_of(name), shares, prepare=prepare)
    assert Stream.waits and bool(Stream.copies) == late
    broken = {
        True: {"        torch.cuda.current_stream(self.device).wait_stream(self.stream)\n": ""},
        False: {  # the next chunk is fetched before this one was computed and sent
            "            else:\n                sent.fetch()\n": "            sent.fetch()\n",
            "                if step == 1:": "                if False:",
        },
    }[late]
    for line, other in broken.items():
        assert line in source
        source = source.replace(line, other)
    with pytest.raises(AssertionError):
        check(source, case_of("infonce_ids"), (2, 0, 3, 1), prepare=prepare)


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float32", 2e-6), ("bfloat16", 2.0**-8), ("float16", 2.0**-10)]
)
def test_dtypes(dtype, limit):
    """Gradients are collected in fp32, and rounded once; as exact as shards on a device."""
    kind = getattr(torch, dtype)
    whole, cut = drawn(Job("clip", HOST, (3, 0, 2), 7, kind))
    found = {}
    for schedule in (HOST, "ring_owner"):
        source = emit_ring(whole.case, schedule, dtype=dtype, width=WIDTH, resident=7)
        found[schedule] = errors(run_group(source, whole, cut, dtype=kind).result, whole)
    worst, others = (max(of.values()) for of in found.values())
    assert worst <= max(limit, 1.1 * others), found


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients_by_convention(name):
    """Those of shards by one factor, those of scalars by the other; siglip's are made forward."""
    case = case_of(name)
    whole = sample(case, 12, 12, seed=3)
    cut = split(case, *whole.is_positive.shape, (2, 1))
    module = load_source(emit_ring(case, HOST), "test")

    def gradients(shards: float, scalars: float):
        def one(hub, rank):
            values = local(whole, cut, rank, torch.float64)
            ring = LoopbackRing(hub, rank, cut.lengths, shards, scalars)
            value = module.Loss.apply(ring, *(values[n] for n in module.ARGUMENTS))[0]
            return torch.autograd.grad(value, [values[n] for n in module.GRADIENTS])

        return run_ranks(2, one)

    for plain, scaled in zip(gradients(1.0, 1.0), gradients(2.0, 0.5), strict=True):
        for name, a, b in zip(module.GRADIENTS, plain, scaled, strict=True):
            torch.testing.assert_close(b, a * (2.0 if name in "xyz" else 0.5), rtol=1e-14, atol=0)


# -- bytes -----------------------------------------------------------------------------------------


def load(asked: Request, **cut: int):
    """(plan, module) of a request; ``cut``: other rows of a chunk, or of a block."""
    plan, program = chosen(asked)
    cluster = replace(plan.cluster, **cut)
    text = render_ring(
        plan,
        program,
        "test",
        cluster_schedule=cluster.schedule,
        chunk=cluster.chunk,
        resident=cluster.resident,
    )
    return replace(plan, cluster=cluster), program, load_source(text, "test")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_send_and_copy_what_the_formulas_say(ranks):
    """With u = rows·D and blocks of r rows: [b/r](P-1)ue a pass between ranks; over the host link
    [b/r]ue of shards on their way and ue of what stays, and 4u back of each gradient."""
    from cl_compiler.plan.travel import host_link_bytes, posted_bytes

    rows, width, resident = 96, 24, 40
    plan, program, module = load(request(HOST, ranks, rows, width), chunk=32, resident=resident)
    copied: list[int] = []
    plain_copy, plain_store = module._copied, module._Blocks.store

    def copy(room, part):
        copied.append(part.numel() * part.element_size())
        return plain_copy(room, part)

    def store(self, begin):
        parts = [t[begin : begin + self.rows] for t in self.gradients]
        copied.extend(p.numel() * p.element_size() for p in parts)
        plain_store(self, begin)

    module._copied, module._Blocks.store = copy, store

    def sent(hub, rank):
        ring = Counting(hub, rank, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
        module.Loss.apply(ring, *arguments(plan.problem))[0].backward()
        return ring.matrix_bytes

    u, rounds = rows * width, math.ceil(rows / resident)
    forward, backward = posted_bytes(program, plan.problem, ranks, HOST, resident)
    assert (forward, backward) == (rounds * (ranks - 1) * u * 4, 2 * rounds * (ranks - 1) * u * 4)
    links = host_link_bytes(program, plan.problem, resident)
    assert links[0] == HostLink(rounds * u * 4, u * 4, 0)
    assert links[1] == HostLink(2 * rounds * u * 4, 2 * u * 4, 2 * u * 4)
    assert run_ranks(ranks, sent) == [forward + backward] * ranks
    assert sum(copied) == ranks * sum(link.total for link in links)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full), 3])
def test_a_rank_holds_what_was_predicted(ranks):
    """Chunks and blocks that the budget leaves: two rounds."""
    rows, budget = 1024, 5 << 20
    plan, _, module = load(request(HOST, ranks, rows, 256, str(budget)))
    assert plan.cluster.resident == 512
    ring = Mirror(ranks, {"rows": (rows,) * ranks, "cols": (rows,) * ranks})
    inputs = arguments(plan.problem)
    with LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    assert abs(live.peak_bytes - plan.peak_bytes) <= 0.01 * plan.peak_bytes


def test_kernels_hold_what_was_predicted(monkeypatch):
    """A device what the plan says, the host whole gradients; kernels themselves hold nothing."""
    from tests.codegen.triton.test_rings import launches_of

    rows, width = 4096, 256
    asked = on_gpus("8MiB", HOST, rows=rows)
    problem = Problem(rows, rows, width, "float32")
    plan, text = planned(replace(asked, problem=problem, precision="tf32"))
    assert plan.template == "triton" and plan.cluster.resident < rows
    module = load_source(text, "test")
    launches_of(module)
    pretend(monkeypatch.setattr, late=False)(module)
    ring, inputs = Mirror(8, {"rows": (rows,) * 8, "cols": (rows,) * 8}), arguments(problem)
    with LiveBytes() as live:
        module.Loss.apply(ring, *inputs)[0].backward()
    whole = 2 * rows * width * 4
    assert abs(live.peak_bytes - whole - plan.peak_bytes) <= 0.05 * plan.peak_bytes


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "budget"), [("queue_paired", "10MiB"), ("hard_negatives_paired", "7MiB")]
)
def test_queues_and_slots_on_a_device(monkeypatch, name, budget):
    """Beside the host's gradients, what the plan says; a queue is whole, slots come in blocks."""
    from tests.codegen.triton.test_rings import launches_of

    case, rows, width = case_of(name), 4096, 256
    problem = Problem(rows, rows, width, "float32", slots=8, bank=4096)
    asked = replace(on_gpus(budget, HOST), loss=case.loss, needs=case.needs, precision="tf32")
    plan, text = planned(replace(asked, problem=problem, positives=case.positives))
    assert plan.template == "triton" and plan.cluster.resident < rows
    module = load_source(text, "test")
    launches_of(module)
    pretend(monkeypatch.setattr, late=False)(module)
    lengths = {"rows": rows, "cols": rows, "bank": problem.bank}
    given = {n: torch.tensor(p, requires_grad=True) for n, p in case.parameters.items()}
    whole = 0
    for op in case.loss.operands:
        shape = (lengths[op.axes[0]], *[problem.slots] * ("slots" in op.axes), width)
        given[op.name] = torch.randn(shape, requires_grad=op.name in case.needs)
        whole += given[op.name].nbytes * (op.name in case.needs)
    ring = Mirror(8, {"rows": (rows,) * 8, "cols": (rows,) * 8})
    with LiveBytes() as live:
        module.Loss.apply(ring, *(given[n] for n in module.ARGUMENTS))[0].backward()
    found = live.peak_bytes - whole
    queue = problem.bank * width * 4 if "queue" in given else 0  # here it is where it was
    assert plan.peak_bytes - queue - (1 << 20) <= found <= 1.05 * plan.peak_bytes


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])
def test_processes_send_and_hold_what_was_planned(ranks):
    rows, width = 1024, 128
    u = rows * width
    for rank, outcome in enumerate(launch(posted, ranks, [HOST], rows, width)):
        of = outcome.needed()[HOST]
        rounds = math.ceil(rows / of["resident"])
        assert rounds > 1
        assert of["sent"] == {(rank + 1) % ranks: rounds * 3 * (ranks - 1) * u * 4}
        assert of["planned_sent"] == rounds * 3 * (ranks - 1) * u * 4
        assert abs(of["live"] - of["planned_live"]) <= 0.05 * of["planned_live"], of


# -- plans -----------------------------------------------------------------------------------------


def on_gpus(budget: str, schedule: str = "auto", rows: int = 65536, loss: str = "clip") -> Request:
    ir = find(loss)
    needs = frozenset({op.name for op in ir.operands} | set(ir.parameters))
    return Request(
        ir,
        load_hardware("h100x8"),
        MemoryBudget.parse(budget),
        Problem(rows, rows, 768, "bfloat16"),
        "views" if ir.is_single_set else "paired",
        needs,
        "bf16",
        schedule,
        0,
        8,
    )


def planned(asked: Request):
    sweeps = plan_sweeps(asked.loss, asked.positives, asked.needs)
    return plan_and_print_ring(asked, sweeps, "test")


def test_taken_where_nothing_else_fits():
    """Gradients of 16,384 rows are 96 MiB on a device; in blocks they need not be there."""
    plan, text = planned(on_gpus("32MiB", rows=16384))
    assert plan.cluster.schedule == HOST and plan.peak_bytes <= 32 << 20
    assert plan.template == "triton" and "@triton.jit" in text and "torch.cuda.Stream(" in text
    assert plan.cluster.host.memory_bytes >= 2 * 16384 * 768 * 4  # gradients, before rounding
    said = explain(plan)
    assert "inputs and gradients in host memory" in said and "host_link" in said
    assert plan_from_json(plan_to_json(plan)) == plan
    roomy, text = planned(on_gpus("2GiB", rows=16384))
    assert roomy.cluster.schedule != HOST and "Stream" not in text
    assert "shards fit the device's memory" in dict(roomy.cluster.rejected)[HOST]


def test_blocks_shrink_with_the_budget_until_an_error_names_the_least():
    asked = on_gpus("1GiB", HOST, rows=4096)
    sizes = [
        planned(replace(asked, budget=MemoryBudget.parse(b)))[0].cluster.resident
        for b in ("1GiB", "12MiB")
    ]
    assert sizes[0] == 4096 > sizes[1]
    asked = on_gpus("4MiB", "auto", rows=4096)
    with pytest.raises(BudgetError, match="Give at least memory_budget=") as refusal:
        planned(asked)
    least = refusal.value.least_bytes
    plan, _ = planned(replace(asked, budget=MemoryBudget(least)))
    assert plan.cluster.schedule == HOST and 0.9 * least <= plan.peak_bytes <= least
    with pytest.raises(BudgetError, match=r"host memory.*its budget is 64\.0 MiB"):
        asked = on_gpus("1GiB", HOST)
        small = MemoryBudget.parse({"device": "1GiB", "host": "64MiB"})
        planned(replace(asked, budget=small))


def test_budget_of_the_host_binds_on_cpus_too():
    """Of ``host`` alone: gradients of 2 x 2048 x 128 elements in fp32 are 2 MiB."""
    asked = request(HOST, 4, 2048, 128)
    for host, fits in (("1MiB", False), ("64MiB", True)):
        budget = MemoryBudget.parse({"device": "1GiB", "host": host})
        if fits:
            plan, _ = chosen(replace(asked, budget=budget))
            assert plan.budget == budget and "no effect" not in explain(plan)
            continue
        with pytest.raises(BudgetError, match=r"of host memory; its budget is 1\.0 MiB"):
            chosen(replace(asked, budget=budget))
        plan, _ = chosen(replace(asked, budget=budget, schedule="ring_owner"))
        assert "the host budget (1.0 MiB) has no effect" in explain(plan)


def test_where_it_is_not_taken():
    """On CPUs, whose memory is the host's; and where an element must be found bit for bit."""
    plan, _ = chosen(request("auto", 4, 2048, 128))
    assert dict(plan.cluster.rejected)[HOST] == "the device's memory is the host's"
    case = case_of("batch_hard")
    asked = replace(on_gpus("1GiB", HOST), loss=case.loss, needs=case.needs)
    with pytest.raises(ScheduleError, match="is a maximum"):
        planned(replace(asked, positives=case.positives))


def test_copies_and_messages_go_on_at_the_same_time():
    """Of a step, the longest of products, messages and copies; and blocks, which are waited for."""
    spec = load_hardware("h100x8")
    sent, stays, rounds = 1e6, 0.5e6, 4

    def step(products_s: float, host_s_per_byte: float) -> float:
        link = HostLink(streamed=int(rounds * sent), stays=int(stays), returned=int(stays))
        work = [Work(Travel("forward", 1000, 0), products_s, rounds=rounds, host=link)]
        clock = Clock(links_of(spec, 8), np.ones(8))
        return run(clock, HOST, work, 1000, 100, 1, 4, host_s_per_byte=host_s_per_byte).seconds

    message_s = rounds * 7 * sent / spec.links[0].bandwidth_bytes_per_s
    assert message_s < step(1e-12, 1e-15) < 1.05 * message_s + 300 * spec.links[0].latency_s
    assert step(1.0, 1e-15) == pytest.approx(8.0, rel=1e-3)
    slow = 1e-6
    waited = 2 * stays * slow
    assert step(1.0, slow) == pytest.approx(8.0 + waited + sent * slow / 10, rel=0.02)
    assert step(1e-9, slow) == pytest.approx(rounds * sent * slow + waited, rel=0.02)


# -- where shards are ------------------------------------------------------------------------------


def test_shards_must_be_where_the_plan_reads_them():
    on_device, in_host = Record("forward", 1, 8, 8), Record("forward", 1, 8, 8, flags=IN_HOST)
    check_agreement("clip", [in_host, in_host], list)
    check_place("clip", [in_host] * 2, HOST, True)
    check_place("clip", [on_device] * 2, "ring_owner", False)
    assert Record.unpack(in_host.pack()) == in_host
    with pytest.raises(ArgumentError, match="rank 0: on a device; rank 1: in host memory"):
        check_agreement("clip", [on_device, in_host], list)
    with pytest.raises(ArgumentError, match=r"on a device.*schedule='host'.*Pass CPU tensors"):
        check_place("clip", [on_device] * 2, HOST, True)
    with pytest.raises(ArgumentError, match=r"in host memory.*'ring_owner'.*compile with schedule"):
        check_place("clip", [in_host] * 2, "ring_owner", False)
