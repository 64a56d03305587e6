"""Sweeps over slots, a row's own candidates: PyTorch on the device, a block of rows at a time.

Each row has operands of its own, so nothing is shared between rows and there is no matrix product
for tensor cores: such a sweep reads its operands once and is bound by that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import sympy as sp

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.pass_text import PassText
from cl_compiler.codegen.passes import PassPrinter
from cl_compiler.codegen.printers import TilePrinter
from cl_compiler.codegen.products import ProductPrinter
from cl_compiler.codegen.triton.sweep_text import SweepText
from cl_compiler.lang.ir import SLOTS
from cl_compiler.lang.program import Pass, Program
from cl_compiler.lang.tile_ir import Compute, GradientTile, TileProgram, VectorRef

SLOT_ROWS = 512
"""Rows of a block; a constant of the emitted file."""


@dataclass
class SlotSweepText(SweepText):
    """A function over blocks of rows; it launches no kernel of this file."""

    visits: ClassVar[str] = "slots"
    block: PassText | None = None

    @property
    def statements(self) -> list[str]:
        """All that is printed here."""
        assert self.block is not None
        return self.block.body


class _SlotProducts(ProductPrinter):
    """As its base, with scalars that stay on the device: they go into the tile."""

    def lines(self, g: GradientTile) -> list[str]:
        if g.scale == 1:
            return super().lines(g)
        factor = self.p.printer(self.p.symbol).text(g.scale)
        before = f"{self.p.code.buffers[g.value]}.mul_({factor})"
        return [before, *super().lines(replace(g, scale=sp.Integer(1)))]


class _SlotTiles(TilePrinter):
    """As its base: tiles are fp32, and what is chosen into one must be, too."""

    def compute(self, c: Compute) -> str:
        if c.op != "where":
            return super().compute(c)
        mask, *args = (self.ref(a) for a in c.args)
        chosen = [
            f"{text}.float()" if isinstance(a, VectorRef) else text
            for a, text in zip(c.args[1:], args, strict=True)
        ]
        return f"torch.where({mask}, {', '.join(chosen)}, out={self.tile(c.value)})"


class _SlotPrinter(PassPrinter):
    """Prints one pass over slots."""

    on_device = True

    def tile_printer(self, code: TileProgram) -> TilePrinter:
        return _SlotTiles(code.buffers, self.scalar, self.vector, self.numbers, self.on_device)

    def text(self) -> PassText:
        self.products = _SlotProducts(self)
        return super().text()


def slot_pass(program: Program, pass_: Pass, names: Names, name: str, cast: bool) -> PassPrinter:
    """The printer of a pass over slots, whose sums are safe for any logits."""
    return _SlotPrinter(program, pass_, program.modes[-1], names, name, cast)


def obstacle_of_slots(program: Program) -> str:
    """Why a program's slots cannot run beside kernels; "" where they can."""
    leaves = program.plan.leaves.values()
    slots = {op.name for op in program.plan.ir.operands if SLOTS in op.axes}
    if any(leaf.kind == "norm" and leaf.left and leaf.left.operand in slots for leaf in leaves):
        return "norms of slots (a row's own candidates) have no Triton template"
    if slots and len({leaf.scale for leaf in leaves if leaf.kind == "similarity"}) > 1:
        return "slots beside similarities of another scale have no Triton template"
    return ""


__all__ = ["SLOT_ROWS", "SlotSweepText", "obstacle_of_slots", "slot_pass"]
