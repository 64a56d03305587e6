"""Embeddings of all ranks on every rank, with their gradients, for drop-ins that gather.

The collective form: O(B·D) bytes per rank and no similarity matrix.  Shards may differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Shards", "gather", "shards_of", "world_size"]


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    initialised = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if initialised else 1


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
