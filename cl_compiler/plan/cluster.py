"""A loss on a group of ranks: which shards travel how, what that takes, and what it costs.

The tiles of one rank's share are chosen as for one device.  Around them, every cluster schedule is
weighed: bytes that are sent, buffers for what is on its way (``travel`` has the formulas), and the
time that products do not hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.ranks import one_device
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import (
    CANONICAL,
    CANONICAL_CHUNK,
    CLUSTER_SCHEDULES,
    HALF_RING,
    OWNER_COMPUTES,
    build_ring_program,
    canonical_obstacle,
    ring_schedules,
)
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.exchange import PRODUCTS, hops_of, levels_of
from cl_compiler.plan.limits import fits_at_all, scaled
from cl_compiler.plan.link_bytes import bytes_per_link
from cl_compiler.plan.machine import Machine, machine_of
from cl_compiler.plan.memory import compile_memory
from cl_compiler.plan.overlap import overlap_of, phases_of
from cl_compiler.plan.search import choose_plan, plan_with_tile
from cl_compiler.plan.space import RingProgram, at, sizes_of, space_of
from cl_compiler.plan.travel import Travel, buffer_bytes, posted_bytes, travels_of
from cl_compiler.plan.types import ClusterPlan, Plan, Problem, Request, Tile
from cl_compiler.units import format_bytes

PARTS = 8
"""Chunks of a shard where memory allows: an eighth bounds what is on its way to an eighth."""
LEAST_CHUNK = 512
"""Rows of a chunk, at least: below, a message is mostly latency."""


@dataclass(frozen=True)
class _Candidate:
    """A plan that fits, and its seconds: of products alone, and of a step of all ranks."""

    plan: Plan
    cluster: ClusterPlan
    seconds: float


@dataclass(frozen=True)
class Share:
    """One rank's part of a program: which shards travel how, ``chunk`` rows at a time.

    ``node``: of a ring of rings, the ranks of a node.
    """

    request: Request
    sweeps: SweepPlan
    program: Program
    schedule: str
    chunk: int
    node: int

    @property
    def alone(self) -> Request:
        """The same products as one device would be asked for."""
        schedule = self.program.schedule if self.sweeps.gradient_levels else "spill"
        return replace(
            self.request,
            hardware=one_device(self.request.hardware),
            schedule=schedule,
            group_size=0,
        )

    @property
    def ring(self) -> RingProgram:
        """What this rank makes of the shards that it meets."""
        return RingProgram(self.program, self.request.group_size)

    def buffers(self, travel: Travel) -> tuple[int, int]:
        """(shards, gradients) on their way in one pass, bytes."""
        problem, ranks = self.request.problem, self.request.group_size
        return buffer_bytes(self.schedule, travel, problem, ranks, self.chunk, self.node)

    @property
    def most_on_its_way(self) -> int:
        """Of all passes, bytes."""
        none = (Travel("forward", 0, 0),)
        travels = travels_of(self.program, self.request.problem) or none
        return max(sum(self.buffers(travel)) for travel in travels)

    def too_little(self, needed_bytes: int) -> BudgetError:
        """The budget does not hold what is needed."""
        p, budget = self.request.problem, self.request.budget.device_bytes
        return BudgetError(
            f"{self.request.loss.name} on {self.request.group_size} ranks with shards of {p.M} "
            f"rows, D={p.D}, needs {format_bytes(needed_bytes)} on each; the budget is "
            f"{format_bytes(budget)}. Raise it, or give ranks fewer rows."
        )


SharePlanner = Callable[[Share], Plan]
"""The plan of one rank's share, with the memory of all that it holds; raises BudgetError, or
ScheduleError where it cannot compute so."""


def plan_of_tiles(share: Share) -> Plan:
    """The plan of a share in PyTorch's tiles.

    Raises:
        BudgetError: nothing fits; the message says what would.
    """
    request = share.request
    shards = share.most_on_its_way
    rest = request.budget.device_bytes - shards
    if rest < 1:
        raise share.too_little(shards)
    alone = replace(share.alone, budget=replace(request.budget, device_bytes=rest))
    if share.schedule == CANONICAL:  # sums are cut the same way whatever fits
        plan = plan_with_tile(alone, Tile(share.chunk, share.chunk), share.sweeps, share.ring)
    else:
        plan = choose_plan(alone, share.sweeps, ring=share.ring)
    phase, memory = memory_of(share, plan.tile)
    peak = sum(count for _, count in memory)
    if peak > request.budget.device_bytes:
        raise share.too_little(peak)
    return replace(plan, memory=memory, peak_bytes=peak, peak_phase=phase)


def tiles_fit(share: Share) -> bool:
    """Whether a share has a plan in PyTorch's tiles: the smallest of them tell."""
    budget = share.request.budget
    if share.schedule == CANONICAL:
        _, memory = memory_of(share, Tile(share.chunk, share.chunk))
        return sum(count for _, count in memory) <= budget.device_bytes
    rest = budget.device_bytes - share.most_on_its_way
    if rest < 1:
        return False
    alone = replace(share.alone, budget=replace(budget, device_bytes=rest))
    return fits_at_all(space_of(alone, share.sweeps, None, share.ring))


