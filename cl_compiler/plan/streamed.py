"""Simulated ranks whose shards are in host memory: copies, messages and products at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cl_compiler.plan.clock import Clock, Vector
from cl_compiler.plan.work import Work


def streamed(
    clock: Clock,
    work: Work,
    row_bytes: tuple[float, float],
    rows: int,
    parts: Sequence[int],
    shares: Vector | None,
    s_per_byte: float,
) -> None:
    """Shards in host memory: for each block that stays, all of them go around the ranks once.

    A rank's next chunk is copied while others' are computed; products wait for a block, and for
    what is made of it to be gone.  ``shares``: every rank makes as many rounds as the longest.
    """
    link = work.host
    assert link is not None
    rounds, mine = work.rounds, 1.0 if shares is None else shares
    longest = 1.0 if shares is None else float(shares.max())
    per_round = [(work.seconds * n / rows, row_bytes[0] * n, row_bytes[1] * n) for n in parts]
    streamed_s = link.streamed / rounds * s_per_byte * mine
    copied = clock.copy(streamed_s * parts[0] / rows)
    for turn in range(rounds):
        # of what a rank has, what is in this block
        part = np.maximum(mine / longest * rounds - turn, 0.0)
        block = np.minimum(part, 1.0) * longest / rounds
        clock.wait(clock.copy(link.stays * s_per_byte * block))
        for index, (seconds, sent, back) in enumerate(per_round):
            clock.wait(copied)
            following = parts[(index + 1) % len(parts)]
            last = turn + 1 == rounds and index + 1 == len(parts)
            fetch = None if last else streamed_s * following / rows
            copied = _one_chunk(clock, (seconds, sent, back), block, shares, fetch)
        if link.returned:
            clock.wait(clock.copy(link.returned * s_per_byte * block))


def _one_chunk(
    clock: Clock,
    chunk: tuple[float, float, float],
    block: Vector | float,
    shares: Vector | None,
    fetch_s: Vector | float | None,
) -> Vector:
    """A chunk goes around; the next is copied as soon as the own one was sent: when it is here."""
    (seconds, sent, back), links = chunk, clock.links
    before = np.empty(links.ranks, dtype=int)
    before[links.next_ranks] = np.arange(links.ranks)
    here, copied, arriving = np.arange(links.ranks), clock.now, None
    for step in range(links.circle):
        if step == min(1, links.circle - 1) and fetch_s is not None:
            copied = clock.copy(fetch_s)
        size: Vector | float = 1.0 if shares is None else shares[here]
        posted = clock.exchange(sent * size) if step + 1 < links.circle else None
        clock.compute(seconds * block * size)
        if back and step:
            clock.join(arriving, back * size)
            arriving = clock.exchange(back * size, clock.home)
        if posted is not None:
            clock.wait(posted)
        here = here[before]
    clock.join(arriving, back * (1.0 if shares is None else shares))
    return copied


__all__ = ["streamed"]
