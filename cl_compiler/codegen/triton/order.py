"""The order of a tile program's instructions in a kernel: the one that needs fewest registers."""

from __future__ import annotations

from collections.abc import Sequence

from cl_compiler.lang.tile_ir import (
    Accumulate,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    TileRef,
)


def diagonals_together(code: Sequence[Instruction]) -> list[Instruction]:
    """Changes on the same diagonal next to each other, where the second does not need the first.

    They then share a branch.  With one for each, all that the second one's tile is made of lives
    through the first branch.
    """
    result = list(code)
    for d in [i for i in code if isinstance(i, Diagonal)]:
        at = result.index(d)
        later = _next_alike(result, at)
        if later is None:
            continue
        waiting, done = {d.value}, []
        for i in result[at + 1 : later]:
            if _reads(i) & waiting:
                waiting.add(i.value)  # type: ignore[union-attr]
            else:
                done.append(i)
        moved = [i for i in result[at + 1 : later] if i not in done]
        result[at : later + 1] = [*done, d, result[later], *moved]
    return result


def _next_alike(code: Sequence[Instruction], at: int) -> int | None:
    """The next change on the same diagonal that does not follow from the one at ``at``; None where
    a statistic, or a product, of what follows comes first."""
    d = code[at]
    assert isinstance(d, Diagonal)
    follows = {d.value}
    for index, i in enumerate(code[at + 1 :], at + 1):
        depends = bool(_reads(i) & follows)
        if isinstance(i, (Gemm, Accumulate)):
            return None
        if isinstance(i, Diagonal) and not depends and (i.where, i.how) == (d.where, d.how):
            return index
        if depends and isinstance(i, (Compute, Diagonal)):
            follows.add(i.value)
    return None


def goes_on(body: Sequence[str], block: Sequence[str]) -> bool:
    """Whether a kernel's last statement is a branch that opens with the lines of ``block``."""
    starts = [n for n, line in enumerate(body) if not line.startswith(" ")]
    return bool(starts) and list(body[starts[-1] : starts[-1] + len(block)]) == list(block)


def _reads(i: Instruction) -> set[int]:
    """Tile values that an instruction reads."""
    match i:
        case Compute():
            return {a.value for a in i.args if isinstance(a, TileRef)}
        case Diagonal():
            return {i.base, *(r.value for _, r in i.reads if isinstance(r, TileRef))}
        case Accumulate():
            return set(i.args)
        case _:
            return set()
