"""Straight-line programs over tile buffers: what ``lower`` makes and a printer prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sympy as sp

Mode = Literal["plain", "bounded", "running", "whole"]
"""plain: no logsumexp.  bounded: one shared exponential, shifted by a bound of the logits.
running: running maxima, safe for any logits.  whole: all pairs in one tile, and softmaxes of whole
rows and columns: safe for any logits, too."""


@dataclass(frozen=True)
class TileRef:
    """A value [m, n] in a buffer."""

    value: int


@dataclass(frozen=True)
class VectorRef:
    """A slice of a vector: dim 0 is a column [m, 1] of the tile's rows, dim 1 a row [1, n]."""

    name: str
    dim: int


@dataclass(frozen=True)
class ScalarRef:
    """A number: the name of a scalar or a literal."""

    expr: sp.Expr


Ref = TileRef | VectorRef | ScalarRef


@dataclass(frozen=True)
class Gemm:
    """``value = alpha · left @ right.T + beta``; alpha and beta are scalars.

    ``scaled``: the similarity's own scale multiplies the product, too.
    ``log2e``: log2(e) multiplies it all, for exponentials to base 2.
    """

    value: int
    similarity: str
    alpha: sp.Expr
    beta: sp.Expr
    scaled: bool = True
    log2e: bool = False


@dataclass(frozen=True)
class Compute:
    """``value = op(*args)``, elementwise; may be written over an argument that dies here."""

    value: int
    op: str
    args: tuple[Ref, ...]
    is_mask: bool = False


@dataclass(frozen=True)
class Diagonal:
    """``value`` is ``base`` with the elements on a special diagonal replaced.

    how: "negate", "fill" (expr is a number), "set" (expr over ``reads``), "add" (a row vector),
    "take" (into a row vector, 0 is left; only a back end says so).
    where: "self" (offset 0) or "positive".
    """

    value: int
    base: int
    where: Literal["self", "positive"]
    how: Literal["negate", "fill", "set", "add", "take"]
    expr: sp.Expr
    reads: tuple[tuple[sp.Symbol, Ref], ...] = ()
    is_mask: bool = False


@dataclass(frozen=True)
class Accumulate:
    """Fold a tile along ``dim`` into vectors.

    kind: "sum" (target += sum), "max", "logsumexp" (running maximum and sum of exponentials) or
    "softmean" (those and a weighted sum); of the only tile there is, also "softmax" (the logsumexp
    of its first argument, whose softmax is the second), "log_softmax" (the logsumexp of what that
    tile is the log-softmax of) and "total" (the sum along both dimensions).
    ``mirrored``: on a symmetric grid, also stands for the transposed tile, and is skipped on tiles
    of the diagonal.
    ``scratch``: a tile value for the exponentials of "logsumexp" and "softmean".
    """

    kind: Literal["sum", "max", "logsumexp", "softmean", "softmax", "log_softmax", "total"]
    targets: tuple[str, ...]
    args: tuple[int, ...]
    dim: int
    mirrored: bool = False
    scratch: int | None = None


@dataclass(frozen=True)
class Barrier:
    """The tile spans its rows' whole extent: row statistics are complete from here on.

    Where one tile spans everything: all statistics of a level are.
    """


@dataclass(frozen=True)
class AtPositives:
    """``target``: a vector of the tile's values at each row's positive."""

    target: str
    value: int


@dataclass(frozen=True)
class GradientTile:
    """The tile of dL/dsimilarity, to be multiplied into the operands' gradients.

    ``row_scale``: a vector that multiplies its rows, left out of the tile ("" if none).
    ``scale``: a scalar left out of the tile.
    """

    similarity: str
    value: int
    scale: sp.Expr
    row_scale: str = ""


Instruction = Gemm | Compute | Diagonal | Accumulate | Barrier | AtPositives | GradientTile
"""A gradient tile is an instruction where it is multiplied before the program ends."""


@dataclass(frozen=True)
class TileProgram:
    """What happens to one tile.

    ``hoisted``: vectors and scalars to evaluate before the sweep, name → (expression, axes).
    ``buffers``: tile value → buffer ("t0" … in the compute dtype, "m0" … bool).
    ``kept``: the value that the schedule keeps (its buffer is "kept"), if any.
    ``strip_buffers``: those that hold a strip of columns at a time; the others span the tile.
    """

    mode: Mode
    instructions: tuple[Instruction, ...]
    hoisted: Mapping[str, tuple[sp.Expr, tuple[str, ...]]]
    buffers: Mapping[int, str]
    gradients: tuple[GradientTile, ...]
    kept: int | None = None
    strip_buffers: frozenset[str] = frozenset()

    @property
    def float_buffers(self) -> int:
        """Tile buffers in the compute dtype; neither the kept one nor strips are counted."""
        return len({b for b in self.buffers.values() if b.startswith("t")} - self.strip_buffers)

    @property
    def mask_buffers(self) -> int:
        return len({b for b in self.buffers.values() if b.startswith("m")} - self.strip_buffers)

    @property
    def gemms(self) -> int:
        return sum(isinstance(i, Gemm) for i in self.instructions)

    @property
    def transcendentals(self) -> int:
        """Elementwise passes that evaluate exp, log, sigmoid or softplus."""
        return sum(isinstance(i, Compute) and i.op in SLOW_OPS for i in self.instructions) + sum(
            isinstance(i, Accumulate) and i.kind in ("logsumexp", "softmean")
            for i in self.instructions
        )

    @property
    def passes(self) -> int:
        """All other passes over a tile."""
        work = [i for i in self.instructions if isinstance(i, (Compute, Accumulate))]
        return len(work) - self.transcendentals


SLOW_OPS = frozenset(
    {
        "exp",
        "exp2",
        "log",
        "sigmoid",
        "softplus",
        "logaddexp",
        "pow",
        "expm1",
        "sqrt",
        "softmax",
        "log_softmax",
    }
)
