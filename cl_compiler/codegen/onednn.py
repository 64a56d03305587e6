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
    """Tiles that products make are new tensors, ``t0_tile`` that of the strips ``t0``."""

    def __init__(self, buffers: Mapping[int, str], of: OneDnnPassPrinter) -> None:
        super().__init__(buffers, of.scalar, of.vector, of.numbers)
        self.of = of
        self.printed: set[str] = set()
        """Tiles that have been made so far."""

    def gemm(self, g: Gemm, left: str, right: str, scale: str | None, slots: bool) -> str:
        """The similarity tile: neither scaled nor shifted afterwards."""
        out = self.tile(g.value)
        alpha, beta = self.alpha_beta(g, scale)
        offset = f", {self.of.offset(beta)}[:m]" if beta else ""
        product = f"_linear({right}, {self.of.packed(left, alpha)}{offset}).T"
        if self.of.pass_.in_strips:
            return f"{out}_tile = {product}"
        again = f"del {out}\n" if out in self.printed else ""
        self.printed.add(out)
        return f"{again}{out} = {product}"


class OneDnnPassPrinter(PassPrinter):
    """Prints one pass in one mode; passes over slots as ``PassPrinter`` does."""

    def __init__(
        self, program: Program, pass_: Pass, mode: Mode, names: Names, name: str, cast: bool
    ) -> None:
        super().__init__(program, pass_, mode, names, name, cast)
        self.packs: dict[tuple[str, str], str] = {}
        self.offsets: dict[str, str] = {}
        self.tile_products: dict[int, list[str]] = {}
        """Of each tile program: products that make tiles."""
        self.in_strip = False
        """Whether what is printed is done to a strip of the tile's columns."""
        if not pass_.is_slots:
            self.products = OneDnnProductPrinter(self)

    def tile_printer(self, code: TileProgram) -> TilePrinter:
        if self.pass_.is_slots:
            return super().tile_printer(code)
        return OneDnnTilePrinter(code.buffers, self)

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

    # -- strips ----------------------------------------------------------------------------------

    def at_cols(self, vector: str) -> str:
        return f"{vector}[c:c1]" if self.in_strip else super().at_cols(vector)

    def extent(self) -> tuple[str, str]:
        return ("i, i1", "c, c1") if self.in_strip else super().extent()

    def whole(self, value: int) -> str:
        tile = super().whole(value)
        return f"{tile}_tile" if self.pass_.in_strips else tile

    def body(self, code: TileProgram) -> list[str]:
        """Of a pass in strips, what is done to one of them, after ``tile_products``."""
        if not self.pass_.in_strips:
            return super().body(code)
        gemms = [i for i in code.instructions if isinstance(i, Gemm)]
        self.tile_products[id(code)] = self.lines(code, gemms)
        self.in_strip = True
        lines = self.lines(code, [i for i in code.instructions if not isinstance(i, Gemm)])
        self.in_strip = False
        return lines

    def text(self) -> PassText:
        text = super().text()
        if self.pass_.is_slots:
            return text
        text = self._in_strips(text) if self.pass_.in_strips else self._whole_tiles(text)
        packs = [
            f"{name} = _packed({rows if not factor else f'{rows} * ({factor})'}, width)"
            for (rows, factor), name in self.packs.items()
        ]
        return replace(
            text,
            before=[
                f"{name} = torch.full((step,), {number}, dtype=DTYPE)"
                for number, name in self.offsets.items()
            ],
            row_operands=[*text.row_operands, *packs],
            after_rows=[f"del {', '.join(self.packs.values())}"] if self.packs else [],
            shape="(n, m).T",
        )

    def _whole_tiles(self, text: PassText) -> PassText:
        assert not text.keep, "what is kept is kept of tiles in strips"
        made, filled = made_by_products(self.code), filled_otherwise(self.code)
        return replace(
            text,
            buffers=[b for b in text.buffers if b[0] not in made or b[0] in filled],
            after=[f"del {', '.join(sorted(made))}"] if made else [],
        )

    def _in_strips(self, text: PassText) -> PassText:
        """Products of tiles; of their strips the rest; products with them."""
        made = made_by_products(self.code)
        again = self.pass_.remake.get(self.mode) if self.pass_.keep == "read" else None
        remade = made_by_products(again) if again else frozenset()
        strips = self.code.strip_buffers | (again.strip_buffers if again else frozenset())
        spanning = [b for b, _ in text.buffers if b not in strips]
        parts = sorted(remade) if text.keep == "read" else []
        gone = [f"{b}, {b}_tile" if text.body else f"{b}_tile" for b in sorted(made)]
        return replace(
            text,
            buffers=[b for b in text.buffers if b[0] not in made | remade],
            in_strips=True,
            strip_buffers=[b for b, _ in text.buffers if b in strips],
            parts=[b for b in spanning if b not in remade] + (["kept"] if text.keep else []),
            tile_products=self.tile_products[id(self.code)],
            remade_products=self.tile_products[id(again)] if again else [],
            remake=[*(_part(b) for b in parts), *text.remake],
            after_remade=[f"del {b}, {b}_tile" for b in parts],
            makes_kept=_makes_kept(again or self.code),
            after=[f"del {', '.join(gone)}"] if gone else [],
        )


def _part(buffer: str) -> str:
    """The strip of a whole tile, under the name that statements of strips have for it."""
    return f"{buffer} = {buffer}_tile[:, c - j : c1 - j]"


def _makes_kept(code: TileProgram) -> bool:
    """Whether a product makes the tile that is kept, which is then not allocated before."""
    return any(isinstance(i, Gemm) and code.buffers[i.value] == "kept" for i in code.instructions)


class OneDnnStagePrinter(StagePrinter):
    """Prints the statements around such passes."""

    pass_printer = OneDnnPassPrinter


__all__ = ["OneDnnStagePrinter"]
