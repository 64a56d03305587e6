"""Bytes over every kind of link around a rank: inside a node, between nodes.

With P ranks, of which n are inside a level's instances and g in one of it: shards that go around
pass every hop of the ring, so the busiest link of each kind carries as many; what is sent straight
to its owner passes only the links in between.
"""

from __future__ import annotations

from collections.abc import Sequence

from cl_compiler.lang.ring import BOTH_WAYS, CANONICAL, HALF_RING
from cl_compiler.plan.exchange import levels_of
from cl_compiler.plan.machine import Machine, Outer
from cl_compiler.plan.overlap import Phase
from cl_compiler.plan.types import LinkBytes


def bytes_per_link(
    phases: Sequence[Phase], schedule: str, machine: Machine, ranks: int
) -> tuple[LinkBytes, ...]:
    """Of a forward and a backward, operands and gradients; from the outermost links inwards.

    Args:
        phases: of the program (``overlap``).
        schedule: how shards travel.
        machine: what surrounds a rank.
        ranks: of the group.
    """
    result = []
    for outer in machine.outer:
        if not outer.is_linked:
            continue
        shards, accumulators = _shards_over(outer, schedule, machine, ranks)
        sent = {"forward": 0, "backward": 0}
        for phase in phases:
            operands = phase.shard_bytes - phase.gradient_bytes
            sent[phase.name] += round(operands * shards + phase.gradient_bytes * accumulators)
        result.append(
            LinkBytes(
                _joined_by(machine, outer),
                outer.link_kind,
                outer.link_bytes_per_s,
                sent["forward"],
                sent["backward"],
            )
        )
    return tuple(result)


def _shards_over(outer: Outer, schedule: str, machine: Machine, ranks: int) -> tuple[int, int]:
    """(shards, accumulators of shards) that a link of this level carries in one pass."""
    others, half = ranks - 1, ranks // 2
    group = outer.instances * outer.ranks_inside
    straight = group - outer.ranks_inside
    match schedule:
        case "two_level" if (levels := levels_of(machine, ranks)) is not None:
            nodes = ranks // levels.node
            shards = nodes - 1 if outer is levels.between else nodes * (levels.node - 1)
            return shards, shards
        case "all_gather":  # gathered around, and sent home straight
            return others, straight
        case s if s == CANONICAL:
            return straight, straight
        case s if s == BOTH_WAYS:
            one_way = outer.both_ways or outer.instances == 2  # the other way is another link
            shards = half if one_way else others
            return shards, shards
        case s if s == HALF_RING:  # accumulators go home straight, to another node if there is one
            return half, half if group == ranks else max(half - 1, 0)
        case _:
            return others, others


def _joined_by(machine: Machine, outer: Outer) -> str:
    """What the links join: the instances of the next level inside."""
    names = [*(o.name for o in machine.outer), machine.device]
    return names[names.index(outer.name) + 1]


__all__ = ["bytes_per_link"]
