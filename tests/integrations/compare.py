"""A drop-in and what it stands in for, on the same inputs: value and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-10
"""Relative to the largest element; both sides add the same float64 terms in another order."""


def unit(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Rows of length ``scale``, that train."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (scale * nn.functional.normalize(raw, dim=-1)).requires_grad_()


def assert_same(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: Sequence[Tensor]
) -> None:
    """Equal values, and equal gradients of the leaves after a backward of 1.7 of it."""
    found = []
    for loss in (ours, theirs):
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        (1.7 * value).backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    if len(leaves[0]) > 1:  # a softmax over one column has no gradient
        assert any(g is not None and g.abs().max() > 0 for g in found[1][1:])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            size = max(1.0, other.abs().max().item())
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * size)


class WordBag(nn.Module):
    """Token numbers and their mask → one embedding per text: the least that encodes text."""

    def __init__(self, dim: int, words: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(words, dim, dtype=torch.float64)
        self.layer = nn.Linear(dim, dim, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"][..., None]
        total = (self.dropout(self.table(features["input_ids"])) * mask).sum(1)
        features["sentence_embedding"] = self.layer(torch.tanh(total))
        return features


class TextModel(nn.Sequential):
    """As much of a SentenceTransformer as its losses look at."""

    tokenizer: Any = None
    max_seq_length = 16

    def __init__(self, seed: int, dim: int = 6, words: int = 50, dropout: float = 0.0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            super().__init__(WordBag(dim, words, dropout))


def texts(rows: int, seed: int, words: int = 50, longest: int = 9) -> dict[str, Tensor]:
    """Token numbers [rows, longest], padded at the end, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, words, (rows, longest), generator=generator)
    lengths = torch.randint(1, longest, (rows,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}
