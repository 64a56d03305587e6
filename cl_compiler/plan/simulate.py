"""A discrete-event run of a cluster plan, on the clock of its ranks (``clock``).

A rank waits for a shard, posts the next and computes this one; rows of its own, which need no
message, it computes where it would wait for the first one and for the last, as emitted files do
(``templates/ring/travel.py.jinja``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import HALF_RING, HOST, TRAVEL
from cl_compiler.plan.clock import (
    GRADIENT,
    STATISTICS,
    Clock,
    Event,
    Links,
    Vector,
    links_of,
    links_of_levels,
)
from cl_compiler.plan.host import link_rate
from cl_compiler.plan.lines import Line, along, lines_of
from cl_compiler.plan.streamed import streamed
from cl_compiler.plan.types import Plan
from cl_compiler.plan.work import Work, work_of

COMPUTING = "computing"
"""What a rank does that neither waits nor sends: products, passes, launches."""


@dataclass(frozen=True)
class Run:
    """What came out.

    ``seconds``: until the last rank is done; ``compute_s``, ``waiting_s``: of the slowest rank;
    ``forward_s``: when the last rank begins its backward.  ``events``: of the first ranks.
    """

    seconds: float
    forward_s: float
    compute_s: float
    waiting_s: float
    events: tuple[Event, ...] = ()

    @property
    def bound_by(self) -> str:
        """What the slowest rank spends most of its time on."""
        return COMPUTING if self.compute_s >= self.waiting_s else "the exchange"


def simulate(
    plan: Plan,
    program: Program,
    spec: HardwareSpec,
    *,
    speeds: Sequence[float] = (),
    shards: Sequence[int] = (),
    drawn_ranks: int = 0,
) -> Run:
    """Run a plan for a group of ranks, forward and backward.

    Args:
        plan: of one rank, with its ``cluster``; every rank has a shard of ``plan.problem``.
        program: what it runs.
        spec: the cluster, with as many devices as the group has ranks.
        speeds: of each rank, where they differ: 0.5 takes twice as long.
        shards: rows of each rank, where they differ; columns are in proportion.
        drawn_ranks: whose events are kept.
    """
    cluster = plan.cluster
    assert cluster is not None
    ranks = cluster.group_size
    bandwidth = spec.device_level.bandwidth_bytes_per_s
    pass_s = 1.0 / bandwidth if bandwidth else 0.0
    links = links_of(spec, ranks)
    clock = Clock(links, np.asarray(speeds or [1.0] * ranks), drawn_ranks, pass_s, 3 * pass_s)
    levels = links_of_levels(spec, ranks) if cluster.schedule == "two_level" else ()
    return run(
        clock,
        cluster.schedule,
        work_of(plan, program),
        max(plan.problem.M, plan.problem.N),
        cluster.chunk,
        plan.problem.input_bytes,
        plan.problem.compute_bytes,
        levels,
        None if not shards else np.asarray(shards) / max(plan.problem.M, 1),
        lines_of(spec, cluster.schedule, ranks),
        1.0 / link_rate(spec) if cluster.schedule == HOST else 0.0,
    )


def run(
    clock: Clock,
    schedule: str,
    work: Sequence[Work],
    rows: int,
    chunk: int,
    input_bytes: int,
    compute_bytes: int,
    levels: Sequence[Links] = (),
    shares: Vector | None = None,
    lines: Sequence[Line] = (),
    host_s_per_byte: float = 0.0,
) -> Run:
    """Run passes on a clock; shards of ``rows`` rows travel ``chunk`` rows at a time.

    ``levels``: the circles of a ring of rings, from the outermost to the innermost; ``lines``: of
    shards that do not go all around (``lines_of``).  ``shares``: of ``rows``, what each rank has;
    left out, all of them.  ``host_s_per_byte``: over the host link, of shards in host memory.
    """
    forward_s = 0.0
    phase = "forward"
    for item in work:
        if item.travel.phase != phase:
            phase, forward_s = item.travel.phase, float(clock.now.max())
        _numbers(clock)
        clock.home = GRADIENT if item.travel.gradient_width else STATISTICS
        if not item.travel.operand_width and not item.travel.vectors:
            mine = 1.0 if shares is None else shares
            if item.host is not None:
                clock.wait(clock.copy(item.host.total * host_s_per_byte * mine))
            clock.compute(item.seconds * mine)
            continue
        per_row = item.travel.operand_width * input_bytes + item.travel.vectors * compute_bytes
        back = (item.travel.gradient_width + item.travel.folds) * compute_bytes
        parts = [min(chunk, rows - start) for start in range(0, rows, chunk)]
        if schedule == "all_gather":
            _gathered(clock, item.seconds / rows, per_row, back, parts, shares)
            continue
        if host_s_per_byte:
            streamed(clock, item, (per_row, back), rows, parts, shares, host_s_per_byte)
            continue
        if lines:
            held = item.travel.held_back(input_bytes, compute_bytes)
            half = schedule == HALF_RING
            along(clock, lines, item, (per_row, back), rows, parts, shares, half, held)
            continue
        _around(
            clock,
            levels or (clock.links,),
            [(item.seconds * n / rows, per_row * n, back * n) for n in parts],
            np.arange(clock.links.ranks),
            shares,
            item.travel.held_back(input_bytes, compute_bytes) if schedule == TRAVEL else 0.0,
        )
    _numbers(clock)
    slowest = int(clock.now.argmax())
    return Run(
        float(clock.now.max()),
        forward_s or float(clock.now.max()),
        float(clock.compute_s[slowest]),
        float(clock.waiting_s[slowest]),
        tuple(clock.events),
    )


def _around(
    clock: Clock,
    levels: Sequence[Links],
    parts: Sequence[tuple[float, float, float]],
    owner: Vector,
    shares: Vector | None,
    held: float = 0.0,
) -> None:
    """Chunks, each (seconds of products, bytes sent, bytes back), go around a circle of ranks.

    ``owner``: of what each rank has at first; ``shares``: of a whole shard, what each rank's is.
    The next chunk sets out while the last of this one is computed.  What comes back of one chunk is
    joined after the first of the next one, that of the last chunk while a rank computes what it
    ``held`` back of its own: so much of a chunk.
    """
    links, *inner = levels
    arriving: Vector | None = None
    posted: Vector | None = None
    owed: Vector | float = 0.0
    before = np.empty_like(owner)
    before[links.next_ranks] = np.arange(links.ranks)
    own_s = sum(seconds for seconds, *_ in parts) / len(parts)

    def size(of: Vector) -> Vector | float:
        return 1.0 if shares is None else shares[of]

    if links.circle > 1:
        posted = clock.exchange(parts[0][1] * size(owner), links=links)
    for turn, (seconds, whole_sent, whole_back) in enumerate(parts):
        here = owner
        for step in range(links.circle):
            back = whole_back * size(here)
            if step:
                if posted is not None:
                    clock.wait(posted)
                posted = None
                if step + 1 < links.circle:
                    posted = clock.exchange(whole_sent * size(here), links=links)
                elif turn + 1 < len(parts):
                    posted = clock.exchange(parts[turn + 1][1] * size(owner), links=links)
                if whole_back:
                    clock.compute(back * clock.start_s_per_byte)
            if inner:
                _around(clock, inner, [(seconds, whole_sent, whole_back)], here, shares)
            else:
                part_s = seconds if step or not held else own_s * (1.0 if turn else 1.0 - held)
                clock.compute(part_s if shares is None else part_s * shares * size(here))
            if whole_back and step:
                if arriving is not None:
                    clock.wait(arriving)
                    clock.compute((back if step > 1 else owed) * clock.join_s_per_byte)
                arriving, owed = clock.exchange(back, clock.home, links), back
            if shares is not None:
                here = here[before]
    if held:
        clock.compute(held * own_s * (1.0 if shares is None else shares * shares))
    if arriving is not None:
        clock.wait(arriving)
        clock.compute(owed * clock.join_s_per_byte)


def _gathered(
    clock: Clock,
    s_per_row: float,
    sent: float,
    back: float,
    parts: Sequence[int],
    shares: Vector | None,
) -> None:
    ranks = clock.links.ranks
    if shares is not None:  # parts are as long as the longest; a rank multiplies what it has
        sent, back = sent * float(shares.max()), back * float(shares.max())
    mine: Vector | float = 1.0 if shares is None else shares * float(shares.mean())
    posted = clock.together(_collective_s(clock, sent * parts[0]))
    swapped: Vector | None = None
    for count, following in zip(parts, [*parts[1:], 0], strict=True):
        clock.wait(posted)
        if following:
            posted = clock.together(_collective_s(clock, sent * following))
        clock.compute(s_per_row * count * ranks * mine)
        if back:
            if swapped is not None:
                clock.wait(swapped)
            clock.compute(back * count * ranks * (clock.start_s_per_byte + clock.join_s_per_byte))
            swapped = clock.together(_collective_s(clock, back * count), clock.home)
    if swapped is not None:
        clock.wait(swapped)


def _collective_s(clock: Clock, part_bytes: float) -> float:
    """A gather or an exchange of parts of all ranks: P-1 parts over the slowest hop."""
    hops = clock.links.ranks - 1
    slowest = float(clock.links.s_per_byte.max(initial=0.0))
    latency = float(clock.links.latency_s.max(initial=0.0))
    return hops * part_bytes * slowest + math.ceil(math.log2(hops + 1)) * latency


def _numbers(clock: Clock) -> None:
    """A sum over all ranks."""
    if clock.links.ranks > 1:
        clock.wait(clock.together(_collective_s(clock, 8.0)))


__all__ = ["COMPUTING", "Run", "run", "simulate"]
