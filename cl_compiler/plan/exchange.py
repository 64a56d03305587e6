"""Seconds of what ranks send each other, and from which batch on products hide it.

A shard goes around one ring of all ranks, or around a ring of nodes and, on each of them, around
the ring of its ranks: then a fast hop carries most of it, and the slow one has as many steps of
products to hide behind as a node has ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cl_compiler.lang.ring import BOTH_WAYS, HALF_RING
from cl_compiler.plan.machine import Machine, Outer
from cl_compiler.plan.travel import shards_sent
from cl_compiler.plan.types import Problem

PRODUCTS = "matrix products"


@dataclass(frozen=True)
class Hop:
    """One kind of hop of a schedule.

    ``sends``: shards that a rank sends over it; ``steps``: how many of a plan's products one of
    them can hide behind.
    """

    bytes_per_s: float
    latency_s: float
    sends: int
    steps: int


@dataclass(frozen=True)
class TwoLevels:
    """Nodes of ``node`` ranks each, and the links inside and between them."""

    node: int
    inside: Outer
    between: Outer


def levels_of(machine: Machine, ranks: int) -> TwoLevels | None:
    """The two levels that a ring of rings runs on; None where the machine has no two."""
    linked = [outer for outer in machine.outer if outer.is_linked]
    if len(linked) < 2 or machine.ranks != ranks:
        return None
    inside = linked[-1]
    return TwoLevels(inside.instances * inside.ranks_inside, inside, linked[0])


def hops_of(schedule: str, machine: Machine, ranks: int) -> tuple[Hop, ...]:
    """What a shard passes over on its way to every rank."""
    linked = [outer for outer in machine.outer if outer.is_linked]
    if ranks == 1 or not linked:
        return ()
    levels = levels_of(machine, ranks) if schedule == "two_level" else None
    if schedule == HALF_RING:
        bytes_per_s = min(o.link_bytes_per_s for o in linked)
        latency_s = max(o.link_latency_s for o in linked)
        # a plan's products are those of a set with itself, half of those of two shards
        return (Hop(bytes_per_s, latency_s, shards_sent(schedule, ranks), 2),)
    if schedule == BOTH_WAYS:  # two shards are met at a time; where wires are shared, half as fast
        return tuple(
            Hop(o.link_bytes_per_s, o.link_latency_s, ranks // 2, 2)
            if o.both_ways
            else Hop(o.link_bytes_per_s, o.link_latency_s, ranks - 1, 1)
            for o in linked
        )
    if levels is None:
        # A ring's slowest hop sets its pace: one rank of every node sends to the next node.
        bytes_per_s = min(o.link_bytes_per_s for o in linked)
        return (Hop(bytes_per_s, max(o.link_latency_s for o in linked), ranks - 1, 1),)
    nodes, node = ranks // levels.node, levels.node
    between, inside = levels.between, levels.inside
    return (
        Hop(between.link_bytes_per_s, between.link_latency_s, nodes - 1, node),
        Hop(inside.link_bytes_per_s, inside.link_latency_s, nodes * (node - 1), 1),
    )


def exchange_seconds(hops: tuple[Hop, ...], shard_bytes: float, messages: int) -> float:
    """Of sending a shard everywhere; kinds of hops are busy at the same time.

    Args:
        hops: of the schedule.
        shard_bytes: of all passes together.
        messages: in which a shard is sent, of all passes together.
    """
    return max(
        (hop.sends * (shard_bytes / hop.bytes_per_s + messages * hop.latency_s) for hop in hops),
        default=0.0,
    )


def hiding_rows(
    products_s: float,
    problem: Problem,
    shard_bytes: float,
    hops: tuple[Hop, ...],
    messages: int = 1,
    chunk: int | None = None,
) -> int:
    """Rows per rank from which on products hide what is sent meanwhile; 0 where nothing is.

    A step's matrix products take a·b² seconds, its messages latencies + b·linear, and G steps are
    there to hide them: b* is the larger root of their difference.  In chunks of c rows it is
    a·b·c against latencies + c·linear.  Whatever else a step does hides more.

    Args:
        products_s: seconds of the matrix products of a shard as ``problem`` with another.
        problem: of one rank.
        shard_bytes: sent of a shard beside them.
        hops: that it passes over.
        messages: in which a chunk is sent over a hop.
        chunk: rows that travel together; None: all.
    """
    rows = 0
    for hop in hops:
        if not math.isfinite(hop.bytes_per_s):
            continue
        a = products_s / (problem.M * problem.N) * hop.steps
        linear = shard_bytes / max(problem.M, problem.N) / hop.bytes_per_s
        latency_s = messages * hop.latency_s
        root = (linear + math.sqrt(linear * linear + 4 * a * latency_s)) / (2 * a)
        if chunk is not None and root > chunk:
            root = (linear + latency_s / chunk) / a
        rows = max(rows, math.ceil(root))
    return rows


__all__ = [
    "PRODUCTS",
    "Hop",
    "TwoLevels",
    "exchange_seconds",
    "hiding_rows",
    "hops_of",
    "levels_of",
]
