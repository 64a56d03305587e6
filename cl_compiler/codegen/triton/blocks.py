"""Blocks of operands and their products: what every kernel starts with."""

from __future__ import annotations

from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.codegen.triton.orientation import Orientation
from cl_compiler.codegen.triton.text import KernelText
from cl_compiler.lang.ir import View
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Gemm


class BlockPrinter:
    """Prints loads and products for a kernel printer, which says what of."""

    orientation = Orientation()
    plan: SweepPlan
    tile: CoreTile
    descriptors: bool
    widths: dict[str, int]
    precision: str
    dots: dict[int, str]

    def views(self, similarity: str) -> tuple[View, View]:
        leaf = self.plan.leaves[similarity]
        assert leaf.left is not None and leaf.right is not None
        return leaf.left, leaf.right

    def _width(self, operand: str) -> str:
        main = self.widths[operand] == self.widths[self.plan.ir.operands[0].name]
        return "D" if main else f"{operand.upper()}_D"

    def _products(self, k: KernelText, g: Gemm) -> list[str]:
        """The loop over the operands' columns."""
        left, right = self.views(g.similarity)
        dots, tiles = self.dots[g.value], self._tiles(left, right)
        loads = [self._load(k, view, dim) for dim, view in enumerate((left, right))]
        text = str(left.prefix) if left.prefix else self._width(left.operand)
        if self.descriptors:
            text = str(left.prefix or self.widths[left.operand])
        return [
            f"{dots} = tl.zeros({self.orientation.shape}, tl.float32)",
            f"for k in range(0, {text}, BLOCK_D):",
            *(f"    {tile} = {load}" for tile, load in zip(tiles, loads, strict=True)),
            f"    {dots} = {self._dot(tiles, dots)}",
        ]

    def _tiles(self, left: View, right: View) -> tuple[str, str]:
        """What a kernel calls the blocks of a similarity's operands."""
        if left.operand == right.operand:
            return f"{left.operand}_row_tile", f"{right.operand}_col_tile"
        return f"{left.operand}_tile", f"{right.operand}_tile"

    def _dot(self, tiles: tuple[str, str], total: str) -> str:
        """The product of blocks of the left and of the right operand, plus a total."""
        first, second = tiles[::-1] if self.orientation.flipped else tiles
        return f"tl.dot({first}, {second}.T{', ' * bool(total)}{total}{self._precision()})"

    def _precision(self) -> str:
        return f', input_precision="{self.precision}"' if self.precision else ""

    def _load(self, k: KernelText, view: View, dim: int, step: str = "k") -> str:
        """A block of an operand's rows and columns, from column ``step`` ("": all of them); zeros
        beyond the last column."""
        start, offs, stop = (("i", "offs_m", "row_stop"), ("j", "offs_n", "col_stop"))[dim]
        if self.descriptors:
            part = "" if view.prefix is None else f"[:, :{view.prefix}]"
            name = f"{view.operand}_{('rows', 'cols')[dim]}{view.prefix or ''}"
            entry = (name, f"{view.operand}{part}", ("block_m", "block_n")[dim])
            k.descriptors += [entry] if entry not in k.descriptors else []
            return f"{name}.load([{start}, {step or 0}])"
        address = f"{view.operand}_{start}"
        rows = f"{view.operand} + _clamped({offs}, {stop}, RAGGED).to(tl.int64)[:, None]"
        entries = (k.row_pointers, k.col_pointers)[dim]
        known = (address, f"{rows} * {self._width(view.operand)} + offs_d[None, :]")
        entries += [known] if known not in entries else []
        width = view.prefix or self.widths[view.operand]
        text = str(view.prefix) if view.prefix else self._width(view.operand)
        masked = width % self.tile.depth != 0
        at = f"{step} + " * bool(step)
        mask = f", mask=({at}offs_d < {text})[None, :], other=0.0" if masked else ""
        return f"tl.load({address}{f' + {step}' * bool(step)}{mask})"
