"""The tile of a kernel whose programs own blocks of gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl_compiler.codegen.triton.core import (
    REGISTERS_FOR_MORE,
    SMALLEST_DOT,
    CoreTile,
    capability,
    column_sums,
    core_tiles,
    has_descriptors,
    reads_by_descriptors,
    registers,
)
from cl_compiler.codegen.triton.owner import adding_passes, own_dim, owned_operands
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Diagonal, Gemm, Mode, TileProgram
from cl_compiler.plan.types import DTYPE_BYTES, Problem

MOST_REGISTERS = 250
"""To aim for, of 255, by an estimate that is off by up to 40."""
MOST_ON_HOPPER = 275
"""There factors in bf16 come from shared memory as they lie, and fewer registers hold them."""
MOST_THROUGH_ADDRESSES = 150
"""Where rows begin between multiples of 16 bytes, so that descriptors cannot copy them."""
MOST_ON_AMD = 235
"""There 236, of a safe kernel at D = 256 with sums both ways, were two too many for Triton 3.6."""
REGISTERS_OF_A_PLACE = 10
"""Where positives can be: two rows' addresses, indices, bounds and sums."""
REGISTERS_OF_A_PIPELINE = 12
"""For barriers, phases and buffers of blocks to come, where a loop also forms gradients."""
AMPERE, HOPPER = range(1, 90), range(90, 100)
WIDEST_PART = 256
"""Columns of a gradient that 128 rows of it leave registers for, with eight warps."""
WIDEST_SUM = 128
"""The same where what is there already must be read beside it."""


def tiles_of_pass(
    problem: Problem,
    precision: str,
    program: Program,
    pass_: Pass,
    modes: Sequence[Mode],
    arch: str,
) -> Mapping[Mode, CoreTile]:
    """The tile of each mode's kernel, whether its programs own blocks of gradients or not."""
    own = own_dim(program, pass_)
    if own is None:
        return core_tiles(problem, precision, pass_, modes, arch)
    adds = id(pass_) in adding_passes(program)
    tile = owner_tile(problem, precision, program.plan, pass_, modes, arch, own, adds)
    return dict.fromkeys(modes, tile)


def owner_tile(
    problem: Problem,
    precision: str,
    sweeps: SweepPlan,
    pass_: Pass,
    modes: Sequence[Mode],
    arch: str,
    own: int,
    adds: bool,
) -> CoreTile:
    """The first tile that compiles without spilled registers in every mode, by an estimate.

    ``own``: 0 where programs own rows, 1 for columns; ``adds``: to what is there already.
    ``tests/codegen/triton/test_recompute.py`` holds it to what the compilers make.
    """
    operands = owned_operands(sweeps, pass_, own)
    width = max(problem.operands.get(o, problem.D) for o in operands)
    tiles = [
        tile
        for tile in _candidates(problem, precision, arch, width, own)
        if tile.part <= (WIDEST_SUM if adds else WIDEST_PART)
        and (not tile.resident or _is_one_product(problem, sweeps, pass_))
    ]
    made = sum(isinstance(i, Gemm) for i in pass_.programs[modes[0]].instructions)
    if made > 1:  # each has blocks of its own in shared memory
        tiles = [replace(t, stages=2) for t in tiles]
    if len(pass_.gradients) > 1:
        tiles = [t for t in tiles if t.part <= WIDEST_SUM]
    as_it_lies = problem.dtype == "bfloat16" and capability(arch) in HOPPER and made == 1
    limit = MOST_ON_AMD if arch.startswith("gfx") else MOST_REGISTERS
    limit = MOST_ON_HOPPER if as_it_lies else limit - REGISTERS_FOR_MORE * (made - 1)
    if has_descriptors(arch) and not reads_by_descriptors(problem, precision, arch):
        tiles = [replace(t, depth=min(t.depth, 32)) for t in tiles if not t.resident]
        limit = MOST_THROUGH_ADDRESSES
    for tile in tiles:
        programs = [pass_.programs[mode] for mode in modes]
        blocks = tile.part * (tile.rows, tile.cols)[own] // (32 * tile.warps) * len(operands)
        rounded = tile.rows * tile.cols // (64 * tile.warps)
        most = max(registers(code, tile, arch, flipped=own == 1) for code in programs)
        more = blocks if adds else 0  # is read when the loop is over, and what it needs is gone
        if tile.resident:
            more = max(more, *(_of_residency(c, tile, sweeps, arch, own) for c in programs))
        if most + rounded + blocks + more <= limit:
            return tile
    return tiles[-1]


