"""What happens to one tile, counted on the instructions that the code generator prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cl_compiler.lang.tile_ir import (
    SLOW_OPS,
    Accumulate,
    AtPositives,
    Compute,
    Diagonal,
    Gemm,
    Instruction,
    TileRef,
    VectorRef,
)


@dataclass(frozen=True)
class TileWork:
    """What happens to one element of a tile, and to one tile.

    ``exps``, ``passes``: elementwise passes that evaluate a transcendental function, and others;
    ``exp2s``: those that evaluate an exponential to base 2.
    ``floats_moved``, ``masks_moved``: elements read or written by them and by the products.
    ``operators``: operators launched per tile; ``between``: those of them that run between its
    products, and on each of its strips where it has strips.  ``gemms``: tiles of similarities made.
    """

    exps: int = 0
    passes: int = 0
    floats_moved: int = 0
    masks_moved: int = 0
    operators: int = 0
    gemms: int = 0
    exp2s: int = 0
    between: int = 0

    def __add__(self, other: TileWork) -> TileWork:
        return TileWork(
            self.exps + other.exps,
            self.passes + other.passes,
            self.floats_moved + other.floats_moved,
            self.masks_moved + other.masks_moved,
            self.operators + other.operators,
            self.gemms + other.gemms,
            self.exp2s + other.exp2s,
            self.between + other.between,
        )


# (exps, passes, floats moved, operators) of folding a tile: a running logsumexp takes a maximum,
# subtracts it, exponentiates and sums; softmean also multiplies and sums a second time.  Beside a
# softmax, which is an operator of its own, there are two maxima; beside a log-softmax, a diagonal.
_FOLDS = {
    "sum": (0, 1, 1, 2),
    "max": (0, 1, 1, 2),
    "softmax": (0, 2, 2, 5),
    "log_softmax": (0, 0, 0, 2),
    "total": (0, 1, 1, 1),
    "logsumexp": (1, 3, 6, 8),
    "softmean": (1, 5, 10, 11),
}


def tile_work(code: Iterable[Instruction], whole: bool) -> TileWork:
    """What instructions do to a tile; ``whole``: to the only one there is."""
    total = TileWork()
    for instruction in code:
        work = _work_of(instruction, whole)
        total += work if isinstance(instruction, Gemm) else replace(work, between=work.operators)
    return total


def _work_of(instruction: Instruction, whole: bool) -> TileWork:
    """``whole``: there is one tile only."""
    match instruction:
        case Gemm():
            return TileWork(floats_moved=1, operators=1, gemms=1)
        case Compute(op=op, args=args, is_mask=is_mask):
            slow = op in SLOW_OPS
            moved = 1 + sum(isinstance(a, TileRef) for a in args)
            views = [a for a in args if whole and isinstance(a, VectorRef) and a.dim == 0]
            return TileWork(
                exps=int(slow and op != "exp2"),
                passes=int(not slow),
                floats_moved=0 if is_mask else moved,
                masks_moved=moved if is_mask else 0,
                operators=1 + len(views),
                exp2s=int(op == "exp2"),
            )
        case Accumulate(kind=kind):
            exps, passes, moved, operators = _FOLDS[kind]
            return TileWork(
                exps, passes, moved, 0, 1 if whole and kind in ("sum", "max") else operators
            )
        case Diagonal() | AtPositives():  # few elements, and of many tiles few have any
            return TileWork(operators=2 if whole else 0)
        case _:  # a barrier does nothing, and products are counted beside the instructions
            return TileWork()


__all__ = ["TileWork", "tile_work"]
