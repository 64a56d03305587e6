"""The products of a gradient tile with the operands, which add up to the operands' gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_compiler.codegen.symbols import prefixed, scaled_in_products
from cl_compiler.lang.ir import View
from cl_compiler.lang.tile_ir import GradientTile

if TYPE_CHECKING:
    from cl_compiler.codegen.passes import PassPrinter

D_WIDE = frozenset({"x", "y", "z"})
"""Operands of D columns, as is whatever a similarity compares them with."""


class ProductPrinter:
    """Prints the products of one pass in one mode."""

    def __init__(self, printer: PassPrinter) -> None:
        self.p = printer

    def lines(self, g: GradientTile) -> list[str]:
        """Multiply a gradient tile into its operands' gradients."""
        left, right = self.p.views(g.similarity)
        tile = self.p.whole(g.value)
        outs = self.p.grad_operands(g.similarity)
        to_left = left.operand in outs and "left" in self.p.pass_.sides
        to_right = right.operand in outs and "right" in self.p.pass_.sides
        d_left = prefixed(self.p.at_rows(f"d_{left.operand}"), left)
        if self.p.pass_.is_slots:
            return self._slot_products(g, left, right, tile, to_left, to_right)
        d_right = prefixed(self.p.at_cols(f"d_{right.operand}"), right)
        x_i, y_j = self.p.row(left), self.p.col(right)
        extra_left = self._alpha(g, left)
        extra_right = self._alpha(g, right)
        lines = []
        if g.row_scale:
            scale = f"{self.p.symbol(g.row_scale)}[:, None]"
            widths = self.block_widths()
            block = "block[:m]" if len(widths) == 1 else f"block[:m, :{self._width(left, right)}]"
            if to_left:
                lines += [
                    f"torch.mm({tile}, {y_j}, out={block})",
                    f"{block}.mul_({scale})",
                    f"{d_left}.add_({block}{extra_left})",
                ]
            if to_right:
                lines += [
                    f"torch.mul({x_i}, {scale}, out={block})",
                    self.product(d_right, right, f"{tile}.T", block, extra_right),
                ]
            return lines
        if to_left:
            lines.append(self.product(d_left, left, tile, y_j, extra_left))
        if to_right:
            statement = self.product(d_right, right, f"{tile}.T", x_i, extra_right)
            once = [f"if {self.p.transposed}:", f"    {statement}"]
            lines += once if self.p.pass_.symmetric else [statement]
        return lines

    def block_widths(self) -> list[str]:
        """Columns of the blocks of rows that are scaled, as text."""
        scaled = [self.p.views(g.similarity) for g in self.p.code.gradients if g.row_scale]
        return sorted({self._width(left, right) for left, right in scaled})

    @staticmethod
    def _width(left: View, right: View) -> str:
        if left.prefix is not None:
            return str(left.prefix)
        return "D" if {left.operand, right.operand} & D_WIDE else f"{left.operand}.shape[1]"

    def product(self, target: str, view: View, tile: str, operand: str, extra: str) -> str:
        """Add one product to a gradient."""
        return f"{target}.addmm_({tile}, {operand}{extra})"

    def _slot_products(
        self, g: GradientTile, left: View, right: View, tile: str, to_left: bool, to_right: bool
    ) -> list[str]:
        lines = []
        if to_left:
            product = f"torch.bmm({tile}.unsqueeze(1), {self.p.col(right)}).squeeze(1)"
            d_left = self.p.at_rows(f"d_{left.operand}")
            lines.append(f"{d_left}.add_({product}{self._alpha(g, left)})")
        if to_right:
            lines.append(
                f"{self.p.at_rows(f'd_{right.operand}')}.addcmul_({tile}.unsqueeze(2), "
                f"{self.p.row(left)}.unsqueeze(1){self._alpha(g, right, 'value')})"
            )
        return lines

    def _alpha(self, g: GradientTile, view: View, keyword: str = "alpha") -> str:
        """The scalars that a product with the gradient tile carries, as a keyword argument."""
        factors = []
        if g.scale != 1:
            text = self.p.printer(self.p.symbol).text(g.scale)
            factors.append(text if self.p.numbers(g.scale) else f"float({text})")
        leaf = self.p.plan.leaves[g.similarity]
        if leaf.scale and scaled_in_products(self.p.program, view.operand):
            factors.append(f"{self.p.symbol(leaf.scale)}.item()")
        return f", {keyword}={' * '.join(factors)}" if factors else ""
