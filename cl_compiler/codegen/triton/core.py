"""The tile that one program holds in registers, and how it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import (
    Accumulate,
    AtPositives,
    Compute,
    Diagonal,
    Gemm,
    GradientTile,
    Instruction,
    Mode,
    TileProgram,
    TileRef,
    VectorRef,
)
from cl_compiler.plan.precision import FP8, SPLIT
from cl_compiler.plan.types import DTYPE_BYTES, Problem

SMALLEST_DOT = 16
"""Rows, columns and depth of the smallest matrix instruction; its depth in fp8 is twice that."""

OFF_BY = 40
"""Registers by which the estimate of what a kernel needs is off, either way; compilers take more
where there is room."""
ADDRESSES, ADDRESSES_OF_DESCRIPTORS = 52, 40
"""Registers for them, with what else a kernel needs for itself."""
REGISTERS_FOR_MORE = 20
"""For the addresses of each further matrix."""

Columns = Literal["fold", "whole", "reduce"]


@dataclass(frozen=True)
class CoreTile:
    """One program's tile: rows, columns, depth of a step over the operands' columns.

    ``part``: columns of a gradient that a program owns, if it owns any.  ``resident``: the tile is
    as deep as its operands are wide, so that what a program owns is loaded once.  ``most``:
    registers of a thread; 0 leaves it to the compiler, which may spill a few for occupancy.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    part: int = SMALLEST_DOT
    resident: bool = False
    most: int = 0

    def launch(self, folds: bool, fuse: bool, owns: bool = False) -> str:
        """As the keyword arguments of a launch.

        ``folds``: the kernel folds rows of warps; ``owns``: its programs own parts of a gradient;
        ``fuse``: products and sums become FMAs (what is emitted for gfx942 may not: Triton 3.9's
        LLVM then selects FMAs of two scalar registers, which its own assembler rejects).
        """
        values = {"BLOCK_M": self.rows, "BLOCK_N": self.cols, "BLOCK_D": self.depth}
        if owns:
            values["PART_D"] = self.part
        if folds:
            values["ROW_WARPS"] = min(self.warps, self.rows // SMALLEST_DOT)
        values |= {"num_warps": self.warps, "num_stages": self.stages}
        values |= {"maxnreg": self.most} if self.most else {}
        texts = [f'"{name}": {value}' for name, value in values.items()]
        return "{" + ", ".join([*texts, f'"enable_fp_fusion": {fuse}']) + "}"


def column_sums(arch: str) -> Columns:
    """How column sums stay in registers across a strip, by who holds what of a product.

    fold: a thread holds several rows (mma and wgmma), which it adds up.
    whole: a thread holds one row (tcgen05): tiles are added up as they are.
    reduce: across threads, tile by tile.
    """
    if arch.startswith("gfx"):
        return "reduce"
    return "whole" if capability(arch) >= 100 else "fold"


def has_descriptors(arch: str) -> bool:
    """Whether the machine copies tiles by descriptors, which spares registers of addresses."""
    return arch.startswith("sm_") and capability(arch) >= 90


def reads_by_descriptors(problem: Problem, precision: str, arch: str) -> bool:
    """Whether operands' tiles are copied by descriptors: each row begins at a multiple of 16 bytes.

    The problem's dtype is what is multiplied, after any rounding.
    """
    bytes_ = 1 if precision == FP8 else DTYPE_BYTES[problem.dtype]
    widths = (problem.D, *problem.operands.values())
    return has_descriptors(arch) and all(width * bytes_ % 16 == 0 for width in widths)


def capability(arch: str) -> int:
    """90 of "sm_90", 0 of other vendors' names.

    89 of consumer Blackwell (sm_120, sm_121): it multiplies as Ada does, without tcgen05, and has
    as little shared memory.
    """
    digits = "".join(c for c in arch.removeprefix("sm_") if c.isdigit())
    if not arch.startswith("sm_") or not digits:
        return 0
    return 89 if int(digits) >= 120 else int(digits)


def core_tiles(
    problem: Problem, precision: str, pass_: Pass, modes: Sequence[Mode], arch: str
) -> dict[Mode, CoreTile]:
    """For each mode the first of an architecture's tiles that compiles without spilled registers.

    Kernels that share a launcher also share rows and columns; warps may differ.  By the estimate of
    ``registers``; ``tests/codegen/triton/test_offline.py`` holds it to what the compilers make.
    """
    tiles = _candidates(problem, precision, arch)
    bytes_ = DTYPE_BYTES[problem.dtype]
    pointers = has_descriptors(arch) and not reads_by_descriptors(problem, precision, arch)
    for shape in dict.fromkeys((t.rows, t.cols) for t in tiles):
        alike = [t for t in tiles if (t.rows, t.cols) == shape]
        found = {
            mode: next(
                (t for t in alike if _fits(pass_.programs[mode], t, arch, modes, bytes_, pointers)),
                None,
            )
            for mode in modes
        }
        if all(found.values()):
            chosen = {
                mode: _beside_a_store(pass_.programs[mode], tile)
                for mode, tile in found.items()
                if tile is not None
            }
            return _without_a_neighbour(problem, precision, pass_, chosen, arch)
    return dict.fromkeys(modes, tiles[-1])


def _without_a_neighbour(
    problem: Problem, precision: str, pass_: Pass, tiles: dict[Mode, CoreTile], arch: str
) -> dict[Mode, CoreTile]:
    """Safe kernels may have all registers where they would else do with half, and spill the rest.

    Left to itself the compiler has two programs fit on a multiprocessor.  For kernels that run
    rarely that is no gain: where products are exact on tcgen05's machines, and through addresses on
    Hopper (8 bytes spilled by Triton 3.7), and before Hopper in tf32, of one matrix's statistics
    where rows and columns have sums (8 bytes by 3.6).  Others (several matrices, gradients) would
    there spill of all.
    """
    if "running" not in tiles or "bounded" not in pass_.programs:
        return tiles
    code, tile = pass_.programs["running"], tiles["running"]
    over = registers(code, tile, arch) - 65536 // (2 * 32 * tile.warps)
    squeezed = precision == "tf32" and 0 < capability(arch) < 90
    squeezed &= not pass_.gradients and code.gemms == 1 and 0 < over <= OFF_BY
    pointers = not reads_by_descriptors(problem, precision, arch)
    exact = _is_exact(problem, precision, arch) and capability(arch) >= (90 if pointers else 100)
    return tiles | {"running": replace(tile, most=255)} if squeezed or exact else tiles


def _beside_a_store(code: TileProgram, tile: CoreTile) -> CoreTile:
    """A tile that is kept leaves through shared memory, where two programs still have to fit."""
    if code.kept is None or not code.gemms or tile.warps > 4:
        return tile
    return replace(tile, stages=tile.stages - 1)


def _candidates(problem: Problem, precision: str, arch: str) -> list[CoreTile]:
    """Tiles in order of preference.

    On Hopper two programs with four warps share a multiprocessor, so that one's epilogue runs under
    the other's products; wide operands are fed better by one program with eight.
    """
    width, bytes_ = problem.D, 1 if precision == FP8 else DTYPE_BYTES[problem.dtype]
    depth = min(
        128 // bytes_, max(SMALLEST_DOT * 2 // min(bytes_, 2), 1 << (width - 1).bit_length())
    )
    stages = 3 if bytes_ <= 2 else 2
    if _is_exact(problem, precision, arch):
        return [CoreTile(64, cols, SMALLEST_DOT, 8, 2) for cols in (64, 32)]
    pointers = not reads_by_descriptors(problem, precision, arch)
    on_hopper = 90 <= capability(arch) < 100
    if precision == SPLIT and arch.startswith("sm_") and (pointers or not on_hopper):
        # there the halves of both operands go through registers, or addresses do
        steps = (min(depth, 32), stages + 1) if capability(arch) < 100 else (SMALLEST_DOT, stages)
        return [CoreTile(128, cols, steps[0], 8, steps[1]) for cols in (64, 32, 16)]
    if arch.startswith("gfx"):
        # a warp's part has at least 32 rows and columns: of less, eight warps would make copies
        shapes = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4))
        return [CoreTile(rows, cols, min(depth, 32), w, 2) for rows, cols, w in shapes]
    depth = min(depth, 32) if pointers else depth  # addresses take registers
    if pointers and capability(arch) < 100:
        tiles = [CoreTile(128, cols, depth, 8, stages + 1) for cols in (128, 64, 32, 16)]
        return [*tiles[:-1], replace(tiles[-1], most=255)]
    if capability(arch) >= 100:
        narrow = [CoreTile(128, cols, depth, 8, stages, most=255) for cols in (32, 16)]
        return [*(CoreTile(128, cols, depth, 8, stages) for cols in (128, 64)), *narrow]
    wide = [CoreTile(128, 256, depth, 8, stages)] if width >= 1024 and bytes_ <= 2 else []
    shared = [] if bytes_ == 4 else [CoreTile(128, 128, depth, 4, stages)]
    narrow = [CoreTile(128, cols, depth, 8, stages) for cols in (128, 64, 32)]
    return [*wide, *shared, *narrow]


