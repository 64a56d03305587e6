"""Drop-ins over the ranks of the default group: each has a shard, and shards travel around a ring.

No rank holds the others' embeddings at once, and shards may differ in length.  ``gather`` is the
collective form, O(B·D) bytes per rank: for gradients that are a peer's and not the batch's, and for
memory banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_compiler.api import compile_loss
from cl_compiler.errors import BudgetError
from cl_compiler.integrations.compiled import (
    DOUBLINGS,
    MemoryBudget,
    check_budget,
    default_budget_bytes,
)
from cl_compiler.lang.ir import LossIR

__all__ = ["OfRanks", "Shards", "gather", "shards_of", "with_value", "world_size"]


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    initialised = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if initialised else 1


class OfRanks:
    """A loss of all ranks' shards, without a memory budget of its own; all ranks call it together.

    The value is that of all shards on every rank.  Gradients are such that their mean over ranks,
    which DistributedDataParallel takes, is the whole batch's.

    Args:
        loss: a name in ``cl_compiler.losses`` or a loss.
        memory_budget: as in ``compile_loss``; None: in proportion to the largest shard.
    """

    def __init__(self, loss: str | LossIR, memory_budget: MemoryBudget = None) -> None:
        check_budget(memory_budget)
        self.loss, self.memory_budget = loss, memory_budget
        self._budget: int | str = 0
        self._compiled: Any = None

    def __call__(self, *operands: Tensor, **arguments: Any) -> Any:
        """The loss of one call with this rank's shards; errors are those of the compiled loss."""
        if self.memory_budget is not None:
            return self._with(self.memory_budget)(*operands, **arguments)
        budget = self._largest_default([*operands, *arguments.values()])
        if isinstance(self._budget, int):
            budget = max(budget, self._budget)  # a smaller batch needs no other plan
        for _ in range(DOUBLINGS):
            try:
                return self._with(budget)(*operands, **arguments)
            except BudgetError:  # on all ranks alike
                budget *= 2
        return self._with(budget)(*operands, **arguments)

    def _largest_default(self, given: list[Any]) -> int:
        matrices = [t for t in given if isinstance(t, Tensor) and t.dim() > 1]
        wanted = torch.tensor(default_budget_bytes(matrices), device=matrices[0].device)
        dist.all_reduce(wanted, dist.ReduceOp.MAX)
        return int(wanted)

    def _with(self, budget: int | str) -> Any:
        group = dist.group.WORLD
        if self._compiled is None or budget != self._budget or group is not self._compiled[0]:
            self._compiled = group, compile_loss("auto", budget, loss=self.loss, group=group)
            self._budget = budget
        return self._compiled[1]

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_compiled": None,
        }  # a process group can be neither copied nor saved


def with_value(loss: Tensor, value: Tensor) -> Tensor:
    """``loss``'s gradients under another value: this rank's, where a peer returns that."""
    return loss + (value.to(loss) - loss).detach()


@dataclass(frozen=True)
class Shards:
    """How many rows each rank has, and which rank this is."""

    rows: tuple[int, ...]
    rank: int

    @property
    def start(self) -> int:
        """Where this rank's rows begin among all."""
        return sum(self.rows[: self.rank])

    @property
    def total(self) -> int:
        return sum(self.rows)


def shards_of(tensor: Tensor) -> Shards:
    """The lengths of all ranks' shards of one batch; one small collective."""
    mine = torch.tensor([tensor.shape[0]], device=tensor.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return Shards(tuple(int(n) for n in torch.cat(found).tolist()), dist.get_rank())


def gather(tensor: Tensor, shards: Shards) -> Tensor:
    """[total, …]: all ranks' rows in their order; gradients of all ranks are summed."""
    gathered: Tensor = _Gather.apply(tensor, shards)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        longest = max(shards.rows)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        found = [torch.empty_like(padded) for _ in shards.rows]
        dist.all_gather(found, padded)
        return torch.cat([part[:n] for part, n in zip(found, shards.rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        shards = ctx.shards
        return total[shards.start : shards.start + shards.rows[shards.rank]], None
