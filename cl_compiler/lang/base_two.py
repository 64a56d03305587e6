"""Exponentials of tiles to base 2, where a machine evaluates those faster.

``exp(t) = exp2(log2(e) · t)``.  A product of operands that only exponentials read carries the
factor, which then costs nothing; any other tile is multiplied by it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import sympy as sp

from cl_compiler.lang.buffers import reads_of, writes_of
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.tile_ir import (
    LOG2E,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    Mode,
    ScalarRef,
    TileProgram,
    TileRef,
)


def in_base_two(program: Program) -> Program:
    """The same program.

    One that is a single tile stays as it is, and one that subtracts positives from sums of what
    tiles hold: vectors' exponentials, to base e, would not cancel those of tiles.
    """
    if program.is_whole or program.subtracts_positives:
        return program
    forward, backward = (tuple(map(_stage, s)) for s in (program.forward, program.backward))
    return replace(program, forward=forward, backward=backward)


def has_exp2(program: Program) -> bool:
    """Whether some exponential of it is to base 2."""
    codes = (c for p in program.passes for m in (p.programs, p.remake) for c in m.values())
    return any(isinstance(i, Compute) and i.op == "exp2" for c in codes for i in c.instructions)


def _stage(stage: Stage) -> Stage:
    return replace(stage, passes=tuple(map(_pass, stage.passes)))


def _pass(p: Pass) -> Pass:
    def all_of(codes: Mapping[Mode, TileProgram]) -> dict[Mode, TileProgram]:
        return {mode: _tile_program(code) for mode, code in codes.items()}

    return replace(
        p,
        programs=all_of(p.programs),
        remake=all_of(p.remake),
        rounded=all_of(p.rounded),
        rounded_remake=all_of(p.rounded_remake),
    )


def _tile_program(code: TileProgram) -> TileProgram:
    scaled = _scaled(code)
    carried = {i.value for i in code.instructions if isinstance(i, Gemm)} & scaled
    buffers = dict(code.buffers)
    instructions: list[Instruction] = []
    fresh = max(buffers, default=0)
    for i in code.instructions:
        if isinstance(i, Gemm) and i.value in carried:
            instructions.append(replace(i, log2e=True))
        elif isinstance(i, Compute) and i.op == "exp":
            argument = i.args[0]
            if not (isinstance(argument, TileRef) and argument.value in scaled):
                fresh += 1
                buffers[fresh] = buffers[i.value]
                instructions.append(Compute(fresh, "mul", (argument, ScalarRef(LOG2E))))
                argument = TileRef(fresh)
            instructions.append(replace(i, op="exp2", args=(argument,)))
        else:
            instructions.append(i)
    return replace(code, instructions=tuple(instructions), buffers=buffers)


def _scaled(code: TileProgram) -> set[int]:
    """Products that only exponentials read, and what is made of them on the way there."""
    readers: dict[int, list[Instruction]] = {}
    for i in code.instructions:
        for value in reads_of(i):
            readers.setdefault(value, []).append(i)
    roots = {g.value for g in code.gradients} | {code.kept}
    result: set[int] = set()
    for i in code.instructions:
        if isinstance(i, Gemm):
            chain = list(_chain(i.value, readers))
            if None not in chain and not roots & set(chain):
                result.update(v for v in chain if v is not None)
    return result


def _chain(value: int, readers: Mapping[int, list[Instruction]]) -> Iterator[int | None]:
    """A value and those that equal it but where they are infinite; None if else it is read."""
    yield value
    for reader in readers.get(value, ()):
        if isinstance(reader, Compute) and reader.op == "exp":
            continue
        made = writes_of(reader)
        if made is not None and _fills_infinity(reader, value):
            yield from _chain(made, readers)
        else:
            yield None


def _fills_infinity(reader: Instruction, value: int) -> bool:
    """Whether it is ``value`` with infinities in some places."""
    match reader:
        case Diagonal(base=base, how="fill", expr=expr):
            return base == value and bool(expr.is_infinite)
        case Compute(op="fill_where", args=(TileRef(value=base), _, ScalarRef(expr=expr))):
            return base == value and isinstance(expr, sp.Expr) and bool(expr.is_infinite)
    return False


__all__ = ["has_exp2", "in_base_two"]
