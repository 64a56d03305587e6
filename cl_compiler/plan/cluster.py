"""A loss on a group of ranks: which shards travel how, what that takes, and what it costs.

The tiles of one rank's share are chosen as for one device.  Around them, every cluster schedule is
weighed: bytes that are sent, buffers for what is on its way (``travel`` has the formulas), and the
time that products do not hide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.lang.base_two import in_base_two
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import (
    CANONICAL,
    CANONICAL_CHUNK,
    CLUSTER_SCHEDULES,
    HALF_RING,
    HOST,
    OWNER_COMPUTES,
    build_ring_program,
    canonical_obstacle,
    ring_schedules,
)
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.exchange import PRODUCTS, hops_of, levels_of
from cl_compiler.plan.host import check_host_memory, host_obstacle, host_plan, streams
from cl_compiler.plan.library import by_onednn
from cl_compiler.plan.limits import scaled
from cl_compiler.plan.link_bytes import bytes_per_link
from cl_compiler.plan.machine import Machine, machine_of
from cl_compiler.plan.overlap import overlap_of, phases_of
from cl_compiler.plan.share import Share, SharePlanner, least_bytes, plan_of_tiles, tiles_fit
from cl_compiler.plan.thrift import Cost, thrifty, told
from cl_compiler.plan.travel import posted_bytes
from cl_compiler.plan.types import ClusterPlan, MemoryBudget, Plan, Problem, Request
from cl_compiler.units import format_bytes

NOT_HIDDEN = "exchange that is not hidden"
"""Beside what a plan computes, a part of its seconds."""
PARTS = 8
"""Chunks of a shard where memory allows: an eighth bounds what is on its way to an eighth."""
LEAST_CHUNK = 512
"""Rows of a chunk, at least: below, a message is mostly latency."""
LEAST_MESSAGE_S, ROUND_CHUNK = 5e-3, 128
"""Over slow links fewer rows do, if they are that long on their way (a step of Gloo takes up to a
millisecond besides), in multiples of so many: the first message, and the last one home, have a
chunk of the own rows to hide behind, and are waited for where that is too little."""


@dataclass(frozen=True)
class _Candidate:
    """A plan that fits, and its seconds: of products alone, and of a step of all ranks."""

    plan: Plan
    cluster: ClusterPlan
    seconds: float


def group_fits(
    request: Request, sweeps: SweepPlan, share_fits: Callable[[Share], bool] = tiles_fit
) -> Callable[[int], bool]:
    """Of rows on every rank, columns in proportion: whether ``choose_cluster_plan`` has a plan.

    Passes are lowered once, whatever the rows; and a share fits where its least chunks do.

    Raises:
        ScheduleError: as ``choose_cluster_plan``.
    """
    least = _least_shares(request, sweeps)
    return lambda rows: any(share_fits(s) and not host_obstacle(s) for s in least(rows))


def group_least_bytes(request: Request, sweeps: SweepPlan) -> Callable[[int], int]:
    """Of rows on every rank, columns in proportion: the bytes of the smallest plan in PyTorch's
    tiles, whatever the budget.

    Raises:
        ScheduleError: as ``choose_cluster_plan``.
    """
    least = _least_shares(request, sweeps)
    return lambda rows: min(least_bytes(share) for share in least(rows))


def _least_shares(request: Request, sweeps: SweepPlan) -> Callable[[int], list[Share]]:
    """Of rows on every rank: of each schedule, a rank's part in the least chunks."""
    machine = machine_of(hardware_graph(request.hardware))
    usable, _ = _usable(request, sweeps, machine)
    nodes = {name: _node(machine, name, request.group_size) for name in usable}
    programs = {name: _program(request, sweeps, name, machine) for name in usable}

    def shares(rows: int) -> list[Share]:
        asked = replace(request, problem=scaled(request.problem, rows))
        *_, least = chunks_of(asked.problem, machine)
        return [
            Share(
                asked,
                sweeps,
                _in_strips(programs[name], asked, name, machine),
                name,
                CANONICAL_CHUNK if name == CANONICAL else least,
                nodes[name],
                least if name == HOST else 0,
            )
            for name in usable
        ]

    return shares


def choose_cluster_plan(
    request: Request, sweeps: SweepPlan, plan_share: SharePlanner = plan_of_tiles
) -> tuple[Plan, Program]:
    """The fastest cluster schedule that fits the budget, with the program that it runs.

    ``request.problem`` is the largest shard of any rank; ``request.hardware`` the whole cluster, or
    one device where nothing is known of what joins them.  ``plan_share``: how one rank computes.
    Where another takes far less memory and little more time, a note says so.

    Raises:
        ScheduleError: the loss cannot use the schedule, or cannot run on a group.
        BudgetError: nothing fits; the message says what would.
    """
    found, plan, program = _fastest(request, sweeps, plan_share)
    costs = {name: Cost(c.plan.peak_bytes, c.seconds) for name, c in found.items() if name != HOST}
    assert plan.cluster is not None
    taken = plan.cluster.schedule
    thrifty_one = thrifty(costs, taken) if taken in costs else None
    if thrifty_one is None:
        return plan, program
    # with so much less memory another one may be the fastest, and other tiles are
    less = MemoryBudget(costs[thrifty_one].peak_bytes, request.budget.host_bytes)
    _, other, _ = _fastest(replace(request, budget=less), sweeps, plan_share)
    assert other.cluster is not None
    how = f"memory_budget={less.device_bytes}"
    cost = Cost(other.peak_bytes, other.seconds)
    note = told(other.cluster.schedule, cost, costs[taken], how)
    return replace(plan, notes=(*plan.notes, note)), program


