"""What the templates arrange: the pieces of one kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.lang.tile_ir import Mode


@dataclass(frozen=True)
class Partial:
    """A statistic of one tile or strip: where the kernel writes it, and how the host folds it.

    ``names``: pointers, one per part; ``targets``: the vectors that they are folded into.
    """

    kind: str
    names: tuple[str, ...]
    targets: tuple[str, ...]
    dim: int
    mirrored: bool


def low_of(workspace: str) -> str:
    """Where the second number of a split gradient tile goes."""
    return f"{workspace}_low"


def identifiers(text: str) -> list[str]:
    """The names of the caller that a host text reads."""
    found = re.findall(r"(?<![\w.])[A-Za-z_]\w*", text)
    return [
        f for f in found if f not in ("LOG2_E", "torch", "math", "DTYPE", "TIE_TOLERANCE", "float")
    ]


def residual_of(similarity: str) -> str:
    """What a row's gradient at its positive loses when it is rounded."""
    return f"residual_{similarity}"


@dataclass(frozen=True)
class GradientText:
    """A tile of dL/dsimilarity that the kernel writes to a workspace."""

    similarity: str
    workspace: str


@dataclass
class KernelText:
    """What the template needs of one kernel."""

    name: str
    doc: str
    mode: Mode
    tile: CoreTile
    operands: list[str]
    """What the launcher is given."""
    pointers_to: list[str] = field(default_factory=list)
    """Operands that are read through pointers."""
    descriptors: list[tuple[str, str, str]] = field(default_factory=list)
    """(parameter, matrix, rows of a block) of those that are read through tensor descriptors."""
    row_pointers: list[tuple[str, str]] = field(default_factory=list)
    """(variable, expression) of addresses that move with the row tile; then of the columns."""
    col_pointers: list[tuple[str, str]] = field(default_factory=list)
    row_vectors: list[tuple[str, str]] = field(default_factory=list)
    """(variable, pointer)."""
    col_vectors: list[tuple[str, str]] = field(default_factory=list)
    pointers: list[tuple[str, str]] = field(default_factory=list)
    """(pointer, host text of the vector) of all vectors, each once."""
    scalars: list[tuple[str, str]] = field(default_factory=list)
    """(variable, host text) of scalars that lie on the device."""
    numbers: list[tuple[str, str]] = field(default_factory=list)
    """(parameter, host text) of Python numbers."""
    widths: list[tuple[str, int]] = field(default_factory=list)
    """(constant, columns) of operands."""
    body: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    """Statements before the strip: column accumulators."""
    finish: list[str] = field(default_factory=list)
    """Statements after it."""
    partials: list[Partial] = field(default_factory=list)
    gradients: list[GradientText] = field(default_factory=list)
    residuals: list[str] = field(default_factory=list)
    """Vectors of what rounding takes off the gradient at each row's positive."""
    kept: list[tuple[str, str]] = field(default_factory=list)
    """(parameter, host text) of where tiles are kept for the backward."""
    halves: bool = False
    ahead: bool = False
    """Columns are counted from another place than rows, which the launcher knows."""
    guarded: bool = False

    @property
    def tile_name(self) -> str:
        """The constant that says how it is launched."""
        return f"{self.name.lstrip('_').upper()}_TILE"

    @property
    def folds(self) -> bool:
        return any("ROW_WARPS" in line for line in self.start)

    @property
    def in_strips(self) -> bool:
        """Whether a program keeps something across row tiles."""
        return bool(self.start)

    @property
    def owns(self) -> bool:
        """Whether programs own blocks of gradients."""
        return False

    @property
    def workspaces(self) -> list[str]:
        return [
            *(n for p in self.partials for n in p.names),
            *(g.workspace for g in self.gradients),
            *self.residuals,
        ]
