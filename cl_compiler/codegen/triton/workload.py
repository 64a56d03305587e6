"""A program's passes as a GPU meets them: bytes and seconds of a panel, without a fitted constant.

A panel is what one launch makes of the similarity matrix.  Its gradients lie in the device's memory
between the kernel that forms them and the library's products; everything smaller is in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.codegen.triton.owner import own_dim, owned_operands, shares_statistics
from cl_compiler.codegen.triton.owner_tiles import tiles_of_pass
from cl_compiler.codegen.triton.retain import (
    KEPT_BYTES,
    KEPT_STEP,
    keeps_positives,
    written,
)
from cl_compiler.codegen.triton.row_gradients import leaving_operands
from cl_compiler.codegen.triton.slots import SLOT_ROWS
from cl_compiler.hardware.graph import hardware_graph
from cl_compiler.lang.ir import COLS
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Mode
from cl_compiler.plan.cost import beside_sweeps
from cl_compiler.plan.facts import PassFacts, ProgramFacts, facts_of
from cl_compiler.plan.machine import Machine, machine_of
from cl_compiler.plan.memory import VECTORS, CompiledMemory, Phase, phases_of
from cl_compiler.plan.precision import FP8, SPLIT, rounded_operands
from cl_compiler.plan.space import sizes_of
from cl_compiler.plan.tape import Tape, tape_of
from cl_compiler.plan.types import DTYPE_BYTES, Problem, Request, Tile

OF_TILES = ("tile buffers", "tile masks", "operand tiles in fp32", "a tile that is not kept")
"""What PyTorch's tiles allocate, and kernels hold in registers."""
SLOT_OPERATORS = 10
"""PyTorch's, for a block of slots."""
STRIP_TILES = 8
"""Row tiles that one program visits; see ``templates/triton/loss.py.jinja``."""
BLOCK_ROWS, BLOCK_COLS = 128, 256
"""The library's own tile of a product: it runs in waves of one on each multiprocessor."""
PARTS_OF = {"sum": 1, "max": 1, "logsumexp": 2, "softmean": 3}
"""Partial statistics of a reduction where maxima come first."""

Items = tuple[tuple[str, int], ...]


def gradient_bytes(problem: Problem, precision: str) -> int:
    """Bytes of one element of a panel of gradients: bf16 beside 16-bit operands; fp32 beside fp32,
    or two bf16 numbers."""
    narrow = rounded_operands(problem.dtype, precision) or DTYPE_BYTES[problem.dtype] == 2
    return 2 if narrow else 4


@dataclass(frozen=True)
class Footprint:
    """``peak_bytes`` in the phase ``name``, of which ``items`` says what they are."""

    name: str
    items: Items

    @property
    def peak_bytes(self) -> int:
        return sum(bytes_ for _, bytes_ in self.items)


@dataclass(frozen=True)
class Timing:
    """Seconds by part; FLOP of all products; bytes that the device's memory serves."""

    parts: tuple[tuple[str, float], ...]
    flops: float
    traffic_bytes: float

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.parts)


@dataclass(frozen=True)
class _PassSizes:
    """Numbers of one pass for one panel."""

    area: float
    panels: float
    rows: float
    cols: float
    widths: tuple[float, ...]


