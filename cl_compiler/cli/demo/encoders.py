"""Two small encoders over hashed n-grams: the models that the demonstration trains.

A text or a piece of code becomes a bag of hashed features: its words (identifiers are split at
underscores and capitals), their bigrams and their character trigrams, weighted by tf-idf and scaled
to length 1.  Bags are made once, as flat tensors.  A tower sums the embeddings of a bag, adds a
small multilayer perceptron and normalises.  Hashes are CRC-32, the same in every process.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Bags", "Tower", "TwoTowers", "drop_features", "hash_bags", "words"]

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_UNIGRAM, _BIGRAM, _TRIGRAM = 0x51ED27, 0x9E3779, 0xC2B2AE  # seeds that keep the kinds apart


@dataclass(frozen=True)
class Bags:
    """Weighted feature bags of P items, flat.

    features: [F] int64, buckets; weights: [F] fp32; starts: [P + 1] int64, item p owns
    ``starts[p]:starts[p + 1]``.
    """

    features: Tensor
    weights: Tensor
    starts: Tensor

    def take(self, items: Tensor) -> Bags:
        """The bags of ``items`` ([B] int64), in that order."""
        lengths = self.starts[items + 1] - self.starts[items]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.starts[items] - starts[:-1], lengths)
        positions = torch.arange(int(starts[-1]), device=shift.device) + shift
        return Bags(self.features[positions], self.weights[positions], starts)


class Tower(nn.Module):
    """Bags of P items to [P, dim] fp32 of length 1."""

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(buckets, dim, mode="sum", include_last_offset=True)
        last = nn.Linear(2 * dim, dim)
        nn.init.zeros_(last.weight)  # a tower begins as the sum of its embeddings
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), last)

    def forward(self, bags: Bags) -> Tensor:
        summed = self.table(bags.features, bags.starts, per_sample_weights=bags.weights)
        return F.normalize(summed + self.mlp(summed), dim=1)


class TwoTowers(nn.Module):
    """A tower for descriptions, one for code, and the logit scale (as its logarithm).

    Both tables start from the same random numbers, so that a word shared by description and code
    already counts before the first step.  The numbers are small beside a learning rate, so that
    features never met in training weigh little.
    """

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        self.text = Tower(buckets, dim)
        self.code = Tower(buckets, dim)
        nn.init.normal_(self.text.table.weight, std=0.02)
        with torch.no_grad():
            self.code.table.weight.copy_(self.text.table.weight)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def logit_scale(self) -> Tensor:
        """[] fp32, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100.0)


def drop_features(bags: Bags, share: float, generator: torch.Generator) -> Bags:
    """Leave out a random ``share`` of the features: against learning pairs by heart."""
    kept = torch.rand(bags.weights.shape, generator=generator) >= share
    counts = torch.cat([bags.starts.new_zeros(1), kept.cumsum(0)])
    return Bags(bags.features[kept], bags.weights[kept], counts[bags.starts])


def hash_bags(items: Sequence[str], train: Tensor, *, max_words: int, buckets: int) -> Bags:
    """Turn ``items`` into bags; document frequencies are those of the items ``train`` alone.

    Args:
        items: P texts or pieces of code.
        train: [T] int64, which of them may be learned from.
        max_words: only the first so many words of each item count.
        buckets: number of features, a power of two.
    """
    rows, hashes = _features(items, max_words)
    keys, counts = torch.unique(rows * buckets + hashes % buckets, return_counts=True)
    rows, features = keys // buckets, keys % buckets
    is_train = torch.zeros(len(items), dtype=torch.bool)
    is_train[train] = True
    frequency = torch.bincount(features[is_train[rows]], minlength=buckets)
    weights = (1 + counts.float().log()) * torch.log((1 + len(train)) / (1 + frequency[features]))
    square = torch.zeros(len(items)).index_add_(0, rows, weights * weights)
    weights = weights / square.sqrt().clamp_min(1e-6)[rows]
    lengths = torch.bincount(rows, minlength=len(items))
    return Bags(features, weights, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))


def words(item: str, max_words: int) -> list[str]:
    """Lower-case words of ``item``: ``getHTTPResponse_code2`` is get, http, response, code, 2."""
    return [match.group().lower() for match in _WORD.finditer(item)][:max_words]


def _features(items: Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
    """(item of each feature occurrence, its hash), [n] int64 each; in no particular order."""
    vocabulary: dict[str, int] = {}
    ids: list[int] = []
    lengths = []
    for item in items:
        found = words(item, max_words)
        lengths.append(len(found))
        ids.extend(vocabulary.setdefault(word, len(vocabulary)) for word in found)
    word = torch.tensor(ids, dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(items)), torch.tensor(lengths))
    word_hash = _crc(vocabulary)[word]

    neighbours = row[1:] == row[:-1]
    pair_hash = (31 * word_hash[:-1] + 17 * word_hash[1:])[neighbours]

    # Trigrams of each word of the vocabulary once, then those of every occurrence.
    trigrams = [_trigrams(known) for known in vocabulary]
    counts = torch.tensor([len(grams) for grams in trigrams], dtype=torch.int64)
    first = counts.cumsum(0) - counts
    gram_hash = _crc(gram for grams in trigrams for gram in grams)
    many = counts[word]
    skipped = torch.repeat_interleave(many.cumsum(0) - many - first[word], many)
    gram = gram_hash[torch.arange(int(many.sum())) - skipped]

    return (
        torch.cat([row, row[1:][neighbours], torch.repeat_interleave(row, many)]),
        torch.cat([_mix(word_hash ^ _UNIGRAM), _mix(pair_hash ^ _BIGRAM), _mix(gram ^ _TRIGRAM)]),
    )


def _trigrams(word: str) -> list[str]:
    marked = f"^{word}$"
    return [marked[start : start + 3] for start in range(len(marked) - 2)]


def _crc(strings: Iterable[str]) -> Tensor:
    return torch.tensor([zlib.crc32(text.encode()) for text in strings], dtype=torch.int64)


def _mix(hashes: Tensor) -> Tensor:
    """Spread 32-bit numbers (held in int64) so that their low bits make good buckets."""
    mixed = hashes & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)
