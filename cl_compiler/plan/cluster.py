"""A loss on a group of ranks: which shards travel how, what that takes, and what it costs.

The tiles of one rank's share are chosen as for one device.  Around them, every cluster schedule is
weighed: bytes that are sent, buffers for what is on its way, and the time that products do not hide
(schedules A', B and C of ring attention and of gathered losses, with u = rows·D elements a shard,
e bytes each, P ranks):

    ring_owner    forward (P-1)ue   backward 2(P-1)ue      buffers 2ue of a chunk
    ring_travel   forward (P-1)ue   backward (P-1)u(e+4)   buffers 2ue + 12u of a chunk
    all_gather    the same                                 buffers P(2ue + 12u) of a chunk
    two_level     as ring_owner; of P-1 shards, N-1 travel between N nodes   4ue of a chunk
    canonical     2(P-1)ue      backward 2(P-1)ue      buffers 2ue of a chunk
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cl_compiler.errors import BudgetError, ScheduleError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.ranks import one_device
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.ring import (
    CANONICAL,
    CANONICAL_CHUNK,
    CLUSTER_SCHEDULES,
    OWNER_COMPUTES,
    build_ring_program,
    canonical_obstacle,
    is_local,
    ring_schedules,
)
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Accumulate, Compute, VectorRef
from cl_compiler.plan.exchange import exchange_seconds, hiding_rows, hops_of, levels_of
from cl_compiler.plan.facts import facts_of
from cl_compiler.plan.machine import Machine, machine_of
from cl_compiler.plan.memory import compile_memory
from cl_compiler.plan.search import choose_plan, plan_with_tile
from cl_compiler.plan.space import at, sizes_of
from cl_compiler.plan.types import ClusterPlan, Plan, Problem, Request, Tile
from cl_compiler.units import format_bytes

PARTS = 8
"""Chunks of a shard where memory allows: an eighth bounds what is on its way to an eighth."""
LEAST_CHUNK = 512
"""Rows of a chunk, at least: below, a message is mostly latency."""


@dataclass(frozen=True)
class Travel:
    """What one pass moves, in elements per row of a shard: operands, and gradients with them.

    ``vectors``, ``folds``: statistics that are read with a shard, and made with it.
    ``side``: 0 where rows travel, 1 where columns do.
    """

    phase: str
    operand_width: int
    gradient_width: int
    vectors: int = 0
    folds: int = 0
    side: int = 1


def travels_of(program: Program, problem: Problem) -> tuple[Travel, ...]:
    """What each pass of a program moves; nothing where a rank has both sides to itself."""
    backward = {id(p) for stage in program.backward for p in stage.passes}
    result = []
    for pass_ in program.passes:
        phase = "backward" if id(pass_) in backward else "forward"
        if is_local(pass_.grid):
            result.append(Travel(phase, 0, 0))
            continue
        side = 0 if pass_.sides == ("right",) else 1
        operands, gradients = _moved(program, pass_, side)
        result.append(
            Travel(
                phase,
                sum(_width(problem, name) for name in operands),
                sum(_width(problem, name) for name in gradients),
                *_statistics(pass_, side),
                side,
            )
        )
    return tuple(result)


def _moved(program: Program, pass_: Pass, side: int) -> tuple[set[str], set[str]]:
    operands, gradients = set(), set()
    for name in {*pass_.similarities, *pass_.gradients}:
        leaf = program.plan.leaves[name]
        view = (leaf.left, leaf.right)[side]
        assert view is not None
        operands.add(view.operand)
        needed = view.operand in program.plan.needs and not view.stop
        if name in pass_.gradients and needed and ("left", "right")[side] in pass_.sides:
            gradients.add(view.operand)
    return operands, gradients


def _statistics(pass_: Pass, side: int) -> tuple[int, int]:
    """(vectors that are read, accumulators that are made) along the travelling side."""
    read: set[str] = set()
    made: set[str] = set()
    for i in next(iter(pass_.programs.values())).instructions:
        if isinstance(i, Compute):
            read |= {a.name for a in i.args if isinstance(a, VectorRef) and a.dim == side}
            read |= {"ids"} if i.op == "positive_tile" else set()
        if isinstance(i, Accumulate) and 1 - i.dim == side:
            made |= set(i.targets)
    return len(read), len(made)


def _width(problem: Problem, operand: str) -> int:
    return problem.operands.get(operand, problem.D)


def posted_bytes(program: Program, problem: Problem, ranks: int) -> tuple[int, int]:
    """(forward, backward): operands and gradients that a rank sends with shards as ``problem``.

    Statistics, a few numbers per row, are not counted.
    """
    sent = {"forward": 0, "backward": 0}
    rows = max(problem.M, problem.N)
    for travel in travels_of(program, problem):
        per_row = (
            travel.operand_width * problem.input_bytes
            + travel.gradient_width * problem.compute_bytes
        )
        sent[travel.phase] += (ranks - 1) * rows * per_row
    return sent["forward"], sent["backward"]


def buffer_bytes(
    schedule: str, travel: Travel, problem: Problem, ranks: int, chunk: int, node: int = 0
) -> tuple[int, int]:
    """(shards, gradients) on their way in one pass, with their statistics, bytes.

    ``node``: of a ring of rings, the ranks of a node.
    """
    if ranks == 1 and schedule != "all_gather":
        return 0, 0
    read, made = travel.vectors * problem.compute_bytes, travel.folds * problem.compute_bytes
    shards = chunk * (travel.operand_width * problem.input_bytes + read)
    gradients = chunk * (travel.gradient_width * problem.compute_bytes + made)
    if schedule == "all_gather":
        return 2 * ranks * shards, 3 * ranks * gradients
    circles = (ranks // node, node) if node else (ranks,)
    return (
        sum(min(2, members - 1) for members in circles) * shards,
        sum(3 for members in circles if members > 1) * gradients,
    )


@dataclass(frozen=True)
class _Candidate:
    """A plan that fits, and its seconds: of products alone, and of a step of all ranks."""

    plan: Plan
    cluster: ClusterPlan
    seconds: float


def choose_cluster_plan(request: Request, sweeps: SweepPlan) -> tuple[Plan, Program]:
    """The fastest cluster schedule that fits the budget, with the program that it runs.

    ``request.problem`` is the largest shard of any rank; ``request.hardware`` the whole cluster, or
    one device where nothing is known of what joins them.

    Raises:
        ScheduleError: the loss cannot use the schedule, or cannot run on a group.
        BudgetError: nothing fits; the message says what would.
    """
    reasons = ring_schedules(sweeps)
    machine = machine_of(hardware_graph(request.hardware))
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
    found: dict[str, _Candidate] = {}
    programs: dict[str, Program] = {}
    obstacles: dict[str, BudgetError] = {}
    for name in usable:
        programs[name] = build_ring_program(
            sweeps, owner_computes=name in OWNER_COMPUTES, canonical=name == CANONICAL
        )
        try:
            found[name] = _candidate(request, sweeps, programs[name], name)
        except BudgetError as error:
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


def _candidate(request: Request, sweeps: SweepPlan, program: Program, schedule: str) -> _Candidate:
    problem, ranks = request.problem, request.group_size
    machine = machine_of(hardware_graph(request.hardware))
    node = _node(machine, schedule, ranks)
    last: BudgetError | None = None
    for chunk in [CANONICAL_CHUNK] if schedule == CANONICAL else _chunks(problem):
        shards = max(
            sum(buffer_bytes(schedule, t, problem, ranks, chunk, node))
            for t in travels_of(program, problem) or (Travel("forward", 0, 0),)
        )
        rest = request.budget.device_bytes - shards
        if rest < 1:
            last = last or _too_little(request, shards)
            continue
        share = replace(
            request,
            hardware=one_device(request.hardware),
            budget=replace(request.budget, device_bytes=rest),
            schedule=program.schedule if sweeps.gradient_levels else "spill",
            group_size=0,
        )
        try:
            if schedule == CANONICAL:  # sums are cut the same way whatever fits
                plan = plan_with_tile(share, Tile(chunk, chunk), sweeps)
            else:
                plan = choose_plan(share, sweeps)
        except BudgetError as error:
            last = error
            continue
        phase, memory = memory_of(request, program, plan.tile, schedule, chunk)
        peak = sum(count for _, count in memory)
        if peak > request.budget.device_bytes:
            last = _too_little(request, peak)
            continue
        cluster, seconds = _timed(request, program, plan, machine, schedule, chunk)
        plan = replace(
            plan,
            hardware_name=request.hardware.name,
            budget=request.budget,
            memory=memory,
            peak_bytes=peak,
            peak_phase=phase,
            seconds=seconds,
            rejected=(),
            levels=tuple(level for level in plan.levels if level.kind != "cluster"),
            units=plan.units * ranks,
        )
        return _Candidate(plan, cluster, seconds)
    assert last is not None
    raise last


def _node(machine: Machine, schedule: str, ranks: int) -> int:
    """Of a ring of rings, the ranks of a node; 0 for other schedules."""
    levels = levels_of(machine, ranks) if schedule == "two_level" else None
    return 0 if levels is None else levels.node


def _too_little(request: Request, needed_bytes: int) -> BudgetError:
    p = request.problem
    return BudgetError(
        f"{request.loss.name} on {request.group_size} ranks with shards of {p.M} rows, D={p.D}, "
        f"needs {format_bytes(needed_bytes)} on each; the budget is "
        f"{format_bytes(request.budget.device_bytes)}. Raise it, or give ranks fewer rows."
    )


def _chunks(problem: Problem) -> Iterator[int]:
    """Rows that travel together: an eighth of a shard, then less where that does not fit."""
    rows = max(problem.M, problem.N)
    chunk = min(rows, max(LEAST_CHUNK, -(-rows // PARTS)))
    while True:
        yield chunk
        if chunk <= min(rows, LEAST_CHUNK):
            return
        chunk = max(LEAST_CHUNK, chunk // 2)


def memory_of(
    request: Request, program: Program, tile: Tile, schedule: str, chunk: int
) -> tuple[str, tuple[tuple[str, int], ...]]:
    """(phase of the peak, (what, bytes) there) of a program on a group."""
    problem, ranks = request.problem, request.group_size
    casts = problem.dtype in ("bfloat16", "float16")
    facts = facts_of(program, problem.operands)
    memory = compile_memory(facts, casts=casts)
    node = _node(machine_of(hardware_graph(request.hardware)), schedule, ranks)
    machine = machine_of(hardware_graph(one_device(request.hardware)))
    share = replace(request, hardware=one_device(request.hardware), group_size=0)
    sizes = sizes_of(share, problem, machine)
    narrow = (Tile(min(tile.rows, chunk), tile.cols), Tile(tile.rows, min(tile.cols, chunk)))
    by_side = [{**sizes, **at(t, 0)} for t in narrow]  # a tile is no longer than a chunk
    values = [{**sizes, **at(tile, 0)}] * len(memory.phases)
    totals = list(memory.totals(values[0]))
    extra: dict[int, tuple[int, int]] = {}
    sweeps = [i for i, phase in enumerate(memory.phases) if " sweep " in phase.name]
    for index, travel in zip(sweeps, travels_of(program, problem), strict=True):
        extra[index] = buffer_bytes(schedule, travel, problem, ranks, chunk, node)
        values[index] = by_side[travel.side]
        totals[index] = memory.totals(values[index])[index] + sum(extra[index])
    peak = max(range(len(totals)), key=totals.__getitem__)
    items = memory.items_of(peak, values[peak])
    shards, gradients = extra.get(peak, (0, 0))
    on_their_way = (("shards on their way", shards), ("gradients on their way", gradients))
    return memory.phases[peak].name, (*items, *(i for i in on_their_way if i[1]))


def _timed(
    request: Request, program: Program, plan: Plan, machine: Machine, schedule: str, chunk: int
) -> tuple[ClusterPlan, float]:
    """The cluster's part of a plan, and seconds of a forward with its backward."""
    problem, ranks = request.problem, request.group_size
    hops = hops_of(schedule, machine, ranks)
    forward, backward = posted_bytes(program, problem, ranks)
    shard_bytes = (forward + backward) / max(1, ranks - 1)
    messages = -(-max(problem.M, problem.N) // chunk) * len(program.passes)
    exchange_s = exchange_seconds(hops, shard_bytes, messages)
    compute_s = plan.seconds * ranks
    # the first of P steps meets the own shard, and the last has nothing to wait for
    hidden_s = compute_s * (ranks - 1) / ranks
    exposed_s = max(0.0, exchange_s - hidden_s)
    cluster = ClusterPlan(
        schedule,
        ranks,
        chunk,
        forward,
        backward,
        exchange_s,
        exposed_s,
        hiding_rows(plan, problem, shard_bytes, hops),
        node=_node(machine, schedule, ranks),
    )
    return cluster, compute_s + exposed_s


__all__ = [
    "Travel",
    "buffer_bytes",
    "choose_cluster_plan",
    "memory_of",
    "posted_bytes",
    "travels_of",
]
