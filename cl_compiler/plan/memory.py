"""Bytes that a schedule allocates, as SymPy expressions in sizes, element bytes and tile sizes.

Every item is a thing that the emitted file allocates, so a wrong prediction has one line to mend.
Items are listed per phase (a sweep, the values at positives, the return of the gradients); the
peak is the phase with the largest sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy as sp

from cl_compiler.lang.differences import POSITIVES_AT_ONCE, SUMMED_AT_ONCE, cancelling
from cl_compiler.plan.facts import Output, PassFacts, ProgramFacts
from cl_compiler.plan.sizes import (
    COMPUTE_BYTES,
    INPUT_BYTES,
    SCRATCH,
    TILE_ROWS,
    M,
    largest,
    least,
)
from cl_compiler.plan.tape import Tape, tape_of

COPIES = sp.Symbol("copies", nonnegative=True)
"""Bytes of contiguous copies that the caller's strided inputs force."""

GRADIENTS = "gradient accumulators"
RETURNED = "returned gradients"
VECTORS = "statistics (vectors)"
WIDE_BYTES = 8
"""Of each element of a vector in fp64."""
AT_POSITIVES = "products at positives"
WIDENED = 3
"""Blocks of rows at positives where operands are 16-bit: both in fp32, and their products."""
COPIED = "contiguous copies of inputs"
WHOLE_IN_FP32 = "an operand in fp32"
IN_HOST = frozenset({COPIED, GRADIENTS, RETURNED, AT_POSITIVES, WHOLE_IN_FP32})
"""What lies in host memory where shards do."""

Item = tuple[str, sp.Expr]


@dataclass(frozen=True)
class Phase:
    """What is allocated at one time: (what, bytes) of each item."""

    name: str
    items: tuple[Item, ...]

    @property
    def total(self) -> sp.Expr:
        return sp.Add(*(bytes_ for _, bytes_ in self.items))


def phases_of(
    facts: ProgramFacts, *, casts: bool, leaving: Collection[str] = ()
) -> tuple[Phase, ...]:
    """The phases of a program in the order in which they run.

    ``casts``: inputs are 16-bit, so tiles of operands are widened and gradients narrowed.
    ``leaving``: operands whose gradients are returned block of rows by block of rows, and have
    fp32 accumulators for one block only.
    """
    fused = facts.program.fused
    early = [o for o in facts.outputs if o.operand in leaving]
    facts = replace(facts, outputs=tuple(o for o in facts.outputs if o not in early))
    always = [(COPIED, COPIES)]
    wide = facts.program.wide
    forward = [*always, _vectors(facts.forward_vectors, wide)]
    backward = [*always, _vectors(facts.backward_vectors, wide)]
    if fused:
        forward += _accumulators(facts)
    else:
        backward += _accumulators(facts)
    if early:
        backward.append((RETURNED, INPUT_BYTES * sp.Add(*(o.length * o.width for o in early))))
    blocks = _row_gradients(early)
    if facts.kept_tile is not None:
        backward.append(_store(facts.kept_tile))
    phases = []
    rows = _row_block(facts, casts)
    whole = _whole_tiles(facts, casts)
    rows += whole
    for index, p in enumerate(facts.passes):
        common = forward if p.phase == "forward" else backward
        store = [_store(p)] if p.keep == "write" else []
        beside = blocks if p.phase == "backward" else []
        items = [*common, *store, *beside, *(whole or _tiles(p, casts))]
        phases.append(_phase(f"{p.phase} sweep {index + 1}", items))
    phases.append(_phase("rows and their positives, forward", [*forward, *rows]))
    if facts.outputs:
        last = forward if fused else backward
        phases.append(_phase("rows and their positives", [*last, *rows]))
        phases += _returns(facts, [i for i in last if i[0] != GRADIENTS], casts)
    return tuple(phases)


def _phase(name: str, items: Sequence[Item]) -> Phase:
    return Phase(name, tuple((what, bytes_) for what, bytes_ in items if bytes_ != 0))


def _vectors(vectors: Sequence[Item], wide: Collection[str]) -> Item:
    as_tiles = sp.Add(*(length for name, length in vectors if name not in wide))
    return VECTORS, COMPUTE_BYTES * as_tiles + WIDE_BYTES * sp.Add(
        *(length for name, length in vectors if name in wide)
    )


def _accumulators(facts: ProgramFacts) -> list[Item]:
    elements = sp.Add(*(o.length * o.width for o in facts.outputs))
    return [(GRADIENTS, COMPUTE_BYTES * elements)] if facts.outputs else []


def _store(p: PassFacts) -> Item:
    return "kept tiles", p.kept_elements * COMPUTE_BYTES


def _tiles(p: PassFacts, casts: bool) -> list[Item]:
    """What a sweep allocates for one tile, and frees when it returns."""
    tile = p.m * p.n
    items: list[Item] = [("tile buffers", p.float_buffers * tile * COMPUTE_BYTES)]
    items.append(("tile masks", p.mask_buffers * tile))
    floats, masks = p.strip_floats * COMPUTE_BYTES, p.strip_masks
    items.append(("strips of a tile", (floats + masks) * p.m * p.strip))
    if p.keep:
        items.append(("a tile that is not kept", SCRATCH * tile * COMPUTE_BYTES))
    if p.block_width != 0:
        items.append(("a scaled block of rows", p.m * p.block_width * COMPUTE_BYTES))
    if casts:
        items.append(("operand tiles in fp32", COMPUTE_BYTES * _operand_elements(p)))
    if p.is_slots and p.has_gradients:
        width = largest(q.width for q in p.products)
        items.append(("products with slots", p.m * width * COMPUTE_BYTES))
    return items


