"""What a rank of a simulated cluster has to do: the passes of its program."""

from __future__ import annotations

from dataclasses import dataclass

from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import HALF_RING
from cl_compiler.plan.overlap import shares_of_passes
from cl_compiler.plan.travel import HostLink, Travel, host_link_of, travels_of
from cl_compiler.plan.types import Plan


@dataclass(frozen=True)
class Work:
    """One pass on one rank: what it moves, and seconds of a whole shard against a whole shard.

    On half rings two shards meet once; ``diagonal``: of a shard, the length of a tile.  Of shards
    in host memory, ``host``: bytes over the host link; ``rounds``: how often they travel.
    """

    travel: Travel
    seconds: float
    diagonal: float = 0.0
    rounds: int = 1
    host: HostLink | None = None


def work_of(plan: Plan, program: Program) -> tuple[Work, ...]:
    """The passes of a program; the plan's seconds of one shard pair by their matrix products."""
    assert plan.cluster is not None
    share = (plan.seconds - plan.cluster.exposed_s) / plan.cluster.group_size
    diagonal = 0.0
    if plan.cluster.schedule == HALF_RING:  # planned: of half a shard pair, and diagonal tiles
        diagonal = min(1.0, plan.tile.cols / plan.problem.M)
        ranks = plan.cluster.group_size
        whole = 1 if ranks % 2 else 2
        share *= 2 / (1 + diagonal * whole / ranks)
    resident, problem = plan.cluster.resident, plan.problem
    return tuple(
        Work(
            travel,
            share * part,
            diagonal,
            travel.rounds(problem, resident),
            host_link_of(travel, problem, resident) if resident else None,
        )
        for travel, part in zip(
            travels_of(program, problem), shares_of_passes(program), strict=True
        )
    )


__all__ = ["Work", "work_of"]
