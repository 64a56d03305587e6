"""Real training data without a download: functions of installed packages, and what they do.

The pairs of ``cl-compiler demo``: the first paragraph of a docstring, and the body of its function.
Words are hashed, so that there is no vocabulary to fit.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from cl_compiler.cache.store import cache_root
from cl_compiler.cli.demo.collection import collect
from cl_compiler.cli.demo.encoders import words
from cl_compiler.cli.demo.harvest import Pair, split
from cl_compiler.cli.demo.metrics import rank_of_own, retrieval
from cl_compiler.cli.demo.sources import installed_roots

BUCKETS = 1 << 14


def real_pairs(most: int | None = None) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(training pairs, test pairs); no module is in both.

    Args:
        most: files of each package that are read; None: all, which is kept for the next time.
    """
    found = collect(installed_roots(), cache_root() / "demo", max_files=most)
    sides = split(found.pairs)
    return sides.train, sides.test


@lru_cache(maxsize=1 << 16)
def _number(word: str) -> int:
    return 1 + zlib.crc32(word.encode()) % (BUCKETS - 1)


def tokens(texts: Sequence[str], longest: int) -> dict[str, Tensor]:
    """Hashed words, [texts, longest], 0 where a text has ended, and a mask of what is there."""
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        numbers = [_number(word) for word in words(text, longest)] or [1]
        ids[row, : len(numbers)] = torch.tensor(numbers)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def recall_at_10(queries: Tensor, keys: Tensor) -> float:
    """Share of descriptions whose code is among the ten nearest."""
    return retrieval(rank_of_own(queries, keys)).recall_at_10
