"""What oneDNN's products take beside the tiles of a pass: packed rows, and tiles made anew."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

from cl_compiler.lang.buffers import filled_otherwise, made_by_products
from cl_compiler.lang.ir import Leaf, View
from cl_compiler.lang.program import Pass
from cl_compiler.lang.tile_ir import Gemm, Mode, TileProgram
from cl_compiler.plan.sizes import SCRATCH, Sizes


def made_anew(p: Pass, mode: Mode) -> int:
    """Buffers that exist beside the new tensors that take their names."""
    code = p.programs[mode]
    return len(made_by_products(code) & filled_otherwise(code))


def passing(p: Pass, mode: Mode) -> sp.Expr:
    """Tiles that products make for a while: all but those that are kept."""
    again = p.remake[mode] if p.keep == "read" else None
    return _made(p.programs[mode]) + (SCRATCH * _made(again) if again else 0)


def _made(code: TileProgram) -> int:
    return sum(isinstance(i, Gemm) and code.buffers[i.value] != "kept" for i in code.instructions)


def packed_widths(p: Pass, leaves: Mapping[str, Leaf], sizes: Sizes) -> tuple[sp.Expr, ...]:
    """Columns of all rows that are packed: each as often as it is scaled, and transposed."""
    most: tuple[sp.Expr, ...] = ()
    for mode, code in p.programs.items():
        again = p.remake[mode].instructions if p.keep == "read" else ()
        found = {
            (leaf.left, leaf.scale if i.scaled else None, i.alpha, i.log2e): sizes.width(leaf.left)
            for i in (*code.instructions, *again)
            if isinstance(i, Gemm) and (leaf := leaves[i.similarity])
        }
        most = max(most, tuple(found.values()), key=len)
    transposed: dict[View | None, sp.Expr] = {
        leaves[name].left: sizes.width(leaves[name].left)
        for name in p.gradients
        if "right" in p.sides
    }
    return (*most, *transposed.values())


__all__ = ["made_anew", "packed_widths", "passing"]
