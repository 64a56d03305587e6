"""The tile that one program holds in registers, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import Accumulate, Gemm, Mode
from cl_compiler.plan.types import DTYPE_BYTES, Plan

SMALLEST_DOT = 16
"""Rows, columns and depth of the smallest matrix instruction."""

Columns = Literal["fold", "whole", "reduce"]


@dataclass(frozen=True)
class CoreTile:
    """One program's tile: rows, columns, depth of a step over the operands' columns."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def launch(self, folds: bool, fuse: bool) -> str:
        """As the keyword arguments of a launch.

        ``folds``: the kernel folds rows of warps; ``fuse``: products and sums become FMAs (what is
        emitted for gfx942 may not: Triton 3.9's LLVM then selects FMAs of two scalar registers,
        which its own assembler rejects).
        """
        values = {"BLOCK_M": self.rows, "BLOCK_N": self.cols, "BLOCK_D": self.depth}
        if folds:
            values["ROW_WARPS"] = min(self.warps, self.rows // SMALLEST_DOT)
        values |= {"num_warps": self.warps, "num_stages": self.stages}
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


def capability(arch: str) -> int:
    """90 of "sm_90", 0 of other vendors' names."""
    digits = "".join(c for c in arch.removeprefix("sm_") if c.isdigit())
    return int(digits) if arch.startswith("sm_") else 0


def core_tile(plan: Plan, pass_: Pass, mode: Mode, arch: str) -> CoreTile:
    """A tile that compiles without spills (``tests/codegen/triton/test_offline.py``).

    Two programs with four warps share a multiprocessor where one exponential is all there is to a
    logit; longer epilogues have the same tile for eight warps.  Further similarities and running
    statistics take tiles of registers, so theirs are smaller.
    """
    code = pass_.programs[mode]
    gemms = sum(isinstance(i, Gemm) for i in code.instructions)
    statistics = sum(isinstance(i, Accumulate) for i in code.instructions)
    width, bytes_ = plan.problem.D, DTYPE_BYTES[plan.problem.dtype]
    depth = min(128 // bytes_, max(SMALLEST_DOT, 1 << (width - 1).bit_length()))
    if arch.startswith("gfx"):
        return CoreTile(128, 128 if gemms == 1 else 64, min(depth, 32), 8, 2)
    stages = 3 if bytes_ == 2 else 2
    long = mode == "running" or code.transcendentals > 1 or statistics > 2 or bytes_ == 4
    if gemms > 1 or (long and statistics > 3):
        return CoreTile(64 if gemms > 1 else 128, 64, depth, 4 if gemms > 1 else 8, stages)
    if capability(arch) < 90:
        return CoreTile(128, 128, min(depth, 32), 8, stages + 1)
    if capability(arch) >= 100:
        return CoreTile(128, 64 if mode == "running" else 128, depth, 8, stages)
    if long:
        return CoreTile(128, 128, depth, 8, stages)
    if width >= 1024:
        return CoreTile(128, 256, depth, 8, stages)
    return CoreTile(128, 128, depth, 4, stages)
