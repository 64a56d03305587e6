"""Simulated shards that travel along a part of the ring: both ways at once, or half of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.ring import BOTH_WAYS, HALF_RING
from cl_compiler.plan.clock import SHARD, Clock, Links, Vector, links_of
from cl_compiler.plan.wires import Message, Wires
from cl_compiler.plan.work import Work


@dataclass(frozen=True)
class Line:
    """Ranks that a shard passes in one direction: hops along it, and those back home.

    ``way``: 1 to the next rank, -1 to the one before; ``steps``: ranks that a shard meets.
    """

    links: Links
    home: Links
    way: int
    steps: int


def lines_of(spec: HardwareSpec, schedule: str, ranks: int) -> tuple[Line, ...]:
    """Along which a schedule's shards travel; none where they go all around."""
    return tuple(
        Line(links_of(spec, ranks, way), links_of(spec, ranks, -way * steps), way, steps)
        for way, steps in ways_of(schedule, ranks)
    )


def ways_of(schedule: str, ranks: int) -> tuple[tuple[int, int], ...]:
    """(way, steps) of each line; none where shards go all around."""
    ways = ((1, ranks // 2), (-1, (ranks - 1) // 2))
    return {HALF_RING: ways[:1], BOTH_WAYS: ways}.get(schedule, ())


def along(
    clock: Clock,
    lines: Sequence[Line],
    work: Work,
    row_bytes: tuple[float, float],
    rows: int,
    parts: Sequence[int],
    shares: Vector | None,
    half: bool,
    held: float,
) -> None:
    """Chunks travel along lines, and what is accumulated with them goes home from there.

    ``row_bytes``: sent of a row, and sent back; ``half``: two shards meet once, and ``held`` of a
    chunk of its own a rank computes last.
    """
    ranks = clock.links.ranks
    every, share = np.arange(ranks), np.ones(ranks) if shares is None else shares
    wires = Wires(clock, [hops for x in lines if x.steps for hops in (x.links, x.home)])
    arriving: list[Message | None] = [None] * len(lines)

    def join(message: Message | None, new_bytes: Vector) -> None:
        clock.join(None if message is None else wires.end(message), new_bytes)

    own = (0.5 + work.diagonal / 2) / len(parts)
    start, (sent_of_row, back_of_row) = 0, row_bytes
    first_bytes = sent_of_row * parts[0] * share
    posted = [wires.exchange(first_bytes, SHARD, x.links) if x.steps else None for x in lines]
    for count, following in zip(parts, [*parts[1:], 0], strict=True):
        part, sent, back = count / rows, sent_of_row * count, back_of_row * count
        # of the square of a shard, what these columns have on one side of the diagonal
        beside, diagonal = part * (2 * start + count) / (2 * rows), part * work.diagonal / 2
        area = beside + diagonal if half else part
        if half and not work.travel.again:
            area = own if start else own * (1.0 - held)
        clock.compute(work.seconds * area * share * share)
        for step in range(1, ranks // 2 + 1):
            met: Vector | float = part
            if half and 2 * step == ranks:
                first = every < ranks // 2
                met = np.where(first, beside + diagonal, max(beside - diagonal, 0.0))
            for k, line in enumerate(lines):
                if step > line.steps:
                    continue
                size = share[(every - line.way * step) % ranks]
                come, posted[k] = posted[k], None
                if come is not None:
                    clock.wait(wires.end(come))
                if step < line.steps:
                    posted[k] = wires.exchange(sent * size, SHARD, line.links)
                elif following:
                    posted[k] = wires.exchange(sent_of_row * following * share, SHARD, line.links)
                clock.compute(back * size * clock.start_s_per_byte if back else 0.0)
                clock.compute(work.seconds * met * share * size)
                if back:
                    join(arriving[k], back * (size if step > 1 else share))
                    links = line.links if step < line.steps else line.home
                    arriving[k] = wires.exchange(back * size, clock.home, links)
        start += count
    if half and held:
        clock.compute(work.seconds * own * held * share * share)
    for waited in arriving:
        join(waited, row_bytes[1] * parts[-1] * share)


__all__ = ["Line", "along", "lines_of", "ways_of"]
