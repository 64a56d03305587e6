"""Elementwise work strip by strip: a tile for the products, a part of its columns for the rest.

Products want tiles larger than the cores' own caches; elementwise passes want their buffers inside
them.  So the products of a tile are made first, whole, and everything between them and the products
with the gradient tile is done for one strip of columns after the other.  Only what products make or
multiply, and what is kept, spans the tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cl_compiler.lang.buffers import assign_buffers
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.tile_ir import Compute, Diagonal, Gemm, Mode, TileProgram, TileRef


def in_strips(program: Program) -> Program:
    """The program with the work of its passes in strips, where a pass's loops go over columns.

    Tiles that span their rows stay as they are: their rows' statistics are complete, and read, in
    the middle of a tile.
    """
    forward, backward = (tuple(map(_stage, s)) for s in (program.forward, program.backward))
    return replace(program, forward=forward, backward=backward)


def _stage(stage: Stage) -> Stage:
    return replace(stage, passes=tuple(map(_pass, stage.passes)))


def _pass(p: Pass) -> Pass:
    if p.is_slots or p.whole or p.whole_rows:
        return p
    programs, rounded = (_tile_programs(codes, p.keep) for codes in (p.programs, p.rounded))
    return replace(
        p,
        in_strips=True,
        programs=programs,
        remake=_remade(p.remake, programs),
        rounded=rounded,
        rounded_remake=_remade(p.rounded_remake, rounded or programs),
    )


def _tile_programs(codes: Mapping[Mode, TileProgram], keep: str) -> dict[Mode, TileProgram]:
    return {mode: _tile_program(code, keep) for mode, code in codes.items()}


def _remade(
    codes: Mapping[Mode, TileProgram], beside: Mapping[Mode, TileProgram]
) -> dict[Mode, TileProgram]:
    """How to make kept tiles again, in buffers that the programs beside have no use for."""
    return {
        mode: _tile_program(code, "write", frozenset(beside[mode].buffers.values()) - {"kept"})
        for mode, code in codes.items()
    }


def _tile_program(code: TileProgram, keep: str, taken: frozenset[str] = frozenset()) -> TileProgram:
    gemms = [i for i in code.instructions if isinstance(i, Gemm)]
    others = [i for i in code.instructions if not isinstance(i, Gemm)]
    spanning = {g.value for g in gemms} | {g.value for g in code.gradients}
    for i in reversed(others):  # replaced in some places: where they are, they stay
        if isinstance(i, Diagonal) and i.value in spanning:
            spanning.add(i.base)
        elif isinstance(i, Compute) and i.op == "fill_where" and i.value in spanning:
            spanning |= {a.value for a in i.args[:1] if isinstance(a, TileRef)}
    order = [*gemms, *others]
    return assign_buffers(
        code.mode, order, code.hoisted, code.gradients, code.kept, keep, taken, spanning
    )


__all__ = ["in_strips"]
