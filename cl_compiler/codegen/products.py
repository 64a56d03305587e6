"""The products of a gradient tile with the operands, which add up to the operands' gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_compiler.codegen.symbols import operand_scale, prefixed
from cl_compiler.lang.ir import View
from cl_compiler.lang.tile_ir import GradientTile

if TYPE_CHECKING:
    from cl_compiler.codegen.passes import PassPrinter


class ProductPrinter:
    """Prints the products of one pass in one mode.

    ``fresh``: operands whose gradient nothing was written to; the first product overwrites it.
    """

    def __init__(self, printer: PassPrinter, fresh: set[str]) -> None:
        self.p, self.fresh = printer, fresh

    def lines(self, g: GradientTile) -> list[str]:
        """Multiply a gradient tile into its operands' gradients."""
        left, right = self.p.views(g.similarity)
        tile = self.p.code.buffers[g.value]
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
            if to_left:
                lines += [
                    f"torch.mm({tile}, {y_j}, out=block[:m])",
                    f"block[:m].mul_({scale})",
                    f"{d_left}.add_(block[:m]{extra_left})",
                ]
            if to_right:
                lines += [
                    f"torch.mul({x_i}, {scale}, out=block[:m])",
                    f"{d_right}.addmm_({tile}.T, block[:m]{extra_right})",
                ]
            return lines
        if to_left:
            first = self._first(left)
            lines.append(f"{d_left}.addmm_({tile}, {y_j}{first}{extra_left})")
        if to_right:
            first = self._first(right)
            statement = f"{d_right}.addmm_({tile}.T, {x_i}{first}{extra_right})"
            once = [f"if {self.p.transposed}:", f"    {statement}"]
            lines += once if self.p.pass_.symmetric else [statement]
        return lines

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

    def _first(self, view: View) -> str:
        """Whether a product is the first into a gradient, which it then overwrites."""
        if view.operand not in self.fresh:
            return ""
        self.fresh.discard(view.operand)
        return ", beta=0"

    def _alpha(self, g: GradientTile, view: View, keyword: str = "alpha") -> str:
        """The scalars that a product with the gradient tile carries, as a keyword argument."""
        factors = []
        if g.scale != 1:
            text = self.p.printer(self.p.symbol).text(g.scale)
            factors.append(text if self.p.numbers(g.scale) else f"float({text})")
        leaf = self.p.plan.leaves[g.similarity]
        if leaf.scale and operand_scale(self.p.plan, view.operand) == "mixed":
            factors.append(f"{self.p.symbol(leaf.scale)}.item()")
        return f", {keyword}={' * '.join(factors)}" if factors else ""
