"""One rank's part of a loss on a group: its tiles, and the memory of all that it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cl_compiler.errors import BudgetError
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.hardware.ranks import one_device
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import CANONICAL, HOST
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.plan.host import streams
from cl_compiler.plan.limits import fits_at_all, smallest
from cl_compiler.plan.machine import machine_of
from cl_compiler.plan.memory import compile_memory
from cl_compiler.plan.search import choose_plan, plan_with_tile
from cl_compiler.plan.space import RingProgram, at, sizes_of, space_of
from cl_compiler.plan.travel import Travel, buffer_bytes, travels_of
from cl_compiler.plan.types import MemoryBudget, Plan, Request, Tile
from cl_compiler.units import format_bytes


@dataclass(frozen=True)
class Share:
    """One rank's part of a program: which shards travel how, ``chunk`` rows at a time.

    ``node``: of a ring of rings, the ranks of a node.  ``resident``: of shards in host memory, the
    rows that stay on the device at a time.
    """

    request: Request
    sweeps: SweepPlan
    program: Program
    schedule: str
    chunk: int
    node: int
    resident: int = 0

    @property
    def alone(self) -> Request:
        """The same products as one device would be asked for."""
        schedule = self.program.schedule if self.sweeps.gradient_levels else "spill"
        return replace(
            self.request,
            hardware=one_device(self.request.hardware),
            schedule=schedule,
            group_size=0,
            deterministic=self.request.reproducible,
        )

    @property
    def ring(self) -> RingProgram:
        """What this rank makes of the shards that it meets."""
        return RingProgram(self.program, self.request.group_size, self.streams)

    @property
    def streams(self) -> bool:
        """Whether shards are in a memory that is not the device's."""
        return self.schedule == HOST and streams(self.request.hardware)

    def buffers(self, travel: Travel) -> tuple[int, int, int]:
        """(shards, gradients) on their way in one pass, and blocks that stay, bytes."""
        problem, ranks = self.request.problem, self.request.group_size
        shards, gradients, blocks = buffer_bytes(
            self.schedule, travel, problem, ranks, self.chunk, self.node, self.resident
        )
        queues = travel.whole * problem.input_bytes * self.streams
        return shards, gradients, blocks + queues

    @property
    def most_on_its_way(self) -> int:
        """Of all passes, bytes."""
        none = (Travel("forward", 0, 0),)
        travels = travels_of(self.program, self.request.problem) or none
        return max(sum(self.buffers(travel)) for travel in travels)

    def too_little(self, needed_bytes: int) -> BudgetError:
        """The budget does not hold what is needed, which is all that a rank holds."""
        p, budget = self.request.problem, self.request.budget.device_bytes
        has = machine_of(hardware_graph(self.alone.hardware)).device_memory_bytes
        how = (
            f", of which blocks of {self.resident} rows are on the device" if self.resident else ""
        )
        obstacle = f"the budget is {format_bytes(budget)}"
        remedy = f"Give at least memory_budget={needed_bytes}"
        if has < needed_bytes:
            obstacle, remedy = f"a device has {format_bytes(has)}", "Take devices with more memory"
        return BudgetError(
            f"{self.request.loss.name} on {self.request.group_size} ranks with shards of {p.M} "
            f"rows{how}, D={p.D}, needs at least {format_bytes(needed_bytes)} on each; {obstacle}. "
            f"{remedy}, or ranks fewer rows.",
            needed_bytes,
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
        raise share.too_little(least_bytes(share))
    of_host = None if share.schedule == HOST else request.budget.host_bytes  # it is kept
    alone = replace(share.alone, budget=MemoryBudget(rest, of_host))
    if share.schedule == CANONICAL:  # sums are cut the same way whatever fits
        plan = plan_with_tile(alone, Tile(share.chunk, share.chunk), share.sweeps, share.ring)
    else:
        try:
            plan = choose_plan(alone, share.sweeps, ring=share.ring)
        except BudgetError:
            raise share.too_little(least_bytes(share)) from None
    phase, memory = memory_of(share, plan.tile)
    peak = sum(count for _, count in memory)
    if peak > request.budget.device_bytes:
        raise share.too_little(peak)
    return replace(plan, memory=memory, peak_bytes=peak, peak_phase=phase)


def least_bytes(share: Share) -> int:
    """A budget that the smallest tile fits, with what is on its way."""
    if share.schedule == CANONICAL:
        _, memory = memory_of(share, Tile(share.chunk, share.chunk))
        return max(sum(count for _, count in memory), share.most_on_its_way + 1)
    space = space_of(share.alone, share.sweeps, None, share.ring)
    return share.most_on_its_way + smallest(space, space.schedules()[0]).peak_bytes


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


def memory_of(share: Share, tile: Tile) -> tuple[str, tuple[tuple[str, int], ...]]:
    """(phase of the peak, (what, bytes) there) of a share in PyTorch's tiles."""
    problem, program, chunk = share.request.problem, share.program, share.chunk
    casts = problem.dtype in ("bfloat16", "float16")
    facts = share.ring.facts(problem.operands)
    memory = compile_memory(facts, casts=casts, in_host=False if share.streams else None)
    machine = machine_of(hardware_graph(share.alone.hardware))
    sizes = sizes_of(share.alone, problem, machine)
    most = share.resident or max(tile.rows, tile.cols)
    narrow = (
        Tile(min(tile.rows, chunk), min(tile.cols, most)),
        Tile(min(tile.rows, most), min(tile.cols, chunk)),
    )
    by_side = [{**sizes, **at(t, 0)} for t in narrow]  # a tile is no longer than a chunk
    values = [{**sizes, **at(tile, 0)}] * len(memory.phases)
    totals = list(memory.totals(values[0]))
    extra: dict[int, tuple[int, int, int]] = {}
    sweeps = [i for i, phase in enumerate(memory.phases) if " sweep " in phase.name]
    for index, travel in zip(sweeps, travels_of(program, problem), strict=True):
        extra[index] = share.buffers(travel)
        values[index] = by_side[travel.side]
        totals[index] = memory.totals(values[index])[index] + sum(extra[index])
    peak = max(range(len(totals)), key=totals.__getitem__)
    items = memory.items_of(peak, values[peak])
    return memory.phases[peak].name, (*items, *on_their_way(*extra.get(peak, (0, 0, 0))))


def on_their_way(shards: int, gradients: int, blocks: int) -> tuple[tuple[str, int], ...]:
    """(what, bytes) of what is between ranks, or stays for a time, as far as there is any."""
    found = (
        ("shards on their way", shards),
        ("gradients on their way", gradients),
        ("blocks that stay", blocks),
    )
    return tuple(item for item in found if item[1])


__all__ = [
    "Share",
    "SharePlanner",
    "least_bytes",
    "memory_of",
    "on_their_way",
    "plan_of_tiles",
    "tiles_fit",
]
