"""Passes whose products oneDNN makes.

``_linear(left, right)`` is ``left @ right.T``, a new tensor; its right operand can be packed once
and multiplied often, its left one would be copied if its rows were not contiguous.  So the rows of
a block are packed, scaled as the similarity is; tiles have contiguous columns; and of the two
products of a gradient tile the one with the packed rows is oneDNN's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.printers import TilePrinter
from cl_compiler.codegen.products import ProductPrinter
from cl_compiler.codegen.stages import StagePrinter
from cl_compiler.lang.buffers import filled_otherwise, made_by_products
from cl_compiler.lang.ir import View
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Gemm, Mode, TileProgram


class OneDnnProductPrinter(ProductPrinter):
    """Products of gradient tiles."""

    p: OneDnnPassPrinter

    def product(self, target: str, view: View, tile: str, operand: str, extra: str) -> str:
        """oneDNN's make the gradient of columns."""
        if not tile.endswith(".T"):
            return super().product(target, view, tile, operand, extra)
        rows = f"{operand}.T"
        if operand != "block[:m]":
            rows = self.p.packed(rows, "")
        elif self.p.pass_.whole_rows:  # scaled in this very tile, and multiplied part by part
            rows = f"_packed({rows}, width)"
        if self.p.pass_.whole_rows:
            return f"_add_linear({target}, {tile}, {rows}{extra})"
        return f"{target}.add_(_linear({tile}, {rows}){extra})"


class OneDnnTilePrinter(TilePrinter):
    """Tiles that products make are new tensors where ``rebinds``; others are copied."""

    def __init__(self, buffers: Mapping[int, str], of: OneDnnPassPrinter, rebinds: bool) -> None:
        super().__init__(buffers, of.scalar, of.vector, of.numbers)
        self.of, self.rebinds = of, rebinds
        self.made: set[str] = set()

    def gemm(self, g: Gemm, left: str, right: str, scale: str | None, slots: bool) -> str:
        """The similarity tile: neither scaled nor shifted afterwards."""
        out = self.tile(g.value)
        alpha, beta = self.alpha_beta(g, scale)
        offset = f", {self.of.offset(beta)}[:m]" if beta else ""
        product = f"_linear({right}, {self.of.packed(left, alpha)}{offset}).T"
        if not self.rebinds or out == "kept":
            return f"{out}.copy_({product})"
        again = f"del {out}\n" if out in self.made else ""
        self.made.add(out)
        return f"{again}{out} = {product}"


class OneDnnPassPrinter(PassPrinter):
    """Prints one pass in one mode; passes over slots as ``PassPrinter`` does."""

    def __init__(
        self, program: Program, pass_: Pass, mode: Mode, names: Names, name: str, cast: bool
    ) -> None:
        super().__init__(program, pass_, mode, names, name, cast)
        self.packs: dict[tuple[str, str], str] = {}
        self.offsets: dict[str, str] = {}
        if not pass_.is_slots:
            self.products = OneDnnProductPrinter(self)

    def tile_printer(self, code: TileProgram) -> TilePrinter:
        if self.pass_.is_slots:
            return super().tile_printer(code)
        return OneDnnTilePrinter(code.buffers, self, rebinds=code is self.code)

    def packed(self, rows: str, factor: str) -> str:
        """Rows ``x_i``, ``x_i[:, :prefix]`` or those transposed, packed times a factor."""
        key = rows, factor
        if key not in self.packs:
            operand = rows.removesuffix(".T").partition("[")[0].removesuffix("_i")
            self.packs[key] = f"{operand}_packed{len(self.packs) + 1}_i"
        return self.packs[key]

    def offset(self, number: str) -> str:
        """A vector that holds a number as often as a tile has rows."""
        if number not in self.offsets:
            self.offsets[number] = f"offset{len(self.offsets) + 1}_tile"
        return self.offsets[number]

    def text(self) -> PassText:
        text = super().text()
        if self.pass_.is_slots:
            return text
        made = made_by_products(self.code)
        filled = filled_otherwise(self.code)
        if self.pass_.keep == "read":  # those of a tile that is made again are copied
            filled |= frozenset(self.pass_.remake[self.mode].buffers.values())
        packs = [
            f"{name} = _packed({rows if not factor else f'{rows} * ({factor})'}, width)"
            for (rows, factor), name in self.packs.items()
        ]
        return replace(
            text,
            buffers=[b for b in text.buffers if b[0] not in made or b[0] in filled],
            before=[
                f"{name} = torch.full((step,), {number}, dtype=DTYPE)"
                for number, name in self.offsets.items()
            ],
            row_operands=[*text.row_operands, *packs],
            after=[f"del {', '.join(sorted(made))}"] if made else [],
            after_rows=[f"del {', '.join(self.packs.values())}"] if self.packs else [],
            shape="(n, m).T",
        )


class OneDnnStagePrinter(StagePrinter):
    """Prints the statements around such passes."""

    pass_printer = OneDnnPassPrinter


__all__ = ["OneDnnStagePrinter"]
