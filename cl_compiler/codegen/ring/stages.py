"""The statements around passes on many ranks: sums over all rows are sums over all ranks."""

from __future__ import annotations

import re

import sympy as sp

from cl_compiler.codegen.printers import VectorPrinter, bare
from cl_compiler.codegen.ring.passes import pass_printer
from cl_compiler.codegen.stages import PassCall, StagePrinter, StageText
from cl_compiler.codegen.symbols import LENGTH
from cl_compiler.lang.ir import COLS, ROWS, Reduction, View
from cl_compiler.lang.program import Pass, Stage
from cl_compiler.lang.ring import is_local
from cl_compiler.lang.tile_ir import Mode

_TOTAL = re.compile(r"(\w+) = ring\.total\((.*)\)")


class RingStagePrinter(StagePrinter):
    """Prints the statements around the passes of a program for many ranks.

    What ranks tell each other of single numbers goes in one message wherever it can.
    """

    pass_printer = staticmethod(pass_printer)  # type: ignore[assignment]
    largest: dict[str, str]
    """Vector → variable: of those whose largest elements a pass's bounds are made of."""

    def stage(self, stage: Stage, name: str, forward: bool) -> StageText:
        text = super().stage(stage, name, forward)
        return StageText(_in_one_message(text.vectors), text.calls)

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

    def _finish(self, pass_: Pass, mode: Mode) -> list[str]:
        """Also: sums that are added up as wide as tiles, for what is made of them in fp64."""
        lines = super()._finish(pass_, mode)
        if is_local(pass_.grid):
            return lines
        sums = {r.name for r in pass_.reductions if r.monoid == "sum"}
        names = [self.names(name) for name in sorted(sums & self.program.wide)]
        return lines + [f"{name} = {name}.double()" for name in names]

    def largest_norm(self, view: View) -> str:
        part = "" if view.prefix is None else f"[:, :{view.prefix}]"
        return f"{self._largest(self.row_norms(view.operand + part))}.item() * ROUNDING"

    def row_norms(self, part: str) -> str:
        """Euclidean norms of the rows of an operand, or of a part of each."""
        return f"torch.linalg.vector_norm({part}, dim=1, dtype=DTYPE)"

    def largest_element(self, vector: str) -> str:
        return f"{self._largest(f'{vector}.abs()')}.item()"

    def _largest(self, vector: str) -> str:
        return self.largest.setdefault(vector, f"largest_{len(self.largest) + 1}")

    def inner(self, operand: str) -> str:
        return f"ring.total({super().inner(operand)})"

    def _choose(self, call: PassCall, pass_: Pass, forward: bool) -> None:
        self.largest = {}
        super()._choose(call, pass_, forward)
        if self.largest:
            names, vectors = ", ".join(self.largest.values()), ", ".join(self.largest)
            call.largest = f"{names} = ring.largest({vectors})"
        # A shift is the same on every rank, and 0 where no exponential can go out of range.
        weighted = {self.shift(red) for red in pass_.softmeans}
        for shift, tests in call.guards.items():
            agreed = f"ring.agrees({' and '.join(tests)})"
            either = agreed if shift in weighted else f"({shift} == 0 or {agreed})"
            call.guards[shift] = [either]

    def _terms(self, name: str, pass_: Pass) -> str:
        node = self.plan.by_name[name]
        assert isinstance(node, Reduction)
        length = LENGTH[node.over]
        return f"all_{length}" if length in (ROWS, COLS) else length


def _in_one_message(lines: list[str]) -> list[str]:
    """Totals that follow each other, none of which needs an earlier one, as one statement."""
    result: list[str] = []
    run: list[tuple[str, str]] = []

    def end() -> None:
        if run:
            names, summands = (", ".join(part) for part in zip(*run, strict=True))
            result.append(f"{names} = ring.total({summands})")
            run.clear()

    for line in lines:
        total = _TOTAL.fullmatch(line)
        name, summand = total.groups() if total else ("", "")
        if not total or not _is_whole(summand):
            end()
            result.append(line)
            continue
        if any(re.search(rf"\b{earlier}\b", summand) for earlier, _ in run):
            end()
        run.append((name, summand))
    end()
    return result


def _is_whole(text: str) -> bool:
    """Whether every parenthesis in a text is closed by one that opened in it."""
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


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
