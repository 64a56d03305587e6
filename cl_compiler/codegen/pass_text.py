"""What the templates arrange into a loop nest: the pieces of text of one pass in one mode."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PassText:
    """What the template needs of one pass in one mode."""

    name: str
    doc: str
    body: list[str]
    products: list[str] = field(default_factory=list)
    """With gradient tiles."""
    params: list[str] = field(default_factory=list)
    accumulators: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(identifier, axis length, initial value, dtype)."""
    buffers: list[tuple[str, str]] = field(default_factory=list)
    """(identifier, dtype)."""
    row_length: str = ""
    col_length: str = ""
    row_operands: list[str] = field(default_factory=list)
    col_operands: list[str] = field(default_factory=list)
    casts: list[tuple[str, str, str]] = field(default_factory=list)
    """(identifier, tile length, operand) of cast buffers for 16-bit inputs."""
    remake: list[str] = field(default_factory=list)
    symmetric: bool = False
    whole_rows: bool = False
    slots: bool = False
    keep: str = ""
    block_width: str = ""
    """Columns of a scaled block of rows; "" where there is none."""
    results: list[str] = field(default_factory=list)
    shape: str = "(m, n)"
    """Of a tile in memory, as the argument of ``view``."""
    in_strips: bool = False
    """Whether the body is for a strip of the tile's columns; what follows is for that only."""
    tile_products: list[str] = field(default_factory=list)
    """Products that make tiles."""
    remade_products: list[str] = field(default_factory=list)
    """Those of a tile that was not kept."""
    parts: list[str] = field(default_factory=list)
    """Buffers that span the tile."""
    strip_buffers: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """All statements on tiles."""
        made = [*self.tile_products, *self.remade_products]
        return [*made, *self.remake, *self.body, *self.products]
