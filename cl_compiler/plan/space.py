"""The space that the search runs through: schedules, tiles and kept tiles of one request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import sympy as sp

from cl_compiler.errors import ArgumentError, ScheduleError
from cl_compiler.hardware.graph import hardware_graph as graph_of
from cl_compiler.lang.base_two import in_base_two
from cl_compiler.lang.program import SCHEDULES, Program, Schedule
from cl_compiler.lang.schedules import build_program, valid_schedules
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import SweepPlan, plan_sweeps
from cl_compiler.plan.cost import CompiledCost, compile_cost
from cl_compiler.plan.facts import ProgramFacts, facts_of
from cl_compiler.plan.library import by_onednn
from cl_compiler.plan.machine import Machine, machine_of
from cl_compiler.plan.memory import CompiledMemory, compile_memory, freed_bytes
from cl_compiler.plan.sizes import COMPUTE_BYTES
from cl_compiler.plan.tape import Tape, tape_of
from cl_compiler.plan.types import Problem, Request, Tile

STEP = 64
"""Tiles are multiples of this, or a whole axis."""
FINE = 1024
"""Axes up to this length try every multiple of ``STEP``; longer ones two per octave up to it, one
per octave beyond."""

SPARE = 1 / 64
"""Of the budget, what tiles that are kept for speed alone leave free: allocators round up."""

REUSED = 1.5
"""Of what a sweep frees, how much the allocator is left for keeping it in the way of the next one.

glibc kept 0.7 to 1.4 times as much; with its defaults, ``tests/runtime/test_memory.py`` holds the
process to its budget."""

MAPPED_BYTES = 32 * 2**20
"""Tensors from this size on are mapped when they are made and unmapped when they are freed, by
glibc; smaller ones it keeps (M_MMAP_THRESHOLD follows what was freed, up to this)."""

Values = Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One way to run the loss: what it needs and how long it takes."""

    schedule: Schedule
    tile: Tile
    kept_tiles: int
    peak_bytes: int
    parts: tuple[float, ...]

    @cached_property
    def seconds(self) -> float:
        return sum(self.parts)


