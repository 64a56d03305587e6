"""Which axis of a grid runs along the first dimension of a tile in registers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Orientation:
    """``flipped``: columns of the grid run along the tile's first dimension.

    A program that owns columns holds its tiles so: the gradient tile is then multiplied as it
    lies, where its transpose would have to go through shared memory.
    """

    flipped: bool = False

    @property
    def shape(self) -> str:
        """Of a tile, as Triton text."""
        return "[BLOCK_N, BLOCK_M]" if self.flipped else "[BLOCK_M, BLOCK_N]"

    def along(self, vector: str, dim: int) -> str:
        """A vector of rows (dim 0) or columns (dim 1) beside a tile."""
        return f"{vector}[:, None]" if (dim == 0) != self.flipped else f"{vector}[None, :]"

    def dim(self, dim: int) -> int:
        """The tile's dimension along which rows (0) or columns (1) run."""
        return 1 - dim if self.flipped else dim
