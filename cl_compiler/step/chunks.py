"""How large a chunk of one encoder may be, in samples or in tokens, and which size is fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from cl_compiler.errors import ArgumentError
from cl_compiler.step.inputs import Tokens, lengths_of, ranges_of
from cl_compiler.step.out_of_memory import blame, blamed_encoder
from cl_compiler.step.probe import ChunkCost, probe_chunk
from cl_compiler.step.towers import Job

__all__ = ["Sizes", "fastest_that_fits", "units_of"]

_PROBES = 8
"""Chunks that are measured per encoder in search of the largest that fits, at most."""
_FULL = 0.92
"""A chunk that takes this share of what it may take is not made larger."""
_TIMED = (1, 2, 4, 8)
"""Fractions of the largest chunk whose speed is compared."""

_ROUNDS = 2
_SECONDS = ("forward_s", "training_s")
_NEARLY = 1.05
"""The largest chunk of those that take at most so many times as long as the fastest is taken: fewer
chunks have less around them, which is not measured."""

Share = Callable[[ChunkCost], float]


def units_of(chunk_sizes: Any, count: int) -> list[Tokens | None] | None:
    """What each encoder's chunks are to be planned in, None for samples; None where none is "auto".

    Raises:
        ArgumentError: some are "auto" and others are not.
    """
    given = list(chunk_sizes) if isinstance(chunk_sizes, list | tuple) else [chunk_sizes] * count
    auto = [
        size == "auto" or (isinstance(size, Tokens) and size.per_chunk == "auto") for size in given
    ]
    if not any(auto):
        return None
    if not all(auto) or len(given) != count:
        raise ArgumentError(
            f'chunk_sizes={chunk_sizes!r} for {count} encoders: plan all of them, each "auto" or '
            'Tokens("auto"), or none.'
        )
    return [size if isinstance(size, Tokens) else None for size in given]


@dataclass(frozen=True)
class Sizes:
    """The chunk sizes that one encoder could have, and what was measured of them.

    job: the encoder, with an input that is there to be cut; tokens: what sizes are counted in;
    known: what a chunk of each size costs; timed: sizes whose seconds are the better of two.
    """

    job: Job
    tokens: Tokens | None = None
    known: dict[int, ChunkCost] = field(default_factory=dict)
    timed: set[int] = field(default_factory=set)

    @cached_property
    def lengths(self) -> list[int]:
        """Of each sample: 1, or its tokens."""
        if self.tokens is None:
            return [1] * self.job.samples
        return lengths_of(self.job.value, self.tokens, f"the input of {self.job.tower.what}")

    @property
    def least(self) -> int:
        """Of the smallest chunk: two samples, which BatchNorm needs; or the longest sample."""
        return min(2, self.job.samples) if self.tokens is None else max(1, max(self.lengths))

    @property
    def most(self) -> int:
        """With which the whole input is one chunk."""
        return max(self.least, self._work(0, self.job.samples))

    def _work(self, start: int, stop: int) -> int:
        if self.tokens is not None and self.tokens.padded:
            return (stop - start) * max(self.lengths[start:stop])
        return sum(self.lengths[start:stop])

    def _ranges(self, size: int) -> tuple[tuple[int, int], ...]:
        assert self.tokens is not None
        return ranges_of(self.lengths, replace(self.tokens, per_chunk=size))

    def work(self, size: int) -> int:
        """Samples, or tokens with their padding, of the whole input in chunks of a size."""
        if self.tokens is None:
            return self.job.samples
        return sum(self._work(start, stop) for start, stop in self._ranges(size))

    def measure(self, size: int, *, repeats: int = 1, limit_bytes: float = math.inf) -> ChunkCost:
        """What the costliest chunk of a size takes; with tokens, the costliest of several kinds."""
        if self.tokens is None:
            ranges = [(0, size)]
        else:
            every = self._ranges(size)
            costly: Sequence[Callable[[tuple[int, int]], int]] = (
                lambda r: self._work(*r),
                lambda r: max(self.lengths[r[0] : r[1]]),
                lambda r: r[1] - r[0],
            )
            ranges = list(dict.fromkeys(max(every, key=key) for key in costly))
        costs = [
            probe_chunk(self.job, start, stop, repeats=repeats, limit_bytes=limit_bytes)
            for start, stop in ranges
        ]
        cost = replace(
            costs[0],
            size=size,
            work=self._work(*ranges[0]),
            samples=max(c.samples for c in costs),
            forward_bytes=max(c.forward_bytes for c in costs),
            training_bytes=max(c.training_bytes for c in costs),
            first_bytes=max(c.first_bytes for c in costs),
        )
        self.known[size] = cost
        return cost

    def without_a_single(self, size: int, total: int) -> int:
        """A size at most so large that leaves no last chunk of one sample: BatchNorm fails."""
        while self.tokens is None and size > 2 and total % size == 1:
            size -= 1
        return size


def fastest_that_fits(
    sizes: Sizes, total: int, share: Share, limit_bytes: int
) -> tuple[ChunkCost, int]:
    """The fastest chunk among the largest that fits and fractions of it, and the largest.

    Args:
        sizes: of one encoder; its smallest fits, and what is measured stays in it.
        total: samples of the batches to come.
        share: of the budget that a chunk takes; at most 1 fits.
        limit_bytes: the budget.
    """
    largest = _search(sizes, share, limit_bytes)
    parts = [max(sizes.least, largest // part) for part in _TIMED]
    new = {sizes.without_a_single(size, total) for size in parts} - sizes.timed
    for _ in range(_ROUNDS):  # in turns: a machine that is busy for a while slows all of them
        for size in sorted(new):
            before = sizes.known.get(size)
            cost = sizes.measure(size, limit_bytes=limit_bytes)
            if before is not None:
                quicker = {n: min(getattr(before, n), getattr(cost, n)) for n in _SECONDS}
                sizes.known[size] = replace(cost, **quicker)
    sizes.timed.update(new)
    timed = [sizes.known[size] for size in sorted(sizes.timed)]
    fits = [
        cost
        for cost in timed
        if share(cost) <= 1 and cost.size == sizes.without_a_single(cost.size, total)
    ] or [sizes.known[largest]]

    def seconds(cost: ChunkCost) -> float:
        return (cost.forward_s + cost.training_s) * sizes.work(cost.size) / cost.work

    enough = _NEARLY * min(map(seconds, fits))
    chosen = max((cost for cost in fits if seconds(cost) <= enough), key=lambda cost: cost.size)
    return chosen, max(cost.size for cost in fits)


def _search(sizes: Sizes, share: Share, limit_bytes: int) -> int:
    """The largest size that fits, of those measured; none is known to exceed the budget before.

    A peak is the largest of several that grow linearly from something that is not negative: n times
    the samples take at most n times the bytes, and chunks for which that fits may be measured.
    """
    known, missed = sizes.known, False
    low = max(size for size, cost in known.items() if share(cost) <= 1)
    high = min((s for s, cost in known.items() if share(cost) > 1), default=sizes.most + 1)
    for _ in range(_PROBES):
        if low == sizes.most or share(known[low]) > _FULL:
            break
        size = _furthest(known[low], low, high - 1, share)
        if missed:  # bytes grow faster, or are not all of them seen: halves instead
            size = min(size, (low + high) // 2)
        if size <= low:  # nothing larger is sure to fit
            break
        try:
            with blame(sizes.job.tower.number):
                cost = sizes.measure(size, limit_bytes=limit_bytes)
        except (RuntimeError, MemoryError) as error:
            if blamed_encoder(error) is None:
                raise
            high, missed = size, True
            continue
        if share(cost) > 1:
            high, missed = size, True
        else:
            low = size
    return low


def _furthest(cost: ChunkCost, low: int, high: int, share: Share) -> int:
    """The largest size up to ``high`` that fits if bytes grow no faster than sizes."""

    def fits(size: int) -> bool:
        factor = size / cost.size
        larger = replace(
            cost,
            size=size,
            samples=math.ceil(factor * cost.samples),
            forward_bytes=math.ceil(factor * cost.forward_bytes),
            training_bytes=math.ceil(factor * cost.training_bytes),
            first_bytes=math.ceil(factor * cost.first_bytes),
        )
        return share(larger) <= 1

    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