@dataclass(frozen=True)
class Option:
    """A schedule's bytes and seconds as functions of sizes and tiles."""

    schedule: Schedule
    facts: ProgramFacts
    memory: CompiledMemory
    cost: CompiledCost
    bytes_by_phase: Tape
    seconds_by_part: Tape
    freed_bytes: Tape
    """All of the request's sizes: what is left open is the tile."""
    in_host: bool
    """It runs in one process on a CPU, and glibc allocates what it needs."""
    by_onednn: bool
    """oneDNN makes its products."""

    def extent(self, sizes: Values) -> Tile:
        """Rows and columns of the largest grid."""
        passes = self.facts.passes
        rows = max((sizes[p.rows.name] for p in passes), default=1)
        cols = max((sizes[p.cols.name] for p in passes if not p.is_slots), default=1)
        return Tile(int(rows), int(cols))

    def tiles(self, sizes: Values) -> list[Tile]:
        """Every tile that the emitted loops may step by.

        Where tiles are kept, each of them a new tensor, those that the allocator would map anew,
        with every page of them, are left out if there are smaller ones.
        """
        found = list(self._all_tiles(sizes))
        if not (self.in_host and self.facts.kept_in_loops):
            return found
        most = MAPPED_BYTES / sizes[COMPUTE_BYTES.name]
        return [t for t in found if t.rows * t.cols < most] or found

    def _all_tiles(self, sizes: Values) -> Iterator[Tile]:
        extent = self.extent(sizes)
        if self.schedule == "dense":
            yield extent
        elif self.facts.needs_square_tiles:
            for side in axis_steps(max(extent.rows, extent.cols)):
                yield Tile(side, side)
        else:
            across = [extent.cols] if self.facts.spans_rows else axis_steps(extent.cols)
            for rows in axis_steps(extent.rows):
                for cols in across:
                    yield Tile(rows, cols)

    def smallest_tile(self, sizes: Values) -> Tile:
        return next(self._all_tiles(sizes))

    def tile_count(self, sizes: Values, tile: Tile) -> int:
        """Tiles of the pass that keeps them, 0 if none does."""
        writer = self.facts.kept_tile
        if writer is None:
            return 0
        rows, cols = int(sizes[writer.rows.name]), int(sizes[writer.cols.name])
        down, across = -(-rows // min(tile.rows, rows)), -(-cols // min(tile.cols, cols))
        return down * (across + 1) // 2 if writer.symmetric else down * across

    def allocator_bytes(self, values: Values) -> float:
        """What glibc may keep, beside what is in use, of tiles that come and go; 0 on a GPU.

        ``values``: of the symbols that depend on the tile.
        """
        return REUSED * self.freed_bytes(values)[0] if self.in_host else 0.0

    def kept_counts(
        self, sizes: Values, totals: Tape, tile: Tile, limit_bytes: float
    ) -> tuple[int, ...]:
        """How many tiles to keep, 0 where nothing is kept; empty where not one fits.

        ``limit_bytes``: the budget, of which what the allocator keeps is not filled.

        As many as fit: each saves the same work, and where keeping does not pay, ``spill`` wins.
        """
        writer, count = self.facts.kept_tile, self.tile_count(sizes, tile)
        if writer is None:
            return (0,)
        if count == 1 and tile != self.smallest_tile(sizes):
            return ()  # all in one tile is what ``dense`` does
        every, none, one = at(tile, count), at(tile, 0, scratch=1), at(tile, 1, scratch=1)
        left = 0.0 if count == 1 else self.allocator_bytes(every)
        if max(totals(every)) <= limit_bytes - left:
            return (count,)
        if max(totals(one)) > limit_bytes:
            return ()
        room, goal = count - 1, limit_bytes * (1 - SPARE) - self.allocator_bytes(one)
        for a, b in zip(totals(none), totals(one), strict=True):
            if b > a:
                room = min(room, int((goal - a) // (b - a)))
        return (max(room, 1),)


def at(tile: Tile, kept: int, *, scratch: int = 0) -> dict[str, float]:
    """Values of the symbols of a memory expression that depend on the tile."""
    return {"m": tile.rows, "n": tile.cols, "kept": kept, "scratch": scratch}


def axis_steps(length: int) -> list[int]:
    """Tile sizes along an axis, ascending; the last one is the whole axis."""
    if length <= FINE:
        steps = list(range(STEP, length, STEP))
    else:
        steps, size = [], STEP
        while size < length:
            steps.append(size)
            if STEP < size < FINE and size * 3 // 2 < length:
                steps.append(size * 3 // 2)
            size *= 2
    return [*steps, length]


@dataclass(frozen=True)
class RingProgram:
    """What one rank of ``ranks`` does with the shards that it meets.

    Its bytes and seconds are those of one shard at home and, on average, one that is met.
    """

    program: Program
    ranks: int
    streams: bool = False
    """Shards, and gradients of them, are in host memory, which is not the device's."""

    def facts(self, extra_operands: Iterable[str] = ()) -> ProgramFacts:
        """Counted; tiles of the diagonal are made whole in the own shard, and in the shard of the
        rank that faces this one, if there is one.
        """
        whole = 1 if self.ranks % 2 else 2
        share = sp.Rational(min(whole, self.ranks), self.ranks)
        return facts_of(self.program, extra_operands, diagonals=share)


@dataclass(frozen=True)
class Space:
    """A request, its loss in sweeps, and the machine, with what was computed of them so far."""

    request: Request
    sweep_plan: SweepPlan
    machine: Machine
    options: dict[Schedule, Option]
    blocks: dict[Tile, dict[str, float]]
    """Both are filled when they are first asked for: lowering a loss takes milliseconds."""
    ring: RingProgram | None = None
    """Of the one schedule that is asked for, where it is not what ``build_program`` makes."""

    @property
    def limit_bytes(self) -> int:
        """The budget, or the device's memory where that is less."""
        return min(self.request.budget.device_bytes, self.machine.device_memory_bytes)

    @cached_property
    def sizes(self) -> Values:
        return sizes_of(self.request, self.request.problem, self.machine)

    @cached_property
    def reasons(self) -> dict[Schedule, str]:
        """Each schedule → "" or why the loss cannot use it."""
        return valid_schedules(self.sweep_plan)

    def schedules(self) -> tuple[Schedule, ...]:
        """Those that the request allows and the loss can use."""
        wanted = self.request.schedule
        if wanted == "auto":
            return tuple(s for s in SCHEDULES if not self.reasons[s])
        if wanted not in SCHEDULES:
            raise ScheduleError(
                f"schedule {wanted!r} is unknown: use 'auto' or one of {', '.join(SCHEDULES)}."
            )
        if self.reasons[wanted] and not self.sweep_plan.gradient_levels:
            return ("spill",)  # without gradients all tiled schedules are the same sweep
        return (wanted,)  # building it says why it is impossible

    def option(self, schedule: Schedule) -> Option:
        """A schedule's expressions.

        Raises:
            ScheduleError: the loss cannot use the schedule.
            HardwareError: the machine has no rate for the way in which products are computed.
        """
        if schedule not in self.options:
            problem = self.request.problem
            if self.ring is None:
                program = build_program(self.sweep_plan, schedule)
                onednn = by_onednn(self.request, self.machine, program)
                if self.machine.prefers_exp2(problem.dtype):
                    program = in_base_two(program)
                if onednn:
                    program = in_strips(program)
                facts = facts_of(program, problem.operands)
            else:
                onednn = by_onednn(self.request, self.machine, self.ring.program)
                facts = self.ring.facts(problem.operands)
            casts = problem.input_bytes < problem.compute_bytes
            cost = compile_cost(
                facts, self.machine, problem, self.request.precision, by_onednn=onednn
            )
            streams = self.ring is not None and self.ring.streams
            memory = compile_memory(facts, casts=casts, in_host=False if streams else None)
            self.options[schedule] = Option(
                schedule,
                facts,
                memory,
                cost,
                memory.totals.bind(self.sizes),
                cost.seconds_by_part.bind(self.sizes),
                tape_of([freed_bytes(facts, casts=casts)]).bind(self.sizes),
                self.machine.spec.kind == "cpu" and self.ring is None,
                onednn,
            )
        return self.options[schedule]

    def points(self, schedule: Schedule) -> Iterator[Point]:
        """Every tile of a schedule that fits, with the seconds that it takes."""
        option, limit = self.option(schedule), self.limit_bytes
        for tile in option.tiles(self.sizes):
            for kept in option.kept_counts(self.sizes, option.bytes_by_phase, tile, limit):
                values = self.tile_values(option, tile, kept)
                peak = round(max(option.bytes_by_phase(values)))
                if peak <= limit:
                    yield Point(schedule, tile, kept, peak, option.seconds_by_part(values))

    def leaves_room(self, point: Point) -> bool:
        """Whether the budget holds what the allocator keeps, too."""
        return point.peak_bytes + self.allocator_bytes(point) <= self.limit_bytes

    def allocator_bytes(self, point: Point) -> float:
        """See ``Option.allocator_bytes``."""
        option = self.option(point.schedule)
        return option.allocator_bytes(self.tile_values(option, point.tile, point.kept_tiles))

    def point(self, schedule: Schedule, tile: Tile, kept: int) -> Point:
        """Evaluate one point, whether or not it fits."""
        option = self.option(schedule)
        values = self.tile_values(option, tile, kept)
        peak = round(max(option.bytes_by_phase(values)))
        return Point(schedule, tile, kept, peak, option.seconds_by_part(values))

    def tile_values(self, option: Option, tile: Tile, kept: int) -> dict[str, float]:
        """Values of the symbols that depend on the tile."""
        scratch = int(kept < option.tile_count(self.sizes, tile))
        result = at(tile, kept, scratch=scratch)
        if tile not in self.blocks:
            blocks = self.machine.sub_tiles(tile, self.request.problem.compute_bytes)
            self.blocks[tile] = {
                f"{name}_{index}": float(size)
                for index, block in enumerate(blocks, 1)
                for name, size in (("m", block.rows), ("n", block.cols))
            }
        return result | self.blocks[tile]

    def values(self, option: Option, tile: Tile, kept: int) -> dict[str, float]:
        """Values of every symbol of a schedule's expressions."""
        return {**self.sizes, **self.tile_values(option, tile, kept)}


def space_of(
    request: Request,
    sweep_plan: SweepPlan | None,
    graph: nx.DiGraph | None,
    ring: RingProgram | None = None,
) -> Space:
    """Prepare a request of one device; ``ring``: of one rank of a group.

    Raises:
        ArgumentError: the machine has several devices, which are a group of ranks.
    """
    if sweep_plan is None:
        sweep_plan = plan_sweeps(request.loss, request.positives, request.needs)
    graph = graph_of(request.hardware) if graph is None else graph
    machine = machine_of(graph)
    check_one_device(request, machine.ranks)
    return Space(request, sweep_plan, machine, {}, {}, ring)


def check_one_device(request: Request, devices: int) -> None:
    """Refuse to plan for several devices as if they were one.

    Raises:
        ArgumentError: there are several; the message says how they are planned for.
    """
    if devices > 1:
        raise ArgumentError(
            f"{request.hardware.name} has {devices} devices, and this is a plan of one: plan for "
            f"their group, with Request(group_size={devices}), or for a device alone."
        )


def sizes_of(request: Request, problem: Problem, machine: Machine) -> dict[str, float]:
    """Numbers that do not depend on the schedule: lengths, widths, element bytes, rates.

    Raises:
        ArgumentError: the loss reads slots or a bank whose length the problem does not give.
    """
    axes = {axis for leaf in request.loss.leaves.values() for axis in leaf.axes}
    for axis, field in (("slots", problem.slots), ("bank", problem.bank)):
        if axis in axes and field < 1:
            raise ArgumentError(
                f"{request.loss.name} reads {axis}: give their number as Problem({axis}=…)."
            )
    return {
        "M": problem.M,
        "N": problem.N,
        "D": problem.D,
        **{f"D_{name}": width for name, width in problem.operands.items()},
        "K": problem.slots,
        "Q": problem.bank,
        "e_in": problem.input_bytes,
        "e_c": problem.compute_bytes,
        "copies": request.contiguous_copies,
        "exp_per_s": machine.exp_per_s,
        "pass_per_s": machine.pass_per_s,
        "op_overhead_s": machine.op_overhead_s,
        "strip": machine.strip_elements,
        "exp2_per_s": machine.exp2_per_s or machine.exp_per_s,
        "B_0": machine.device_bytes_per_s,
        **{f"B_{i}": level.bytes_per_s for i, level in enumerate(machine.inner, 1)},
    }


__all__ = [
    "STEP",
    "Option",
    "Point",
    "RingProgram",
    "Space",
    "at",
    "axis_steps",
    "check_one_device",
    "sizes_of",
    "space_of",
]