def group_fits(
    request: Request, sweeps: SweepPlan, share_fits: Callable[[Share], bool] = tiles_fit
) -> Callable[[int], bool]:
    """Of rows on every rank, columns in proportion: whether ``choose_cluster_plan`` has a plan.

    Passes are lowered once, whatever the rows; and a share fits where its least chunks do.

    Raises:
        ScheduleError: as ``choose_cluster_plan``.
    """
    machine = machine_of(hardware_graph(request.hardware))
    usable, _ = _usable(request, sweeps, machine)
    nodes = {name: _node(machine, name, request.group_size) for name in usable}
    programs = {name: _program(sweeps, name) for name in usable}

    def fits(rows: int) -> bool:
        asked = replace(request, problem=scaled(request.problem, rows))
        *_, least = _chunks(asked.problem)
        chunks = {name: CANONICAL_CHUNK if name == CANONICAL else least for name in usable}
        return any(
            share_fits(Share(asked, sweeps, programs[name], name, chunks[name], nodes[name]))
            for name in usable
        )

    return fits


def choose_cluster_plan(
    request: Request, sweeps: SweepPlan, plan_share: SharePlanner = plan_of_tiles
) -> tuple[Plan, Program]:
    """The fastest cluster schedule that fits the budget, with the program that it runs.

    ``request.problem`` is the largest shard of any rank; ``request.hardware`` the whole cluster, or
    one device where nothing is known of what joins them.  ``plan_share``: how one rank computes.

    Raises:
        ScheduleError: the loss cannot use the schedule, or cannot run on a group.
        BudgetError: nothing fits; the message says what would.
    """
    usable, reasons = _usable(request, sweeps, machine_of(hardware_graph(request.hardware)))
    found: dict[str, _Candidate] = {}
    programs: dict[str, Program] = {}
    obstacles: dict[str, BudgetError | ScheduleError] = {}
    for name in usable:
        programs[name] = _program(sweeps, name)
        try:
            found[name] = _candidate(request, sweeps, programs[name], name, plan_share)
        except (BudgetError, ScheduleError) as error:
            obstacles[name] = error
    if not found:
        raise next(iter(obstacles.values()))
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
    return replace(chosen.plan, cluster=cluster), programs[best]


def _usable(
    request: Request, sweeps: SweepPlan, machine: Machine
) -> tuple[list[str], dict[str, str]]:
    """Cluster schedules that are asked for and possible; every schedule → "" or why it is not."""
    reasons = ring_schedules(sweeps)
    if not reasons["two_level"] and levels_of(machine, request.group_size) is None:
        reasons["two_level"] = (
            f"{request.hardware.name} has no nodes of several ranks with links inside and between"
        )
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


def _program(sweeps: SweepPlan, schedule: str) -> Program:
    return build_ring_program(
        sweeps,
        owner_computes=schedule in OWNER_COMPUTES,
        canonical=schedule == CANONICAL,
        half=schedule == HALF_RING,
    )


def _candidate(
    request: Request, sweeps: SweepPlan, program: Program, schedule: str, plan_share: SharePlanner
) -> _Candidate:
    problem = request.problem
    machine = machine_of(hardware_graph(request.hardware))
    node = _node(machine, schedule, request.group_size)
    last: BudgetError | None = None
    for chunk in [CANONICAL_CHUNK] if schedule == CANONICAL else _chunks(problem):
        try:
            plan = plan_share(Share(request, sweeps, program, schedule, chunk, node))
        except BudgetError as error:
            last = error
            continue
        cluster, seconds = _timed(request, program, plan, machine, schedule, chunk)
        plan = replace(
            plan,
            hardware_name=request.hardware.name,
            budget=request.budget,
            seconds=seconds,
            rejected=(),
            **_of_all_shards(plan, request.group_size, cluster),
        )
        return _Candidate(plan, cluster, seconds)
    assert last is not None
    raise last