def _is_exact(problem: Problem, precision: str, arch: str) -> bool:
    """Whether fp32 is multiplied as it is, which NVIDIA's tensor cores cannot."""
    return capability(arch) > 0 and precision == "ieee" and DTYPE_BYTES[problem.dtype] == 4


def _fits(
    code: TileProgram, tile: CoreTile, arch: str, modes: Sequence[Mode], bytes_: int, pointers: bool
) -> bool:
    """Whether a kernel has the registers for a tile, by an estimate that is off by ``OFF_BY``.

    Safe kernels run rarely and may be tight, so that they do not decide the tile that others share.
    Four warps of AMD's have a multiprocessor to themselves, and twice the registers.  Products that
    are gone before others are made need none, but ``bytes_`` 4 of an operand's element take them.
    ``pointers``: operands come through addresses though the machine has descriptors.
    """
    most = 216
    if code.mode == "running" and len(modes) > 1:
        most = 240 if column_sums(arch) == "whole" else 250
    most += 256 * (arch.startswith("gfx") and tile.warps == 4)
    element = tile.rows * tile.cols // (32 * tile.warps)
    needed = registers(code, tile, arch)
    if pointers:  # which also live through the branch of each diagonal
        branches = sum(isinstance(i, Diagonal) for i in code.instructions)
        needed += (1 + branches) * (ADDRESSES - ADDRESSES_OF_DESCRIPTORS)
    if bytes_ <= 2:
        needed -= element * (code.gemms - products_alive(code))
    if column_sums(arch) == "whole":
        needed += _beside_a_row(code, element)
    elif 0 < capability(arch) < 90 and not code.gradients:
        needed += REGISTERS_FOR_MORE * max(0, code.gemms - 2)
    return needed <= most