def freed_bytes(facts: ProgramFacts, *, casts: bool) -> sp.Expr:
    """What a sweep allocates for its tiles and frees when it returns: the most of any."""
    if facts.program.is_whole or not facts.passes:
        return sp.Integer(0)
    return largest(sp.Add(*(bytes_ for _, bytes_ in _tiles(p, casts))) for p in facts.passes)


def _whole_tiles(facts: ProgramFacts, casts: bool) -> list[Item]:
    """Where one tile holds everything, what its function has until it returns."""
    if not facts.program.is_whole:
        return []
    grids = {p.grid: p for p in facts.passes}.values()
    wide = cancelling(facts.program.plan) & facts.program.wide
    summed = {p.grid for p in facts.program.passes if wide & {r.name for r in p.reductions}}
    floats = sp.Add(*(p.float_buffers * p.m * p.n for p in grids)) * COMPUTE_BYTES
    items = [("tile buffers", floats)]
    items.append(("tile masks", sp.Add(*(p.mask_buffers * p.m * p.n for p in grids))))
    if casts:
        items.append(("operands in fp32", COMPUTE_BYTES * sp.Add(*facts.operand_elements)))
    slots = [p.m * largest(q.width for q in p.products) for p in grids if p.is_slots and p.products]
    if slots:
        items.append(("products with slots", largest(slots) * COMPUTE_BYTES))
    at_once = sp.Integer(SUMMED_AT_ONCE)
    copies = [least(p.m * p.n, largest([p.n, at_once])) for p in grids if p.grid in summed]
    if copies:
        items.append(("rows in fp64", largest(copies) * WIDE_BYTES))
    return items


def _operand_elements(p: PassFacts) -> sp.Expr:
    rows = p.m * sp.Add(*p.row_operands)
    per_col = p.m * p.n if p.is_slots else p.n
    return rows + per_col * sp.Add(*p.col_operands)


def _row_gradients(early: Sequence[Output]) -> list[Item]:
    """A block of rows of gradients in fp32, and of their products at positives."""
    if not early:
        return []
    block = COMPUTE_BYTES * least(TILE_ROWS, M)
    sums, width = sp.Add(*(o.width for o in early)), largest(o.width for o in early)
    return [("rows of gradients", block * sums), (AT_POSITIVES, block * width)]


def _row_block(facts: ProgramFacts, casts: bool) -> list[Item]:
    """Products of rows and their positives, a block of rows at a time."""
    if not facts.positive_widths:
        return []
    width = largest(facts.positive_widths)
    factors = WIDENED if casts else 1  # both factors are widened before they are multiplied
    elements = factors * least(TILE_ROWS, M) * width
    if facts.program.subtracts_positives:
        elements = largest([elements, least(sp.Integer(POSITIVES_AT_ONCE), M) ** 2])
    return [(AT_POSITIVES, elements * COMPUTE_BYTES)]


def _returns(facts: ProgramFacts, rest: Sequence[Item], casts: bool) -> list[Phase]:
    """Gradients that are not returned as they were accumulated are made one after the other."""
    phases = []
    for index, _ in enumerate(facts.outputs):
        waiting, made = facts.outputs[index:], facts.outputs[: index + 1]
        held = sp.Add(*(o.length * o.width for o in waiting)) * COMPUTE_BYTES
        done = made if casts else facts.outputs[:index]
        returned = sp.Add(*(o.length * o.width for o in done)) * INPUT_BYTES
        items = [*rest, (GRADIENTS, held), (RETURNED, returned)]
        phases.append(_phase(f"return of the gradient of {facts.outputs[index].operand}", items))
    if casts and facts.norm_casts:
        whole = largest(facts.norm_casts) * COMPUTE_BYTES
        items = [*rest, *_accumulators(facts), (WHOLE_IN_FP32, whole)]
        phases.append(_phase("gradients through norms", items))
    return phases


@dataclass(frozen=True)
class CompiledMemory:
    """The phases of a program, ready to be evaluated."""

    phases: tuple[Phase, ...]
    totals: Tape

    def peak_bytes(self, values: Mapping[str, float]) -> int:
        """The largest total, bytes."""
        return round(max(self.totals(values)))

    def breakdown(self, values: Mapping[str, float]) -> tuple[str, tuple[tuple[str, int], ...]]:
        """(name of the peak's phase, (what, bytes) of each of its items)."""
        totals = self.totals(values)
        peak = totals.index(max(totals))
        return self.phases[peak].name, self.items_of(peak, values)

    def items_of(self, index: int, values: Mapping[str, float]) -> tuple[tuple[str, int], ...]:
        """(what, bytes) of each item of one phase."""
        phase = self.phases[index]
        numbers = tape_of([bytes_ for _, bytes_ in phase.items])(values)
        items = zip((what for what, _ in phase.items), map(round, numbers), strict=True)
        return tuple(item for item in items if item[1])


def part_of(phases: Sequence[Phase], *, in_host: bool) -> tuple[Phase, ...]:
    """What of each phase lies in host memory where shards do, or what does not."""
    return tuple(
        _phase(p.name, [i for i in p.items if (i[0] in IN_HOST) == in_host]) for p in phases
    )


def compile_memory(
    facts: ProgramFacts, *, casts: bool, in_host: bool | None = None
) -> CompiledMemory:
    """The phases of a program as functions of numbers.

    ``in_host``: of shards in host memory, what lies there or what does not; None: all of it.
    """
    phases = phases_of(facts, casts=casts)
    if in_host is not None:
        phases = part_of(phases, in_host=in_host)
    return CompiledMemory(phases, tape_of([p.total for p in phases]))


__all__ = [
    "GRADIENTS",
    "IN_HOST",
    "RETURNED",
    "VECTORS",
    "CompiledMemory",
    "Phase",
    "compile_memory",
    "freed_bytes",
    "part_of",
    "phases_of",
]
