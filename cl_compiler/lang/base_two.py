"""Exponentials of tiles to base 2, where a machine evaluates those faster.

``exp(t) = exp2(log2(e) · t)``, and a product of operands carries the factor for nothing where only
an exponential reads it.  That is done for all of a program or for none of it: sums of exponentials
and the weights that are divided by them cancel only if both are rounded alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from cl_compiler.lang.buffers import reads_of, writes_of
from cl_compiler.lang.lower_pass import bounded_logits
from cl_compiler.lang.program import Pass, Program, Stage
from cl_compiler.lang.tile_ir import (
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    Mode,
    ScalarRef,
    TileProgram,
    TileRef,
)

MODE: Mode = "bounded"
"""Running maxima are subtracted from tiles, which products cannot carry."""


def in_base_two(program: Program) -> Program:
    """The program with its shared exponentials to base 2; itself where some cannot be.

    Nor where positives are subtracted from sums of what tiles hold: vectors' exponentials, to base
    e, would not cancel those of tiles.  Nor with several shifts: where one of them is not safe, the
    backward follows running maxima though some sums are of shared exponentials.
    """
    if MODE not in program.modes or program.subtracts_positives:
        return program
    if len(set(bounded_logits(program.plan).values())) > 1:
        return program
    codes = [c for p in program.passes for m in (p.programs, p.remake) if (c := m.get(MODE))]
    if not all(_is_carried(code) for code in codes):
        return program
    forward, backward = (tuple(map(_stage, s)) for s in (program.forward, program.backward))
    return replace(program, forward=forward, backward=backward)


def has_exp2(program: Program) -> bool:
    """Whether exponentials of it are to base 2."""
    codes = (c for p in program.passes for c in p.programs.values())
    return any(isinstance(i, Compute) and i.op == "exp2" for c in codes for i in c.instructions)


def _stage(stage: Stage) -> Stage:
    return replace(stage, passes=tuple(map(_pass, stage.passes)))


def _pass(p: Pass) -> Pass:
    def shared(codes: Mapping[Mode, TileProgram]) -> dict[Mode, TileProgram]:
        return {m: _tile_program(code) if m == MODE else code for m, code in codes.items()}

    return replace(
        p,
        programs=shared(p.programs),
        remake=shared(p.remake),
        rounded=shared(p.rounded),
        rounded_remake=shared(p.rounded_remake),
    )


def _tile_program(code: TileProgram) -> TileProgram:
    carrying = {g for g, _ in _paths(code)}
    return replace(code, instructions=tuple(_changed(i, carrying) for i in code.instructions))


def _changed(i: Instruction, carrying: set[int]) -> Instruction:
    if isinstance(i, Gemm) and i.value in carrying:
        return replace(i, log2e=True)
    return replace(i, op="exp2") if isinstance(i, Compute) and i.op == "exp" else i


def _is_carried(code: TileProgram) -> bool:
    """Whether every exponential is of a product that nothing but exponentials reads."""
    wanted = {i.value for i in code.instructions if isinstance(i, Compute) and i.op == "exp"}
    return wanted == {made for _, exps in _paths(code) for made in exps}


def _paths(code: TileProgram) -> Iterator[tuple[int, set[int]]]:
    """Products that only exponentials read, and those."""
    readers: dict[int, list[Instruction]] = {}
    for i in code.instructions:
        for value in reads_of(i):
            readers.setdefault(value, []).append(i)
    roots = {g.value for g in code.gradients} | {code.kept}
    for i in code.instructions:
        if isinstance(i, Gemm):
            exps = _exponentials(i.value, readers, roots)
            if exps:
                yield i.value, exps


def _exponentials(
    value: int, readers: Mapping[int, list[Instruction]], roots: set[int | None]
) -> set[int]:
    """Exponentials of a value; none if something else reads it, too."""
    found: set[int] = set()
    for reader in readers.get(value, ()):
        made = writes_of(reader)
        if isinstance(reader, Compute) and reader.op == "exp":
            found.add(reader.value)
        elif made is not None and _fills_infinity(reader, value):
            more = _exponentials(made, readers, roots)
            if not more:
                return set()
            found |= more
        else:
            return set()
    return set() if value in roots else found


def _fills_infinity(reader: Instruction, value: int) -> bool:
    """Whether it is ``value`` with infinities in some places."""
    match reader:
        case Diagonal(base=base, how="fill", expr=expr):
            return base == value and bool(expr.is_infinite)
        case Compute(op="fill_where", args=(TileRef(value=base), _, ScalarRef(expr=expr))):
            return base == value and bool(expr.is_infinite)
    return False


__all__ = ["has_exp2", "in_base_two"]