def _of_all_shards(plan: Plan, ranks: int, cluster: ClusterPlan) -> dict[str, Any]:
    """What a plan for one shard of the other side says of all that pass by."""
    parts = [(what, seconds * ranks) for what, seconds in plan.seconds_by_part]
    parts += [("exchange that is not hidden", cluster.exposed_s)] * (cluster.exposed_s > 0)
    levels = [
        replace(a, traffic_bytes=a.traffic_bytes * ranks, seconds=a.seconds * ranks)
        for a in plan.levels
        if a.kind != "cluster"
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


def _chunks(problem: Problem) -> Iterator[int]:
    """Rows that travel together: an eighth of a shard, then less where that does not fit."""
    rows = max(problem.M, problem.N)
    chunk = min(rows, max(LEAST_CHUNK, -(-rows // PARTS)))
    while True:
        yield chunk
        if chunk <= min(rows, LEAST_CHUNK):
            return
        chunk = max(LEAST_CHUNK, chunk // 2)


def memory_of(share: Share, tile: Tile) -> tuple[str, tuple[tuple[str, int], ...]]:
    """(phase of the peak, (what, bytes) there) of a share in PyTorch's tiles."""
    problem, program, chunk = share.request.problem, share.program, share.chunk
    casts = problem.dtype in ("bfloat16", "float16")
    memory = compile_memory(share.ring.facts(problem.operands), casts=casts)
    machine = machine_of(hardware_graph(share.alone.hardware))
    sizes = sizes_of(share.alone, problem, machine)
    narrow = (Tile(min(tile.rows, chunk), tile.cols), Tile(tile.rows, min(tile.cols, chunk)))
    by_side = [{**sizes, **at(t, 0)} for t in narrow]  # a tile is no longer than a chunk
    values = [{**sizes, **at(tile, 0)}] * len(memory.phases)
    totals = list(memory.totals(values[0]))
    extra: dict[int, tuple[int, int]] = {}
    sweeps = [i for i, phase in enumerate(memory.phases) if " sweep " in phase.name]
    for index, travel in zip(sweeps, travels_of(program, problem), strict=True):
        extra[index] = share.buffers(travel)
        values[index] = by_side[travel.side]
        totals[index] = memory.totals(values[index])[index] + sum(extra[index])
    peak = max(range(len(totals)), key=totals.__getitem__)
    items = memory.items_of(peak, values[peak])
    return memory.phases[peak].name, (*items, *on_their_way(*extra.get(peak, (0, 0))))


def on_their_way(shards: int, gradients: int) -> tuple[tuple[str, int], ...]:
    """(what, bytes) of what is between ranks, as far as there is any."""
    both = (("shards on their way", shards), ("gradients on their way", gradients))
    return tuple(item for item in both if item[1])


def _timed(
    request: Request, program: Program, plan: Plan, machine: Machine, schedule: str, chunk: int
) -> tuple[ClusterPlan, float]:
    """The cluster's part of a plan, and seconds of a forward with its backward."""
    problem, ranks = request.problem, request.group_size
    hops = hops_of(schedule, machine, ranks)
    forward, backward = posted_bytes(program, problem, ranks, schedule)
    compute_s = plan.seconds * ranks
    products_s = dict(plan.seconds_by_part).get(PRODUCTS, plan.seconds)
    phases = phases_of(program, problem)
    found = overlap_of(phases, schedule, problem, hops, ranks, chunk, compute_s, products_s)
    cluster = ClusterPlan(
        schedule,
        ranks,
        chunk,
        forward,
        backward,
        found.exchange_s,
        found.exposed_s,
        found.rows,
        bytes_per_link(phases, schedule, machine, ranks),
        node=_node(machine, schedule, ranks),
    )
    return cluster, compute_s + found.exposed_s


__all__ = [
    "Share",
    "SharePlanner",
    "choose_cluster_plan",
    "group_fits",
    "memory_of",
    "on_their_way",
    "plan_of_tiles",
    "tiles_fit",
]