def _of_residency(code: TileProgram, tile: CoreTile, sweeps: SweepPlan, arch: str, own: int) -> int:
    """Registers that a loop over tiles needs besides where they are as deep as their operands.

    That loop is then the one that is pipelined.  Before Hopper what a program owns is in registers,
    two elements in each, and the next block of the other operand comes through addresses, two
    registers for 16 bytes; on Hopper it is waited for.  The branches of owners of rows that store
    what rounding takes off the gradients of positives run while it comes; otherwise the loop that
    is pipelined is another, whose addresses have made room.  Where a thread holds one row of a
    product (tcgen05), what such a branch adds up lives beside the whole.
    """
    total = REGISTERS_OF_A_PIPELINE if capability(arch) in HOPPER else 0
    if capability(arch) in AMPERE:
        block, other = (tile.rows, tile.cols)[own], (tile.cols, tile.rows)[own]
        total = block * tile.depth // (64 * tile.warps) + other * tile.depth // (128 * tile.warps)
    diagonals = [i for i in code.instructions if isinstance(i, Diagonal)]
    if own == 0 and any(d.where == "positive" and d.how != "take" for d in diagonals):
        total += REGISTERS_OF_A_PLACE * (2 if sweeps.positives == "views" else 1)
        if column_sums(arch) == "whole":
            total += tile.rows * tile.cols // (32 * tile.warps)
    return total


def _is_one_product(problem: Problem, sweeps: SweepPlan, pass_: Pass) -> bool:
    """Whether all that a pass loads are whole blocks of one similarity's operands."""
    code = next(iter(pass_.programs.values()))
    sims = [i.similarity for i in code.instructions if isinstance(i, Gemm)]
    if len(sims) != 1 or list(pass_.gradients) != sims:
        return False
    leaf = sweeps.leaves[sims[0]]
    views = [v for v in (leaf.left, leaf.right) if v is not None]
    widths = {problem.operands.get(v.operand, problem.D) for v in views}
    return len(widths) == 1 and all(v.prefix is None for v in views)


def _candidates(
    problem: Problem, precision: str, arch: str, width: int, own: int
) -> list[CoreTile]:
    """Tiles in order of preference: wide parts first, since each makes all tiles again."""
    whole = max(SMALLEST_DOT, 1 << (width - 1).bit_length())
    if DTYPE_BYTES[problem.dtype] == 4:
        tiles = _of_fp32(precision, arch)
    else:
        tiles = _of_16_bits(arch, whole)
    result = []
    for part in (256, 128, 64, 32, SMALLEST_DOT):
        for tile in tiles:
            if tile.part >= part and part <= whole and (part == whole or not tile.resident):
                depth = part if tile.resident else min(tile.depth, whole)
                result.append(replace(tile, depth=depth, part=part))
    return [replace(t, rows=t.cols, cols=t.rows) for t in result] if own == 1 else result


def _of_16_bits(arch: str, whole: int) -> list[CoreTile]:
    """Blocks that a program owns by blocks that it visits; ``part``: the widest that they leave
    registers for.

    What a program owns of the operands stays in shared memory, or before Hopper in registers, where
    it spares its loads; AMD's 64 KiB and registers are too few for it.
    """
    depth, stages, wide = 64, 3, (WIDEST_PART, WIDEST_PART)
    if arch.startswith("gfx"):
        depth, stages = 32, 2
    elif capability(arch) in AMPERE:  # addresses take registers that descriptors spare
        depth, wide = 32, (WIDEST_SUM, WIDEST_PART)
    elif capability(arch) not in HOPPER:  # tensor memory leaves through registers all at once
        wide = (WIDEST_SUM, WIDEST_SUM)
    result = []
    for block, others in ((128, (64, 32)), (64, (64, 32, 16))):
        part = wide[block == 64]
        if not arch.startswith("gfx"):  # a quarter of the loads at least: rather narrow than not so
            result += [CoreTile(block, other, whole, 8, 2, part, True) for other in others]
        result += [CoreTile(block, other, depth, 8, stages, part) for other in others]
    return result


def _of_fp32(precision: str, arch: str) -> list[CoreTile]:
    """The same where products are exact, or split in three: halves of operands take registers."""
    if capability(arch) and (precision == "ieee" or capability(arch) in AMPERE):
        return [CoreTile(64, other, 16, 8, 2, 128) for other in (32, 16)]
    if arch.startswith("gfx"):
        return [CoreTile(64, other, 32, 8, 2, 128) for other in (64, 32, 16)]
    if capability(arch) in HOPPER:
        shapes = ((128, 32), (64, 64), (64, 32), (64, 16))
        return [CoreTile(block, other, 32, 8, 2, 128) for block, other in shapes]
    return [CoreTile(128, other, 16, 8, 2, 64) for other in (32, 16)]
