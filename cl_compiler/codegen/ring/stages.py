"""The statements around passes on many ranks: sums over all rows are sums over all ranks."""

from __future__ import annotations

import sympy as sp

from cl_compiler.codegen.printers import VectorPrinter, bare
from cl_compiler.codegen.ring.passes import pass_printer
from cl_compiler.codegen.stages import PassCall, StagePrinter
from cl_compiler.codegen.symbols import LENGTH
from cl_compiler.lang.ir import COLS, ROWS, Reduction, View
from cl_compiler.lang.program import Pass


class RingStagePrinter(StagePrinter):
    """Prints the statements around the passes of a program for many ranks."""

    pass_printer = staticmethod(pass_printer)  # type: ignore[assignment]

    def _reduced(self, red: Reduction, printer: VectorPrinter) -> str:
        if red.monoid == "sum":
            return f"ring.total({super()._reduced(red, printer)})"

        def masked(expr: sp.Expr) -> str:
            text = printer.text(expr)
            if red.where == 1:
                return text
            return f"torch.where({bare(printer.text(red.where))}, {text}, -math.inf)"

        if red.monoid == "max":
            return f"ring.largest({masked(red.operand)})"
        if red.monoid == "logsumexp":
            return f"_logsumexp_of_all(ring, {masked(red.operand)})"
        assert red.logits is not None
        value = printer.text(red.operand)
        return f"_softmean_of_all(ring, {masked(red.logits)}, {value})"

    def largest_norm(self, view: View) -> str:
        part = "" if view.prefix is None else f"[:, :{view.prefix}]"
        norms = f"torch.linalg.vector_norm({view.operand}{part}, dim=1, dtype=DTYPE)"
        return f"ring.largest({norms}).item() * ROUNDING"

    def largest_element(self, vector: str) -> str:
        return f"ring.largest({vector}.abs()).item()"

    def inner(self, operand: str) -> str:
        return f"ring.total({super().inner(operand)})"

    def _choose(self, call: PassCall, pass_: Pass, forward: bool) -> None:
        super()._choose(call, pass_, forward)
        # A shift is the same on every rank, and 0 where nothing can go out of range.
        call.guards = {
            shift: [f"({shift} == 0 or ring.agrees({' and '.join(tests)}))"]
            for shift, tests in call.guards.items()
        }

    def _terms(self, name: str, pass_: Pass) -> str:
        node = self.plan.by_name[name]
        assert isinstance(node, Reduction)
        length = LENGTH[node.over]
        return f"all_{length}" if length in (ROWS, COLS) else length


class CanonicalStagePrinter(RingStagePrinter):
    """Sums are those of fixed chunks, added in global order."""

    def _reduced(self, red: Reduction, printer: VectorPrinter) -> str:
        if red.monoid != "sum":
            return super()._reduced(red, printer)
        text = StagePrinter._reduced(self, red, printer).removesuffix(".sum(dtype=torch.float64)")
        return f"_total_of_all(ring, {bare(text)}, {LENGTH[red.over].upper()})"

    def inner(self, operand: str) -> str:
        axis = next(op.axes[0] for op in self.plan.ir.operands if op.name == operand)
        return f"_inner_of_all(ring, {operand}, d_{operand}, {LENGTH[axis].upper()})"


__all__ = ["CanonicalStagePrinter", "RingStagePrinter"]
