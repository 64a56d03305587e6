"""pytorch-metric-learning's ``NTXentLoss`` and ``SupConLoss`` in O(B·D) instead of O(B³) or O(B²).

With cosine similarity, labels, and optionally reference embeddings; miners, other distances,
reducers and regularisers are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.compiled import Compiled, MemoryBudget

__all__ = ["NTXentLoss", "SupConLoss"]


class _ByLabel(nn.Module):
    """Labels make positives; one loss for one set, another for a set and its references."""

    def __init__(
        self,
        temperature: float,
        one_set: str,
        two_sets: str,
        memory_budget: MemoryBudget,
        others: dict[str, Any],
    ) -> None:
        super().__init__()
        refused = [name for name, value in others.items() if value is not None]
        if refused:
            raise ArgumentError(
                f"{type(self).__name__}({', '.join(refused)}=…): only the defaults are compiled, "
                "cosine similarity and a mean. For another loss over pairs write it in the loss "
                "language, or use pytorch-metric-learning's."
            )
        self.temperature = temperature
        self._one_set = Compiled(one_set, memory_budget)
        self._two_sets = Compiled(two_sets, memory_budget)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss; 0 where the labels make no positive or no negative pair.

        Args:
            embeddings: [B, D], normalised here.
            labels: integers [B].
            indices_tuple: refused: pairs from a miner are no function of two labels.
            ref_emb: [R, D]; embeddings are compared with these instead of with each other.
            ref_labels: integers [R].

        Raises:
            ArgumentError: no labels, or not one of each row, pairs from a miner, or references
                without labels.
        """
        if indices_tuple is not None or labels is None:
            raise ArgumentError(
                f"{type(self).__name__} needs labels and no indices_tuple: which pairs are "
                "positive has to follow from labels. Use pytorch-metric-learning's with a miner."
            )
        if (ref_emb is None) != (ref_labels is None):
            raise ArgumentError("give both ref_emb and ref_labels, or neither.")
        labels = _of_rows("labels", labels, embeddings)
        scale, x = 1 / self.temperature, normalize(embeddings, dim=1)
        if ref_emb is None or ref_labels is None:
            _, counts = torch.unique(labels, return_counts=True)
            if len(counts) < 2 or int(counts.max()) < 2:
                return 0 * embeddings.sum()
            return self._one_set(x, ids=labels, logit_scale=scale)
        ref_labels = _of_rows("ref_labels", ref_labels, ref_emb)
        several = torch.unique(torch.cat([labels, ref_labels])).numel() > 1
        if not several or not bool(torch.isin(labels, ref_labels).any()):
            return 0 * embeddings.sum()
        y = normalize(ref_emb, dim=1)
        return self._two_sets(x, y, row_ids=labels, col_ids=ref_labels, logit_scale=scale)


def _of_rows(name: str, labels: Any, rows: Tensor) -> Tensor:
    """One label of each row, beside it."""
    found = torch.as_tensor(labels, device=rows.device)
    if found.shape != rows.shape[:1]:
        raise ArgumentError(
            f"{name} has shape {list(found.shape)} for {rows.shape[0]} embeddings: give one each."
        )
    return found


class NTXentLoss(_ByLabel):
    """One term per positive pair, each against the negatives of its anchor.

    Args:
        temperature: similarities are divided by it.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
        **others: distance, reducer, regularisers and so on, None or left out.
    """

    def __init__(
        self, temperature: float = 0.07, *, memory_budget: MemoryBudget = None, **others: Any
    ) -> None:
        super().__init__(temperature, "nt_xent_pairs", "infonce_pairs", memory_budget, others)


class SupConLoss(_ByLabel):
    """The mean log-probability over an anchor's positives, averaged over anchors that have one.

    Args:
        temperature: similarities are divided by it.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
        **others: distance, reducer, regularisers and so on, None or left out.
    """

    def __init__(
        self, temperature: float = 0.1, *, memory_budget: MemoryBudget = None, **others: Any
    ) -> None:
        super().__init__(temperature, "supcon", "infonce", memory_budget, others)
