"""What all drop-ins share: a loss that is compiled when the first tensors show what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from cl_compiler.api import compile_loss
from cl_compiler.errors import BudgetError
from cl_compiler.hardware import HardwareSpec
from cl_compiler.lang.ir import LossIR
from cl_compiler.plan import types
from cl_compiler.runtime.function import CompiledLoss

__all__ = ["DOUBLINGS", "Compiled", "MemoryBudget", "check_budget", "default_budget_bytes"]

MemoryBudget = int | str | None
"""Bytes, "64MiB", or None: ``default_budget_bytes``."""

_FLOOR_BYTES = 8 << 20
DOUBLINGS = 6
"""Of a budget that turns out to be too small, where nobody gave one."""


class Compiled:
    """A loss without a memory budget of its own.

    Args:
        loss: a name in ``cl_compiler.losses`` or a loss.
        memory_budget: as in ``compile_loss``; None: in proportion to the embeddings of each call.
        hardware: as in ``compile_loss``.

    Raises:
        ArgumentError, BudgetError: the budget cannot be read, or is less than a byte.
    """

    def __init__(
        self,
        loss: str | LossIR,
        memory_budget: MemoryBudget = None,
        hardware: str | Path | HardwareSpec = "auto",
    ) -> None:
        check_budget(memory_budget)
        self.loss, self.memory_budget, self.hardware = loss, memory_budget, hardware
        self._compiled: dict[int | str, CompiledLoss] = {}

    def __call__(self, *operands: Tensor, **arguments: Any) -> Tensor:
        """The loss of one call; arguments and errors are those of the compiled loss."""
        if self.memory_budget is not None:
            value: Tensor = self._with(self.memory_budget)(*operands, **arguments)
            return value
        matrices = [*operands, *arguments.values()]
        budget = default_budget_bytes(
            [t for t in matrices if isinstance(t, Tensor) and t.dim() > 1]
        )
        for _ in range(DOUBLINGS):
            try:
                value = self._with(budget)(*operands, **arguments)
                return value
            except BudgetError:
                budget *= 2
        value = self._with(budget)(*operands, **arguments)
        return value

    def _with(self, budget: int | str) -> CompiledLoss:
        if budget not in self._compiled:
            self._compiled[budget] = compile_loss(self.hardware, budget, loss=self.loss)
        return self._compiled[budget]


def check_budget(memory_budget: MemoryBudget) -> None:
    """Say what is wrong with a budget before the first batch does.

    Raises:
        ArgumentError, BudgetError: it cannot be read, or is less than a byte.
    """
    if memory_budget is not None:
        types.MemoryBudget.parse(memory_budget)


def default_budget_bytes(operands: list[Tensor]) -> int:
    """A quarter more than fp32 gradients of all embeddings take, and 8 MiB.

    Rounded up by at most an eighth, so that batches of nearly one size share a plan.
    """
    elements = sum(t.numel() * max(4, t.element_size()) for t in operands)
    wanted = _FLOOR_BYTES + elements + elements // 4
    step = 1 << max(0, wanted.bit_length() - 4)
    return -(-wanted // step) * step
