"""lightly's ``NTXentLoss``, ``DCLLoss`` and ``DCLWLoss`` without their similarity matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.compiled import Compiled, MemoryBudget
from cl_compiler.integrations.ranks import OfRanks, gather, shards_of, world_size

__all__ = ["DCLLoss", "DCLWLoss", "NTXentLoss", "negative_mises_fisher_weights"]


class _Views:
    """A loss of two views of one set: of this rank's, or of all ranks' together."""

    def __init__(self, loss: str, memory_budget: MemoryBudget, *, gather_distributed: bool) -> None:
        self.gather_distributed = gather_distributed
        self._alone = Compiled(loss, memory_budget)
        self._ranks = OfRanks(loss, memory_budget)

    def __call__(self, views: Tensor, **arguments: Tensor | float) -> Tensor:
        """The mean over rows of ``views`` [2b, D]."""
        together = self.gather_distributed and world_size() > 1
        value: Tensor = (self._ranks if together else self._alone)(views, **arguments)
        return value


class NTXentLoss(nn.Module):
    """NT-Xent, or with a memory bank MoCo's loss.

    Args:
        temperature: similarities are divided by it.
        memory_bank_size: (number, dim) of a queue of old ``out1``; 0: the batch gives negatives.
        gather_distributed: negatives of all ranks; the value is then the whole batch's on each.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.

    Raises:
        ArgumentError: a temperature of 0, or a memory bank without dim.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__()
        if abs(temperature) < 1e-8:
            raise ArgumentError(f"temperature={temperature}: similarities are divided by it.")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = _bank(memory_bank_size, gather_distributed=gather_distributed)
        self._views = _Views("nt_xent", memory_budget, gather_distributed=gather_distributed)
        self._bank = Compiled("moco", memory_budget)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean over rows.

        Args:
            out0: [b, D], the first view of each sample; normalised here.
            out1: [b, D], the second; it joins the memory bank where out0 trains.

        Raises:
            ArgumentError: views of different shapes.
        """
        scale = 1 / self.temperature
        out0, out1 = _normalized(out0, out1)
        if self.memory_bank is None:
            return self._views(torch.cat([out0, out1]), logit_scale=scale)
        negatives = self.memory_bank(out1, update=out0.requires_grad).to(out0)
        return self._bank(out0, out1, queue=negatives, logit_scale=scale)


def _normalized(out0: Tensor, out1: Tensor) -> tuple[Tensor, Tensor]:
    """Both views [b, D], rows of unit length."""
    if out0.shape != out1.shape:
        raise ArgumentError(
            f"out0 has shape {list(out0.shape)} and out1 {list(out1.shape)}: they are two views of "
            "the same samples, row by row."
        )
    return normalize(out0, dim=1), normalize(out1, dim=1)


def _bank(size: int | Sequence[int], *, gather_distributed: bool) -> MemoryBank | None:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if sizes[0] == 0:
        return None
    if len(sizes) != 2 or min(sizes) < 1:
        raise ArgumentError(
            f"memory_bank_size={size!r}: give (number of negatives, dim), or 0 for none."
        )
    return MemoryBank(*sizes, gather_distributed=gather_distributed)


class MemoryBank(nn.Module):
    """A ring of embeddings, not saved: ``bank`` [number, dim] and ``bank_ptr`` [1] as lightly's."""

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, number: int, dim: int, *, gather_distributed: bool) -> None:
        super().__init__()
        self.gather_distributed = gather_distributed
        self.register_buffer("bank", normalize(torch.randn(number, dim), dim=-1), persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def forward(self, batch: Tensor, *, update: bool) -> Tensor:
        """What is stored; with ``update`` the batch takes the place of the oldest afterwards."""
        stored = self.bank.clone()
        if update:
            if self.gather_distributed and world_size() > 1:
                batch = gather(batch, shards_of(batch))
            start = int(self.bank_ptr)
            stop = min(start + batch.shape[0], self.bank.shape[0])
            self.bank[start:stop] = batch[: stop - start].to(self.bank)
            self.bank_ptr[0] = 0 if stop == self.bank.shape[0] else stop
        return stored


class DCLLoss(nn.Module):
    """Decoupled contrastive learning: the positive is not in the denominator.

    Args:
        temperature: similarities are divided by it.
        weight_fn: (out0, out1), normalised → weights [b] of the positives; None: 1.
        gather_distributed: negatives of all ranks; the value is then the whole batch's on each.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        name = "dcl_views" if weight_fn is None else "dcl_views_weighted"
        self._views = _Views(name, memory_budget, gather_distributed=gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The mean over rows and views.

        Args:
            out0: [b, D], the first view of each sample; normalised here.
            out1: [b, D], the second.

        Raises:
            ArgumentError: views of different shapes.
        """
        a, b = _normalized(out0, out1)
        given = {}
        if self.weight_fn is not None:
            given["weight"] = torch.cat([self.weight_fn(a, b), self.weight_fn(b, a)])
        return self._views(torch.cat([a, b]), logit_scale=1 / self.temperature, **given)


class DCLWLoss(DCLLoss):
    """The same with negative von Mises-Fisher weights.

    Args:
        temperature: similarities are divided by it.
        sigma: the temperature of the weights.
        gather_distributed: negatives of all ranks; the weights' softmax is over this rank's
            samples, as lightly's.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sigma: float = 0.5,
        gather_distributed: bool = False,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        weights = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weights, gather_distributed, memory_budget=memory_budget)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """[b], 2 less b times a softmax of the positives' similarities; no gradient."""
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * torch.softmax(similarity, dim=0)
