"""What a zoo entry is, and how inputs for it are drawn.

A ``Case`` is a loss with values for its parameters, an independent formula and the number of
sweeps it should cost.  ``sample`` draws unit-length embeddings, guides, slots, queues, vectors and
ids for one; ``Sample.expected`` is the formula's value in float64, with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from cl_compiler.lang import reference
from cl_compiler.lang.ir import BANK, COLS, ROWS, SLOTS, LossIR
from cl_compiler.lang.resolve import Positives

Formula = Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]
"""(tensors by name, positive mask bool [M, N], parameters by name) -> scalar."""


@dataclass(frozen=True)
class Case:
    """One loss with one kind of positives.

    ``forward`` and ``backward`` count the levels of sweeps that make similarity tiles; backward 0
    means value and gradients in one.  ``square``: the formula needs as many columns as rows.
    """

    name: str
    loss: LossIR
    parameters: Mapping[str, float]
    formula: Formula | None = None
    positives: Positives = "diagonal"
    forward: int = 1
    backward: int = 1
    square: bool = False
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of row and column inputs: uniform between these."""
    slots: int = 3
    bank: int = 6

    @property
    def can_pair(self) -> bool:
        """Whether rows and columns pair off where there are as many of them."""
        return self.positives == "diagonal" and self.loss.uses_positives

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(op.name for op in self.loss.operands)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(n for n, leaf in self.loss.leaves.items() if leaf.kind == "input")

    @property
    def needs(self) -> frozenset[str]:
        """Everything that can have a gradient."""
        operands = {op.name for op in self.loss.operands if not op.stop}
        return frozenset(operands | set(self.inputs) | set(self.loss.parameters))


def paired(case: Case) -> Case:
    """The same loss of as many rows as columns."""
    return replace(case, name=f"{case.name}_paired", positives="paired", square=True)


@dataclass(frozen=True)
class Sample:
    """Inputs for one case: float64 tensors by name, parameters, ids, and the mask they make."""

    case: Case
    tensors: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    ids: Mapping[str, Tensor]
    is_positive: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Every tensor that requires a gradient, operands, vectors and parameters by name."""
        both = {**self.tensors, **self.parameters}
        return {name: both[name] for name in sorted(self.case.needs)}

    def expected(self) -> Tensor:
        """The hand-written formula's value."""
        assert self.case.formula is not None
        return self.case.formula(self.tensors, self.is_positive, self.parameters)

    def reference(self) -> Tensor:
        """The oracle's value."""
        return reference.evaluate(self.case.loss, self.tensors, self.parameters, **self.ids)

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """Autograd of ``value``; zeros where it does not depend on a leaf."""
        leaves = self.leaves
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }


def sample(
    case: Case,
    m: int = 5,
    n: int = 7,
    d: int = 6,
    seed: int = 0,
    widths: Mapping[str, int] = MappingProxyType({}),
) -> Sample:
    """Draw inputs: ``m`` rows (made even for two views), ``n`` columns, ``d`` features.

    ``widths``: operands of other numbers of features.
    """
    generator = torch.Generator().manual_seed(seed)
    loss = case.loss
    if loss.is_single_set:
        m = n = m + m % 2
    elif case.square:
        n = m
    length = {ROWS: m, COLS: n, SLOTS: case.slots, BANK: case.bank}

    def unit(*shape: int) -> Tensor:
        raw = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(raw, dim=-1)

    tensors: dict[str, Tensor] = {}
    for op in loss.operands:
        axes = op.axes[:1] if op.axes == (ROWS, COLS) else op.axes
        tensors[op.name] = unit(*(length[a] for a in axes), widths.get(op.name, d))
        tensors[op.name].requires_grad_(not op.stop)
    for name in case.inputs:
        low, high = case.ranges.get(name, (0.5, 2.0))
        raw = torch.rand(length[loss.leaves[name].axes[0]], generator=generator).double()
        tensors[name] = (low + (high - low) * raw).requires_grad_()
    parameters = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in case.parameters.items()
    }
    ids = _ids(case, m, n, generator)
    return Sample(case, tensors, parameters, ids, reference.positive_mask(loss, m, n, **ids))


def _ids(case: Case, m: int, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Classes of one to a few members; some rows and columns have no positive."""
    if case.positives != "ids":
        return {}
    classes = max(2, (2 * m) // 3)
    if case.loss.is_single_set:
        return {"ids": torch.randint(classes, (m,), generator=generator)}
    row_ids = torch.randint(classes, (m,), generator=generator)
    col_ids = torch.randint(classes + 1, (n,), generator=generator)
    col_ids[0] = row_ids[0]
    return {"row_ids": row_ids, "col_ids": col_ids}


def held_in_e4m3(value: Tensor) -> Tensor:
    """Numbers near these that e4m3 has, times a power of two; the largest ends its range."""
    unit = 2.0 ** float(torch.log2(value.abs().max() / 448).ceil())
    value = (value / unit).to(torch.float8_e4m3fn).double()
    value.flatten()[value.abs().argmax()] = 448.0
    return value * unit


__all__ = ["Case", "Formula", "Sample", "held_in_e4m3", "paired", "sample"]