def _fastest(
    request: Request, sweeps: SweepPlan, plan_share: SharePlanner
) -> tuple[dict[str, _Candidate], Plan, Program]:
    """Every schedule that fits the budget; the fastest's plan, with why the others were not taken;
    its program.

    Raises:
        as ``choose_cluster_plan``.
    """
    machine = machine_of(hardware_graph(request.hardware))
    usable, reasons = _usable(request, sweeps, machine)
    found: dict[str, _Candidate] = {}
    programs: dict[str, Program] = {}
    obstacles: dict[str, BudgetError | ScheduleError] = {}
    for name in usable:
        if name == HOST and found:  # inputs would have to be elsewhere
            reasons[HOST] = "shards fit the device's memory"
            continue
        bare = _program(request, sweeps, name, machine)
        programs[name] = _in_strips(bare, request, name, machine)
        try:
            found[name] = _candidate(request, sweeps, programs[name], name, plan_share)
        except (BudgetError, ScheduleError) as error:
            obstacles[name] = error
    if not found:
        raise nearest(obstacles.values())
    best = min(found, key=lambda name: (round(found[name].seconds, 9), usable.index(name)))
    rejected = [(name, reasons[name]) for name in CLUSTER_SCHEDULES if reasons[name]]
    rejected += [(name, str(error)) for name, error in obstacles.items()]
    for name, candidate in found.items():
        if name != best:
            ratio = candidate.seconds / found[best].seconds - 1
            more = candidate.plan.peak_bytes - found[best].plan.peak_bytes
            sign = "more" if more > 0 else "less"
            text = f"{ratio:.1%} slower, {format_bytes(abs(more))} {sign}"
            rejected.append((name, text))
    chosen = found[best]
    cluster = replace(chosen.cluster, rejected=tuple(rejected))
    return found, replace(chosen.plan, cluster=cluster), programs[best]


def _usable(
    request: Request, sweeps: SweepPlan, machine: Machine
) -> tuple[list[str], dict[str, str]]:
    """Cluster schedules that are asked for and possible; every schedule → "" or why it is not."""
    reasons = ring_schedules(sweeps)
    if not reasons["two_level"] and levels_of(machine, request.group_size) is None:
        reasons["two_level"] = (
            f"{request.hardware.name} has not several nodes of several ranks, with links inside "
            "and between them"
        )
    if request.schedule == "auto" and not reasons[HOST] and not streams(request.hardware):
        reasons[HOST] = "the device's memory is the host's"
    if request.schedule == CANONICAL:
        reasons[CANONICAL] = canonical_obstacle(sweeps)
    wanted = CLUSTER_SCHEDULES if request.schedule == "auto" else (request.schedule,)
    usable = [name for name in wanted if not reasons[name]]
    if not usable:
        others = ", ".join(s for s, reason in reasons.items() if not reason)
        hint = f" Usable: {others}." if others else ""
        raise ScheduleError(
            f"{sweeps.ir.name} cannot use {' or '.join(wanted)} on a group of ranks: "
            f"{reasons[wanted[0]]}.{hint}"
        )
    return usable, reasons


def _program(request: Request, sweeps: SweepPlan, schedule: str, machine: Machine) -> Program:
    """A schedule's program, as PyTorch's tiles of any size run it on this machine."""
    program = build_ring_program(
        sweeps,
        owner_computes=schedule in OWNER_COMPUTES,
        canonical=schedule == CANONICAL,
        half=schedule == HALF_RING,
    )
    return in_base_two(program) if machine.prefers_exp2(request.problem.dtype) else program


def _in_strips(program: Program, request: Request, schedule: str, machine: Machine) -> Program:
    """The program with strips, where products of a problem's size leave them room."""
    strips = schedule != HOST and by_onednn(request, machine, program)
    return in_strips(program) if strips else program