@dataclass(frozen=True)
class Workload:
    """A request's program on one GPU; the panel is what is left open."""

    request: Request
    program: Program
    arch: str

    @cached_property
    def facts(self) -> ProgramFacts:
        return facts_of(self.program, self.request.problem.operands)

    @cached_property
    def machine(self) -> Machine:
        return machine_of(hardware_graph(self.request.hardware))

    @cached_property
    def sizes(self) -> dict[str, float]:
        return sizes_of(self.request, self.request.problem, self.machine)

    @cached_property
    def memory(self) -> CompiledMemory:
        """What PyTorch's tiles allocate, without the tiles; between kernels vectors are fp64."""
        problem = self.request.problem
        phases = [
            Phase(
                phase.name,
                tuple(
                    (what, 2 * bytes_ if what == VECTORS else bytes_)
                    for what, bytes_ in phase.items
                    if what not in OF_TILES
                ),
            )
            for phase in phases_of(
                self.facts,
                casts=problem.input_bytes < problem.compute_bytes,
                leaving=leaving_operands(self.program, problem.dtype),
            )
        ]
        return CompiledMemory(tuple(phases), tape_of([p.total for p in phases]).bind(self.sizes))

    @cached_property
    def cores(self) -> tuple[Mapping[Mode, CoreTile], ...]:
        """Of each pass the tiles that its kernels hold in registers."""
        problem, precision = self.request.problem, self.request.precision
        rounded = rounded_operands(problem.dtype, precision)
        if rounded:
            problem = replace(problem, dtype=rounded)
        modes = self.program.modes
        return tuple(
            tiles_of_pass(problem, precision, self.program, p, modes, self.arch)
            for p in self.program.passes
        )

    @property
    def limit_bytes(self) -> int:
        """The budget, or the device's memory where that is less."""
        return min(self.request.budget.device_bytes, self.machine.device_memory_bytes)

    @property
    def is_symmetric(self) -> bool:
        return any(p.symmetric for p in self.program.passes)

    @property
    def has_whole_rows(self) -> bool:
        """Whether a panel is multiplied out in the sweep that makes it."""
        return any(p.whole_rows and p.has_barrier for p in self.program.passes)

    @property
    def longest_row(self) -> int:
        """Columns of the widest grid."""
        return max(round(tape_of([p.cols]).bind(self.sizes)({})[0]) for p in self.facts.passes)

    @property
    def operand_bytes(self) -> int:
        """Of one element of an operand, as the kernels read it."""
        problem = self.request.problem
        rounded = rounded_operands(problem.dtype, self.request.precision)
        return DTYPE_BYTES[rounded or problem.dtype]

    @property
    def tile_bytes(self) -> int:
        """Of one element of what similarities are made of."""
        return 1 if self.request.precision == FP8 else self.operand_bytes

    @property
    def multiprocessors(self) -> int:
        levels = self.request.hardware.levels
        return next((x.count for x in reversed(levels) if x.kind == "core"), 1)

    # -- bytes -----------------------------------------------------------------------------------

    def peak_bytes(self, tile: Tile) -> int:
        """Of the phase with the most bytes."""
        return max(self._totals(tile))

    def footprint(self, tile: Tile) -> Footprint:
        """That phase."""
        totals = self._totals(tile)
        index = totals.index(max(totals))
        values = self.sizes | {"m": tile.rows, "n": tile.cols}
        items = [
            *self.memory.items_of(index, values),
            *self._rounded,
            *self._beside_of(index, tile),
        ]
        return Footprint(self.memory.phases[index].name, tuple(i for i in items if i[1]))

    def _totals(self, tile: Tile) -> list[int]:
        rounded = sum(bytes_ for _, bytes_ in self._rounded)
        return [
            round(total) + rounded + sum(bytes_ for _, bytes_ in self._beside_of(index, tile))
            for index, total in enumerate(self.memory.totals({"m": tile.rows, "n": tile.cols}))
        ]

    def _beside_of(self, index: int, tile: Tile) -> list[tuple[str, int]]:
        """What a phase's own kernels and products take: the sweeps come first, in their order."""
        own = self._workspace(index, tile) if index < len(self.facts.passes) else []
        return [*own, *self._kept]

    @cached_property
    def _kept(self) -> list[tuple[str, int]]:
        """The exponentials that the forward keeps, and those at positives in fp32."""
        if self.program.schedule != "retain":
            return []
        index = self.program.passes.index(written(self.program))
        facts = self.facts.passes[index]
        rows, cols = tape_of([facts.rows, facts.cols]).bind(self.sizes)({})
        store = KEPT_BYTES * _whole(rows, KEPT_STEP) * _whole(cols, KEPT_STEP)
        return [("kept exponentials", store + 4 * int(rows) * keeps_positives(self.program))]

    def _workspace(self, index: int, tile: Tile) -> list[tuple[str, int]]:
        pass_, cores = self.program.passes[index], self.cores[index]
        found = self._pass_sizes(index, tile)
        if pass_.is_slots:
            return [("a block of slots", self._slot_bytes(index, found))]
        core = next(iter(cores.values()))
        rows, cols = _whole(found.rows, core.rows), _whole(found.cols, core.cols)
        own = own_dim(self.program, pass_)
        if own is not None:
            return [("partial statistics", self._owner_bytes(index, own, core, found))]
        element = gradient_bytes(self.request.problem, self.request.precision)
        items = [("a panel of gradients", len(pass_.gradients) * rows * cols * element)]
        items.append(("partial statistics", _partial_bytes(pass_, cores, rows, cols)))
        if pass_.has_barrier:  # a block of products; the rows' operand times a factor, and rounded
            items.append(("a block of products", round((4 + element) * rows * max(found.widths))))
        longest = max(found.rows, found.cols)
        if pass_.gradients and self._multiplied == "float16":
            items.append(("an operand in bf16", round(2 * longest * max(found.widths))))
        if pass_.gradients and self.request.precision == SPLIT:
            # two bf16 numbers and an fp32 rest
            items.append(("an operand split in bf16", round(8 * longest * max(found.widths))))
        return items

    def _owner_bytes(self, index: int, own: int, core: CoreTile, found: _PassSizes) -> int:
        """One number of each row (column) that a program owns, and of each other column for each
        block of them; in one launch unless there are such."""
        pass_, sizes = self.program.passes[index], (found.rows, found.cols)
        if not shares_statistics(pass_, own):
            facts = self.facts.passes[index]
            rows, cols = tape_of([facts.rows, facts.cols]).bind(self.sizes)({})
            sizes = rows, cols
        owners = -(-sizes[own] // (core.rows, core.cols)[own])
        shared = [pass_.grid.index(r.over) == own for r in pass_.reductions]
        return 4 * round(sum(owners * sizes[1 - own] if s else sizes[own] for s in shared))

    def _slot_bytes(self, index: int, found: _PassSizes) -> int:
        """A block of rows with their slots, widened where they are narrow, and their tiles."""
        facts, width = self.facts.passes[index], max(found.widths)
        tiles = found.cols * (4 * facts.float_buffers + facts.mask_buffers)
        widened = 4 * width * (1 + found.cols) if self.operand_bytes == 2 else 0
        products = 4 * width if facts.has_gradients else 0
        return round(min(SLOT_ROWS, self.request.problem.M) * (tiles + widened + products))

    def _slots(self, index: int, found: _PassSizes) -> tuple[float, float]:
        """(seconds, bytes): operands are read, widened and read again, gradients added to."""
        facts = self.facts.passes[index]
        each = self.operand_bytes + (8 if self.operand_bytes == 2 else 0)
        each += 8 if facts.has_gradients else 0
        moved = found.area * max(found.widths) * each
        return moved / self.machine.device_bytes_per_s, moved

    def _parts(self, index: int) -> int:
        """How often a pass makes its tiles: gradients too wide for registers are owned in parts."""
        pass_, core = self.program.passes[index], next(iter(self.cores[index].values()))
        own = own_dim(self.program, pass_)
        if own is None:
            return 1
        problem, operands = self.request.problem, owned_operands(self.program.plan, pass_, own)
        return max(-(-problem.operands.get(o, problem.D) // core.part) for o in operands)

    @property
    def _multiplied(self) -> str:
        """The dtype of operands that gradients, in bf16 where that has 16 bits, meet."""
        problem = self.request.problem
        return rounded_operands(problem.dtype, self.request.precision) or problem.dtype

    @cached_property
    def _rounded(self) -> list[tuple[str, int]]:
        """The copies of operands that are rounded before they are multiplied."""
        problem, elements = self.request.problem, 0
        narrow = self.request.precision == FP8
        kind = FP8 if narrow else rounded_operands(problem.dtype, self.request.precision)
        if kind is None:
            return []
        for op in self.program.plan.ir.operands:
            rows = problem.N if op.axes[0] == COLS else problem.M
            elements += rows * problem.operands.get(op.name, problem.D)
        return [(f"operands in {kind}", elements * self.tile_bytes)]

    # -- seconds ---------------------------------------------------------------------------------

    def timing(self, tile: Tile) -> Timing:
        """Kernels and products run one after the other; launches run ahead of them.

        A kernel takes the longest of its products, its exponentials, its other arithmetic, and of
        moving operands out of the cache and gradients into memory: with two programs on a
        multiprocessor one of them multiplies while the other does the rest.
        """
        machine = self.machine
        kernels = products = flops = traffic = 0.0
        launches, streamed = self._beside
        for index, (pass_, p) in enumerate(
            zip(self.program.passes, self.facts.passes, strict=True)
        ):
            found = self._pass_sizes(index, tile)
            if pass_.is_slots:
                seconds, moved = self._slots(index, found)
                streamed, traffic = streamed + seconds, traffic + moved
                flops += 2 * found.area * sum(found.widths)
                launches += SLOT_OPERATORS * -(-self.request.problem.M // SLOT_ROWS)
                continue
            seconds, moved = self._kernel(index, p, found)
            kernels, traffic = kernels + seconds, traffic + moved
            owns = own_dim(self.program, pass_) is not None
            for q, width in zip(p.products, found.widths, strict=True):
                times = self._parts(index) if q.role == "similarity" else 1
                flops += 2 * found.area * width * times
                if q.role != "similarity" and not owns:
                    seconds, moved = self._product(found, q.role, width)
                    products, traffic = products + seconds, traffic + moved
            folds = 3 * len(pass_.reductions) + sum(q.role != "similarity" for q in p.products)
            launches += found.panels * (len(self.program.modes) + folds)
        device = kernels + products + streamed
        waits = max(0.0, launches * machine.op_overhead_s - device)
        parts = {
            "kernels": kernels,
            "products of the library": products,
            "vectors and gradients": streamed,
            "launches that the device waits for": waits,
        }
        return Timing(tuple((w, s) for w, s in parts.items() if s > 0), flops, traffic)

    @cached_property
    def _beside(self) -> tuple[float, float]:
        launches, streamed = beside_sweeps(self.facts)
        values = self.sizes | {"m": self.request.problem.M, "op_overhead_s": 1.0}
        return tape_of([launches])(values)[0], tape_of([streamed])(values)[0]

    def _kernel(self, index: int, p: PassFacts, found: _PassSizes) -> tuple[float, float]:
        """(seconds, bytes of the device's memory) of making a pass's tiles."""
        machine, core = self.machine, next(iter(self.cores[index].values()))
        pass_, again = self.program.passes[index], self._parts(index)
        owns = own_dim(self.program, pass_) is not None
        made = [w for q, w in zip(p.products, found.widths, strict=True) if q.role == "similarity"]
        made *= again
        if owns:  # what is multiplied out in registers is read, too
            others = zip(p.products, found.widths, strict=True)
            made += [w for q, w in others if q.role != "similarity"]
        times = [again * found.area * p.work.exps / machine.exp_per_s]
        times.append(again * found.area * p.work.passes / machine.pass_per_s)
        times.append(sum(2 * found.area * w / self._rate(w) for w in made))
        near = found.area * sum(made) * self.tile_bytes * (1 / core.rows + 1 / core.cols)
        cache = next((x for x in machine.inner if x.kind == "cache"), None)
        if cache is not None:
            times.append(near / cache.bytes_per_s)
        element = gradient_bytes(self.request.problem, self.request.precision)
        written = 0 if owns else found.area * element * len(pass_.gradients)
        read = found.panels * (found.rows + found.cols) * sum(made) * self.tile_bytes
        code = self.program.passes[index].programs[self.program.modes[0]]
        kept = KEPT_BYTES * found.area * (code.kept is not None)  # written once, or read once
        times.append((written + read + kept) / machine.device_bytes_per_s)
        return max(times), written + read + kept

    def _product(self, found: _PassSizes, role: str, width: float) -> tuple[float, float]:
        """(seconds, bytes) of the library's products of all panels with one operand."""
        out, inner = (found.rows, found.cols) if role == "left" else (found.cols, found.rows)
        blocks = -(-out // BLOCK_ROWS) * -(-width // BLOCK_COLS)
        waves = -(-blocks // self.multiprocessors)
        busy = blocks / (waves * self.multiprocessors)
        seconds = 2 * found.area * width / (self._rate(inner, library=True) * busy)
        times = 3 if self.request.precision == SPLIT else 1
        element = gradient_bytes(self.request.problem, self.request.precision)
        moved = (
            found.area * element * (1.5 if times == 3 else 1)
        )  # of two halves, one is read twice
        moved += found.panels * width * (out * 8 * times + inner * self.operand_bytes)
        return max(seconds, moved / self.machine.device_bytes_per_s), moved

    def _rate(self, inner: float, library: bool = False) -> float:
        dtype, precision = self.request.problem.dtype, self.request.precision
        if library and precision == FP8:  # dL/dS and the operands themselves
            precision = "auto"
        return self.machine.gemm_rate(dtype, precision, inner)

    # -- sizes -----------------------------------------------------------------------------------

    @cached_property
    def _tapes(self) -> tuple[Tape, ...]:
        return tuple(
            tape_of([p.area, p.tiles, p.m, p.n, *(q.width for q in p.products)]).bind(self.sizes)
            for p in self.facts.passes
        )

    def _pass_sizes(self, index: int, tile: Tile) -> _PassSizes:
        values = {"m": tile.rows, "n": tile.cols}
        area, panels, rows, cols, *widths = self._tapes[index](values)
        return _PassSizes(area, panels, rows, cols, tuple(widths))


def _partial_bytes(pass_: Pass, cores: Mapping[Mode, CoreTile], rows: int, cols: int) -> int:
    """One number of each row and tile, or of each column and strip, for every part."""
    core = min(cores.values(), key=lambda c: c.rows * c.cols)
    across, strips = -(-cols // core.cols), -(-rows // (core.rows * STRIP_TILES))
    total = 0
    for red in pass_.reductions:
        parts = PARTS_OF.get(red.monoid, 1) if "running" in cores else 1
        of_rows, of_cols = rows * across, cols * strips
        total += parts * (of_rows + of_cols if pass_.symmetric else
                          of_rows if red.over == pass_.grid[1] else of_cols)  # fmt: skip
    return 4 * total


def _whole(length: float, step: int) -> int:
    return -(-int(length) // step) * step


__all__ = ["Footprint", "Timing", "Workload", "gradient_bytes"]
