"""Vectors and scalars between kernels, as PyTorch statements that never leave the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy as sp

from cl_compiler.codegen.bounds import bound_text
from cl_compiler.codegen.names import Names
from cl_compiler.codegen.printers import VectorPrinter, bare
from cl_compiler.codegen.stages import StagePrinter
from cl_compiler.codegen.symbols import PythonNumbers, shift_owner, softmean_partner
from cl_compiler.codegen.triton.eight_bits import EightBitCopy, read_as
from cl_compiler.lang.ir import Leaf, Reduction, View, axes_of
from cl_compiler.lang.lower import inverse_of, shift_of
from cl_compiler.lang.program import Program
from cl_compiler.lang.resolve import ONE_TO_ONE, Positives
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import Mode


class DeviceNumbers(PythonNumbers):
    """As its base; but shifts follow from norms, which stay on the device."""

    def __init__(
        self, plan: SweepPlan, hoisted: Mapping[str, tuple[sp.Expr, tuple[str, ...]]] | None = None
    ) -> None:
        super().__init__(plan, hoisted)
        self.known = {name for name in self.known if not name.startswith("shift_")}


class DeviceVectorPrinter(VectorPrinter):
    """As its base, with constants made on the device of ``anchor``, so that none is copied."""

    def __init__(
        self,
        names: Callable[[str], str],
        is_vector: Callable[[sp.Expr], bool],
        is_python: Callable[[sp.Expr], bool],
        positives: Positives,
        anchor: str,
    ) -> None:
        super().__init__(names, is_vector, is_python, positives)
        self.anchor = anchor

    def full(self, text: str, length: str = "") -> str:
        """A number as a tensor: [] or, with a length, a vector."""
        shape = f"({length},)" if length else "()"
        return f"torch.full({shape}, {text}, dtype=DTYPE, device={self.anchor}.device)"

    def tensor(self, expr: sp.Expr, dtype: str = "DTYPE") -> str:
        text = str(self._print(expr))
        return self.full(text) if expr.is_number or self.is_python(expr) else text

    def _select(self, mask: sp.Expr, a: sp.Expr, b: sp.Expr) -> str:
        condition = bare(str(self._print(mask)))
        text = f"torch.where({condition}, {self._print(a)}, {self._print(b)})"
        if all(e.is_number or self.is_python(e) for e in (a, b)):
            text += ".to(DTYPE)"  # two numbers would make it fp32
        return text

    def _move(self, name: str, vector: sp.Expr) -> str:
        if self.is_vector(vector):
            return super()._move(name, vector)
        if vector.is_number or self.is_python(vector):
            rows = self.full(str(self._print(vector)), "rows")
        else:
            rows = f"({self._print(vector)}).expand(rows)"
        if name == "to_rows" or self.positives in ONE_TO_ONE:
            return rows
        return f"_to_columns({rows}, rows, cols)"


class DeviceStages(StagePrinter):
    """The torch statements around passes, for tensors on a device that must not be waited for."""

    def __init__(
        self, program: Program, names: Names, copies: Mapping[str, EightBitCopy] | None = None
    ) -> None:
        super().__init__(program, names, False)
        self.copies: Mapping[str, EightBitCopy] = copies or {}
        """Operand → what similarities are made of instead of it."""
        self.numbers = DeviceNumbers(program.plan)
        self.anchor = program.plan.ir.operands[0].name

    def vectors(self, lookup: Callable[[str], str] | None = None) -> DeviceVectorPrinter:
        return self.vectors_of(self.leaves, self.numbers, lookup)

    def vectors_of(
        self,
        leaves: dict[str, Leaf],
        numbers: PythonNumbers,
        lookup: Callable[[str], str] | None = None,
    ) -> DeviceVectorPrinter:
        """A printer for expressions over a wider symbol table (of a pass)."""

        def is_vector(expr: sp.Expr) -> bool:
            return bool(axes_of(expr, leaves))

        return DeviceVectorPrinter(
            lookup or self.names, is_vector, numbers, self.plan.positives, self.anchor
        )

    def bound(self, expr: sp.Expr) -> str:
        """An upper bound of |expr| over all pairs, from the operands' norms: [] fp64."""

        def norm(view: View) -> str:
            part = "" if view.prefix is None else f"[:, :{view.prefix}]"
            text, unit = read_as(f"{view.operand}{part}", self.copies)
            return f"{unit} * _largest_norm({text})" if unit else f"_largest_norm({text})"

        def largest(factor: sp.Expr) -> str:
            if self.numbers(factor):
                return f"abs({self.vectors().text(factor)})"
            return f"{self._method(factor)}.abs()" + ".max()" * bool(axes_of(factor, self.leaves))

        return bound_text(expr, self.leaves, norm, largest)

    def finish(self, red: Reduction, mode: Mode, suffix: str = "") -> str:
        """The statistic that follows from a reduction's accumulators: text."""
        names = self.names

        def part(which: str) -> str:
            return names(f"{which}_{red.name}") + suffix

        match red.monoid:
            case "logsumexp" if mode == "bounded":
                shift = names(shift_of(shift_owner(self.program, red)).name)
                return f"torch.log({part('sum')}) + {shift}"
            case "logsumexp":
                return f"_finish_logsumexp({part('max')}, {part('sum')})"
            case "softmean" if mode == "bounded":
                partner = names(f"sum_{softmean_partner(self.program, red)}") + suffix
                return f"_ratio({part('sum')}, {partner})"
            case "softmean":
                return f"_ratio({part('weighted')}, {part('sum')})"
            case _:
                return names(red.name) + suffix

    def inverse(self, red: Reduction) -> str:
        """The statement that gives exp(shift - logsumexp), 0 for empty ones."""
        shift = self.names(shift_of(shift_owner(self.program, red)).name)
        target = self.names(inverse_of(red.name).name)
        return f"{target} = _inverse({self.names(red.name)}, {shift})"