def _candidate(
    request: Request, sweeps: SweepPlan, program: Program, schedule: str, plan_share: SharePlanner
) -> _Candidate:
    machine = machine_of(hardware_graph(request.hardware))
    node = _node(machine, schedule, request.group_size)
    chunks = (
        [CANONICAL_CHUNK] if schedule == CANONICAL else list(chunks_of(request.problem, machine))
    )
    shares = [Share(request, sweeps, program, schedule, chunk, node) for chunk in chunks]
    if schedule == HOST:
        rounds = [replace(shares[-1], resident=rows) for rows in _blocks(request.problem)]
        check_host_memory(rounds[-1])
        with_least, _ = _first_that_fits(rounds, plan_share)
        shares = [replace(share, resident=with_least.resident) for share in shares]
    share, plan = _first_that_fits(shares, plan_share)
    cluster, seconds = _timed(share, plan, machine)
    plan = replace(
        plan,
        hardware_name=request.hardware.name,
        budget=request.budget,
        seconds=seconds,
        rejected=(),
        **_of_all_shards(plan, request.group_size, cluster),
    )
    return _Candidate(plan, cluster, seconds)


def _first_that_fits(shares: Iterable[Share], plan_share: SharePlanner) -> tuple[Share, Plan]:
    refused: list[BudgetError] = []
    for share in shares:
        try:
            return share, plan_share(share)
        except BudgetError as error:
            refused.append(error)
    raise nearest(refused)


def nearest(errors: Iterable[BudgetError | ScheduleError]) -> BudgetError | ScheduleError:
    """Of several obstacles the one that the least budget removes, if any budget does."""
    found = list(errors)
    budgets = [e for e in found if isinstance(e, BudgetError) and e.least_bytes]
    return min(budgets, key=lambda e: e.least_bytes) if budgets else found[-1]


def _of_all_shards(plan: Plan, ranks: int, cluster: ClusterPlan) -> dict[str, Any]:
    """What a plan for one shard of the other side says of all that pass by."""
    parts = [(what, seconds * ranks) for what, seconds in plan.seconds_by_part]
    parts += [(NOT_HIDDEN, cluster.exposed_s)] * (cluster.exposed_s > 0)
    levels = [
        replace(a, traffic_bytes=a.traffic_bytes * ranks, seconds=a.seconds * ranks)
        for a in plan.levels
    ]
    return {
        "seconds_by_part": tuple(parts),
        "levels": tuple(levels),
        "units": plan.units * ranks,
    }


def _node(machine: Machine, schedule: str, ranks: int) -> int:
    """Of a ring of rings, the ranks of a node; 0 for other schedules."""
    levels = levels_of(machine, ranks) if schedule == "two_level" else None
    return 0 if levels is None else levels.node


def chunks_of(problem: Problem, machine: Machine) -> Iterator[int]:
    """Rows that travel together: an eighth of a shard, then less where that does not fit."""
    rows = max(problem.M, problem.N)
    slowest = min((o.link_bytes_per_s for o in machine.outer if o.is_linked), default=math.inf)
    per_row_s = problem.D * problem.input_bytes / slowest
    least = LEAST_CHUNK
    if per_row_s * LEAST_CHUNK > LEAST_MESSAGE_S:
        least = math.ceil(LEAST_MESSAGE_S / per_row_s / ROUND_CHUNK) * ROUND_CHUNK
    chunk = min(rows, max(least, -(-rows // PARTS)))
    while True:
        yield chunk
        if chunk <= min(rows, least):
            return
        chunk = max(least, chunk // 2)


def _blocks(problem: Problem) -> Iterator[int]:
    """Rows that stay on a device while the others' shards travel: all of them, or half as many."""
    rows = max(problem.M, problem.N)
    yield rows
    while rows > LEAST_CHUNK:
        rows = max(LEAST_CHUNK, -(-rows // 2))
        yield rows


def _timed(share: Share, plan: Plan, machine: Machine) -> tuple[ClusterPlan, float]:
    """The cluster's part of a plan, and seconds of a forward with its backward."""
    request, program, schedule = share.request, share.program, share.schedule
    problem, ranks = request.problem, request.group_size
    hops = hops_of(schedule, machine, ranks)
    resident = share.resident
    forward, backward = posted_bytes(program, problem, ranks, schedule, resident)
    compute_s = plan.seconds * ranks
    products_s = dict(plan.seconds_by_part).get(PRODUCTS, plan.seconds)
    phases = phases_of(program, problem, resident)
    found = overlap_of(phases, schedule, problem, hops, ranks, share.chunk, compute_s, products_s)
    links, host = bytes_per_link(phases, schedule, machine, ranks), None
    exposed_s = found.exposed_s
    if resident:  # copies and messages go on at the same time; products wait for blocks
        host, link = host_plan(share, plan.tile)
        exposed_s, links = max(exposed_s, host.copy_s - compute_s) + host.wait_s, (*links, link)
    cluster = ClusterPlan(
        schedule,
        ranks,
        share.chunk,
        forward,
        backward,
        found.exchange_s,
        exposed_s,
        found.rows,
        links,
        node=share.node,
        resident=resident,
        host=host,
    )
    return cluster, compute_s + exposed_s


__all__ = [
    "NOT_HIDDEN",
    "choose_cluster_plan",
    "chunks_of",
    "group_fits",
    "group_least_bytes",
    "nearest",
]
