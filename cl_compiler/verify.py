"""``verify=True``: the first call of a compiled loss, on a sample, against the dense reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_compiler.lang.ir import LossIR

if TYPE_CHECKING:
    from torch import Tensor

    from cl_compiler.runtime.function import CompiledLoss

__all__ = ["SAMPLE_ROWS", "Verifier"]

SAMPLE_ROWS = 64
"""Rows, and columns, that are compared with the reference (of two views: of each)."""


@dataclass(frozen=True)
class Verifier:
    """Compares a compiled loss with the dense float64 reference on some rows of a call."""

    ir: LossIR

    def __call__(self, loss_fn: CompiledLoss, values: Mapping[str, Any]) -> None:
        """Compare the values on a sample; a call without any positive is left to raise by itself.

        Raises:
            ArithmeticError: the compiled value is wrong; please report it.
        """
        import torch

        from cl_compiler.lang.reference import evaluate

        chosen = self._indices(values)
        if not all(len(index) for index in chosen.values()):
            return
        axes = {op.name: op.axes[0] for op in self.ir.operands}
        axes |= {n: leaf.axes[0] for n, leaf in self.ir.leaves.items() if leaf.kind == "input"}
        axes |= {"ids": "rows", "row_ids": "rows", "col_ids": "cols"}
        sample = {
            n: values[n].detach()[chosen[a]] if a in chosen else values[n].detach()
            for n, a in axes.items()
            if n in values
        }
        ids = {n: sample.pop(n) for n in ("ids", "row_ids", "col_ids") if n in sample}
        parameters = {n: values[n].item() for n in self.ir.parameters}
        with torch.no_grad():
            got = loss_fn(**sample, **parameters, **ids)
            got = got[0] if isinstance(got, tuple) else got
            want = evaluate(self.ir, sample, parameters, **ids)
        tolerance = 1e-9 if values["dtype"] == torch.float64 else 1e-3
        error = abs(float(got) - float(want)) / max(1.0, abs(float(want)))
        if not error <= tolerance and torch.isfinite(want):
            raise ArithmeticError(
                f"{self.ir.name}: compiled value {float(got)!r}, reference {float(want)!r} on "
                f"{SAMPLE_ROWS} rows: relative error {error:.1e} above {tolerance:.0e}. Do not use "
                "this variant; please report it with loss_fn.source."
            )

    def _indices(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Axis → indices of the sample, such that rows keep positives if they have any."""
        import torch

        if "ids" in values:
            rows = _repeated_first(values["ids"])
            return {"rows": rows}
        if self.ir.is_single_set:
            half = values["z"].shape[0] // 2
            first = torch.arange(min(SAMPLE_ROWS, half))
            return {"rows": torch.cat((first, first + half))}
        if "row_ids" in values:
            rows = torch.isin(values["row_ids"], values["col_ids"]).nonzero()[:SAMPLE_ROWS, 0]
            wanted = torch.isin(values["col_ids"], values["row_ids"][rows])
            cols = torch.argsort(~wanted, stable=True)[:SAMPLE_ROWS]
            kept = torch.isin(values["row_ids"][rows], values["col_ids"][cols])
            return {"rows": rows[kept], "cols": cols}
        names = {op.axes[0]: op.name for op in self.ir.operands}
        lengths = {axis: values[names[axis]].shape[0] for axis in ("rows", "cols") if axis in names}
        return {axis: torch.arange(min(SAMPLE_ROWS, n)) for axis, n in lengths.items()}


def _repeated_first(ids: Tensor) -> Tensor:
    """Indices of elements whose id occurs again, equal ids together; empty if all differ."""
    import torch

    _, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    alone = counts[inverse] == 1
    order = torch.argsort(inverse + alone * len(counts), stable=True)[:SAMPLE_ROWS]
    return order if not alone[order[0]] else order[:0]