def _beside_a_row(code: TileProgram, element: int) -> int:
    """What a thread needs besides where it holds a whole row of a product (tcgen05).

    It reads a value of every column: of a second vector, they lie beside those of the first.  Where
    it sums values beside their gradient, a mask of one waits as bytes while the other is made.
    """
    if not code.gradients:
        return 0
    if any(isinstance(i, Accumulate) for i in code.instructions):
        return element // 4 * any(isinstance(i, Compute) and i.is_mask for i in code.instructions)
    reads = [a for i in code.instructions if isinstance(i, Compute) for a in i.args]
    columns = {a.name for a in reads if isinstance(a, VectorRef) and a.dim == 1}
    return element * max(0, len(columns) - 1)


def products_alive(code: TileProgram) -> int:
    """The most products that hold registers at a time: one in the making, and those read later.

    A product is gone where the last tile that is made of it is read before the next is made.
    """
    starts: dict[int, int] = {}
    sources: dict[int, frozenset[int]] = {}
    """Tile → the products that it is made of."""
    last: dict[int, int] = {}
    """Product → the last instruction that reads what is made of it."""
    for n, i in enumerate(code.instructions):
        read = frozenset(p for v in _tiles_read(i) for p in sources.get(v, ()))
        last |= dict.fromkeys(read, n)
        if isinstance(i, Gemm):
            sources[i.value] = frozenset({i.value})
            starts[i.value] = last[i.value] = n
        elif isinstance(i, (Compute, Diagonal)):
            sources[i.value] = read
    leaving = [g.value for g in code.gradients] + [v for v in (code.kept,) if v is not None]
    for value in leaving:
        last |= dict.fromkeys(sources.get(value, ()), len(code.instructions))
    return max((sum(starts[p] <= n <= last[p] for p in starts) for n in starts.values()), default=0)


def _tiles_read(instruction: Instruction) -> list[int]:
    match instruction:
        case Compute(args=args):
            return [a.value for a in args if isinstance(a, TileRef)]
        case Diagonal(base=base, reads=reads):
            return [base, *(r.value for _, r in reads if isinstance(r, TileRef))]
        case Accumulate(args=args):
            return list(args)
        case AtPositives(value=value) | GradientTile(value=value):
            return [value]
        case _:
            return []


def registers(code: TileProgram, tile: CoreTile, arch: str, flipped: bool = False) -> int:
    """A rough count of 32-bit registers that a thread needs.

    ``flipped``: columns run along the tile's first dimension, of which a thread holds few.
    """
    element = tile.rows * tile.cols // (32 * tile.warps)
    column = (tile.rows if flipped else tile.cols) // 4
    live = code.gemms + (code.kept is not None and not code.gemms)  # a tile that is read
    masks = any(isinstance(i, Compute) and i.is_mask for i in code.instructions)
    steps = sum(isinstance(i, Compute) for i in code.instructions)
    sums = [i for i in code.instructions if isinstance(i, Accumulate)]
    several = len({i.args for i in sums}) > 1
    long = masks or several or steps > 3 or code.transcendentals > 1 or code.mode == "running"
    live += long + (steps > 7)
    diagonals = sum(isinstance(i, Diagonal) for i in code.instructions)
    reads = {
        (a.name, a.dim)
        for i in code.instructions
        if isinstance(i, Compute)
        for a in i.args
        if isinstance(a, VectorRef)
    }
    columns = sum(dim == 1 - flipped for _, dim in reads)
    columns += any(isinstance(i, Compute) and i.op == "positive_tile" for i in code.instructions)
    folds = sum(len(i.targets) for i in sums if not i.dim)
    whole = column_sums(arch) == "whole"
    if whole:  # a column's sum is a tile, and its maximum crosses threads
        live, column = live + folds * (3 if code.mode == "running" else 2) // 2, 0
    total = ADDRESSES_OF_DESCRIPTORS if has_descriptors(arch) else ADDRESSES
    total += element * live + column * (columns + folds)
    if folds and (several or code.mode == "running"):
        total += element // 2
    total += element // 2 * (whole and bool(folds) and bool(code.gradients) and steps > 7)
    total += element // 4 * (diagonals > 1)
    return total + 10 * sum(len(i.targets) for i in sums if several)
