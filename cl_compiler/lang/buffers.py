"""Assign tile values to as few buffers as their lifetimes allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sympy as sp

from cl_compiler.lang.tile_ir import (
    Accumulate,
    AtPositives,
    Barrier,
    Compute,
    Diagonal,
    Gemm,
    GradientTile,
    Instruction,
    Mode,
    TileProgram,
    TileRef,
)

Hoisted = Mapping[str, tuple[sp.Expr, tuple[str, ...]]]


def reads_of(instruction: Instruction) -> tuple[int, ...]:
    """Tile values that an instruction reads."""
    match instruction:
        case Compute(args=args):
            return tuple(a.value for a in args if isinstance(a, TileRef))
        case Diagonal(base=base, reads=reads):
            return (base, *(r.value for _, r in reads if isinstance(r, TileRef)))
        case Accumulate(args=values):
            return values
        case AtPositives(value=value) | GradientTile(value=value):
            return (value,)
        case _:
            return ()


def writes_of(instruction: Instruction) -> int | None:
    """The tile value that an instruction makes (an Accumulate: its scratch)."""
    match instruction:
        case Accumulate(scratch=scratch):
            return scratch
        case Barrier() | AtPositives() | GradientTile():
            return None
        case _:
            return instruction.value


_ROOTS = (Accumulate, Barrier, AtPositives, GradientTile)
"""What is there for its effect rather than for a value."""


def _live(code: Sequence[Instruction], roots: set[int]) -> list[Instruction]:
    """Instructions whose result somebody reads."""
    needed, kept = set(roots), []
    for instruction in reversed(code):
        if isinstance(instruction, _ROOTS) or instruction.value in needed:
            kept.append(instruction)
            needed.update(reads_of(instruction))
    return kept[::-1]


def assign_buffers(
    mode: Mode,
    code: Sequence[Instruction],
    hoisted: Hoisted,
    gradients: tuple[GradientTile, ...],
    kept: int | None,
    keep_action: str,
    taken: Collection[str] = (),
    spanning: Collection[int] | None = None,
) -> TileProgram:
    """Drop what nobody reads, then scan linearly: a value may take over a dying operand's buffer.

    ``keep_action``: "write" (the kept value is made here), "read" (it is given) or "".
    ``taken``: names of buffers that belong to somebody else.
    ``spanning``: values that span the tile where others have a strip of it (None: all of them).
    """
    roots = {g.value for g in gradients} | ({kept} if kept is not None else set())
    live = _live(code, roots)
    last: dict[int, int] = dict.fromkeys(roots, len(live))
    for index in range(len(live) - 1, -1, -1):
        for read in reads_of(live[index]):
            last.setdefault(read, index)
    kept_chain = _kept_chain(live, kept, last) if keep_action == "write" else {kept}
    is_mask = {i.value: i.is_mask for i in live if isinstance(i, (Compute, Diagonal))}
    buffers: dict[int, str] = {kept: "kept"} if kept is not None and keep_action == "read" else {}
    free: dict[str, list[str]] = {"t": [], "m": []}
    strips: set[str] = set()
    made = {kind: sum(b.startswith(kind) for b in taken) for kind in "tm"}
    for index, instruction in enumerate(live):
        value = writes_of(instruction)
        dying = [v for v in reads_of(instruction) if last[v] == index and v in buffers]
        dying = [v for i, v in enumerate(dying) if v not in dying[:i] and buffers[v] != "kept"]
        if value is not None:
            kind = "m" if is_mask.get(value) else "t"
            reusable = [v for v in dying if buffers[v][0] == kind]
            open_ = free[kind]
            is_strip = spanning is not None and value not in spanning
            if not is_strip:
                reusable = [v for v in reusable if buffers[v] not in strips]
                open_ = [b for b in open_ if b not in strips]
            if isinstance(instruction, Diagonal):
                reusable = [v for v in reusable if v == instruction.base]
            if isinstance(instruction, Accumulate):  # its exponentials replace the logits only
                logits, *values = instruction.args
                reusable = [v for v in reusable if v == logits and v not in values]
            if isinstance(instruction, Compute) and instruction.op in ("softmax", "log_softmax"):
                reusable = []  # it reads a row after it has written some of it
            if isinstance(instruction, Compute) and instruction.op == "fill_where":
                first = instruction.args[0]
                reusable = [v for v in reusable if first == TileRef(v)]
            if value in kept_chain:
                buffers[value] = "kept"
            elif reusable:
                buffers[value] = buffers[reusable[0]]
                dying.remove(reusable[0])
            elif open_:
                buffers[value] = open_[-1]
                free[kind].remove(open_[-1])
            else:
                buffers[value] = f"{kind}{made[kind]}"
                made[kind] += 1
                strips |= {buffers[value]} if is_strip else set()
        for v in dying:
            free[buffers[v][0]].append(buffers[v])
        if isinstance(instruction, Accumulate) and value is not None:
            free["t"].append(buffers[value])
        elif value is not None and value not in last and buffers[value] != "kept":
            free[buffers[value][0]].append(buffers[value])
    return TileProgram(mode, tuple(live), hoisted, buffers, gradients, kept, frozenset(strips))


def _kept_chain(code: Sequence[Instruction], kept: int | None, last: Mapping[int, int]) -> set[int]:
    """The kept value and those that only exist to become it: made in place, in its buffer."""
    chain: set[int] = set()
    made = {i.value: (n, i) for n, i in enumerate(code) if not isinstance(i, _ROOTS)}
    while kept is not None:
        chain.add(kept)
        index, instruction = made[kept]
        if isinstance(instruction, Gemm):
            break
        reads = [v for v in reads_of(instruction) if last.get(v) == index]
        kept = reads[0] if len(reads) == 1 and len(reads_of(instruction)) == 1 else None
    return chain


__all__ = [
    "assign_buffers",
    "reads_of",
    "writes_of",
]
