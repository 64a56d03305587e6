"""Passes whose tiles are worked on in strips (see ``lang.strips``).

Tiles are [m, n], column by column, so that a strip of columns is in one piece.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.printers import TilePrinter
from cl_compiler.codegen.stages import StagePrinter
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Gemm, Mode, TileProgram

Text = TypeVar("Text", bound=PassText)


class StripPassPrinter(PassPrinter):
    """Prints one pass in one mode; passes without strips as ``PassPrinter`` does.

    ``t0_tile`` is the tile whose strip is ``t0``.
    """

    in_products = False
    """Whether what is printed makes whole tiles."""

    def __init__(
        self, program: Program, pass_: Pass, mode: Mode, names: Names, name: str, cast: bool
    ) -> None:
        super().__init__(program, pass_, mode, names, name, cast)
        self.tile_products: dict[int, list[str]] = {}
        """Of each tile program: products that make tiles."""

    def tile_printer(self, code: TileProgram) -> TilePrinter:
        buffers = code.buffers
        if self.in_products:
            buffers = {value: f"{buffer}_tile" for value, buffer in buffers.items()}
        return TilePrinter(buffers, self.scalar, self.vector, self.numbers, self.on_device)

    def whole(self, value: int) -> str:
        tile = super().whole(value)
        return f"{tile}_tile" if self.pass_.in_strips else tile

    def body(self, code: TileProgram) -> list[str]:
        """Of a pass in strips, what is done to one of them, after ``tile_products``."""
        if not self.pass_.in_strips:
            return super().body(code)
        gemms = [i for i in code.instructions if isinstance(i, Gemm)]
        self.in_products = True
        self.tile_products[id(code)] = self.lines(code, gemms)
        self.in_products, self.col_index = False, "c"
        lines = self.lines(code, [i for i in code.instructions if not isinstance(i, Gemm)])
        self.col_index = "j"
        return lines

    def text(self) -> PassText:
        return self.stripped(super().text())

    def stripped(self, text: Text) -> Text:
        """The text with what a pass in strips has besides."""
        if not self.pass_.in_strips:
            return text
        again = self.pass_.remake.get(self.mode) if self.pass_.keep == "read" else None
        strips = self.code.strip_buffers | (again.strip_buffers if again else frozenset())
        return replace(
            text,
            in_strips=True,
            strip_buffers=[b for b, _ in text.buffers if b in strips],
            parts=[b for b, _ in text.buffers if b not in strips] + ["kept"] * bool(text.keep),
            tile_products=self.tile_products[id(self.code)],
            remade_products=self.tile_products[id(again)] if again else [],
            shape="(n, m).T",
        )


class StripStagePrinter(StagePrinter):
    """Prints the statements around such passes."""

    pass_printer = StripPassPrinter


__all__ = ["StripStagePrinter"]
