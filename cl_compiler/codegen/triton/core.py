"""The tile that one program holds in registers, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass

from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import Accumulate, Gemm, Mode
from cl_compiler.plan.types import DTYPE_BYTES, Plan

SMALLEST_DOT = 16
"""Rows, columns and depth of the smallest matrix instruction."""


@dataclass(frozen=True)
class CoreTile:
    """One program's tile: rows, columns, depth of a step over the operands' columns."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def launch(self) -> str:
        """As the keyword arguments of a launch."""
        values = {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.cols,
            "BLOCK_D": self.depth,
            "ROW_WARPS": min(self.warps, self.rows // SMALLEST_DOT),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"


def core_tile(plan: Plan, pass_: Pass, mode: Mode, arch: str) -> CoreTile:
    """A tile that compiles without spills.

    Two programs share a multiprocessor while the operands are narrow; one with eight warps feeds
    wide ones better.  Every further similarity, and running statistics, take a tile of registers.
    """
    code = next(iter(pass_.programs.values()))
    gemms = sum(isinstance(i, Gemm) for i in code.instructions)
    width = plan.problem.D
    bytes_ = DTYPE_BYTES[plan.problem.dtype]
    depth = min(128 // bytes_, max(SMALLEST_DOT, 1 << (width - 1).bit_length()))
    if arch.startswith("gfx"):
        return CoreTile(128, 128 if gemms == 1 else 64, min(depth, 64), 8, 2)
    stages = 3 if bytes_ == 2 else 2
    if gemms > 1:
        return CoreTile(64, 128, depth, 8, stages)
    if mode == "running":
        return CoreTile(128, 128, depth, 8, stages)
    several = sum(isinstance(i, Accumulate) for i in code.instructions) > 2
    if bytes_ == 4 or several:
        return CoreTile(128, 128, depth, 8, stages)
    if width >= 1024 and arch not in ("sm_80", "sm_86", "sm_89"):
        return CoreTile(128, 256, depth, 8, stages)
    return CoreTile(128, 128, depth, 4, stages)
