"""What ``simulate`` runs: each cluster schedule, planned and run event by event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cl_compiler.cli.ranks import Ranks

if TYPE_CHECKING:
    from cl_compiler.errors import CompilerError
    from cl_compiler.lang.sweeps import SweepPlan
    from cl_compiler.plan.shards import RankShares
    from cl_compiler.plan.simulate import Run
    from cl_compiler.plan.types import ClusterPlan, Plan, Request

__all__ = ["Found", "simulated", "steps"]


@dataclass(frozen=True)
class Found:
    """One schedule: its plan and run; the largest batch that fits.

    Where ranks differ, ``plan`` and ``run`` are of the ``shares`` that are advised, and ``even`` is
    these ranks' run with even shards, if they fit.
    """

    plan: Plan
    run: Run
    shares: RankShares | None = None
    even: Run | None = None
    largest: int | None = None

    @property
    def cluster(self) -> ClusterPlan:
        assert self.plan.cluster is not None
        return self.plan.cluster

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return self.plan.peak_bytes if self.shares is None else max(self.shares.peak_bytes)

    @property
    def sent_bytes(self) -> int:
        """By a rank: every shard passes it, so they count by their mean."""
        sent = self.cluster.forward_bytes + self.cluster.backward_bytes
        if self.shares is None:
            return sent
        rows = self.shares.rows
        return round(sent * sum(rows) / (len(rows) * self.plan.problem.M))


def steps(schedules: Sequence[str], max_batch: bool) -> list[str]:
    """What is done one after the other."""
    each = ("", ", the largest batch") if max_batch else ("",)
    return ["the machine and the loss", *(s + what for s in schedules for what in each)]


def simulated(
    request: Request,
    schedules: Sequence[str],
    total: int,
    drawn_ranks: int,
    ranks: Ranks | None,
    max_batch: bool,
    step: Callable[[], None],
) -> tuple[dict[str, Found], dict[str, CompilerError]]:
    """Of each schedule what was found, or why there is nothing.

    Args:
        request: of one rank; its schedule is replaced.
        schedules: names.
        total: rows of all ranks together.
        drawn_ranks: how many ranks' events are kept.
        ranks: that differ; None where all are alike.
        max_batch: whether the largest batch is looked for, too.
        step: called as each of ``steps`` begins, except the first.
    """
    from cl_compiler.errors import CompilerError
    from cl_compiler.lang.sweeps import plan_sweeps

    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    found: dict[str, Found] = {}
    refused: dict[str, CompilerError] = {}
    for schedule in schedules:
        asked = replace(request, schedule=schedule)
        step()
        try:
            of = _one(asked, sweeps, total, drawn_ranks, ranks)
        except CompilerError as error:
            refused[schedule] = error
            if max_batch:
                step()
            continue
        if max_batch:
            step()
            of = replace(of, largest=_largest(asked, sweeps, ranks))
        found[schedule] = of
    return found, refused


def _largest(asked: Request, sweeps: SweepPlan, ranks: Ranks | None) -> int:
    """Rows of all ranks together: of even shards, or of those that are advised."""
    from cl_compiler.codegen.ring.backend import fits_group, plan_group
    from cl_compiler.plan.shards import largest_shard, largest_total

    if ranks is None:
        return largest_shard(asked, sweeps, fits_group) * asked.group_size
    return largest_total(asked, sweeps, ranks.speeds, ranks.budgets, plan_group, fits_group)


def _one(
    asked: Request, sweeps: SweepPlan, total: int, drawn_ranks: int, ranks: Ranks | None
) -> Found:
    """One schedule, planned and run.

    Raises:
        CompilerError: the loss or the ranks cannot use it.
    """
    from cl_compiler.codegen.ring.backend import fits_group, plan_group
    from cl_compiler.errors import BudgetError
    from cl_compiler.plan.shards import shares_of_ranks
    from cl_compiler.plan.simulate import simulate as run

    hardware = asked.hardware
    if ranks is None:
        plan, program = plan_group(asked, sweeps)
        return Found(plan, run(plan, program, hardware, drawn_ranks=drawn_ranks))
    speeds = ranks.relative_speeds
    shares = shares_of_ranks(
        asked, sweeps, total, ranks.speeds, ranks.budgets, plan_group, fits_group
    )
    plan, program, rows = shares.plan, shares.program, shares.rows
    uneven = run(plan, program, hardware, speeds=speeds, shards=rows, drawn_ranks=drawn_ranks)
    try:
        even = run(*plan_group(asked, sweeps), hardware, speeds=speeds)
    except BudgetError:
        return Found(plan, uneven, shares)
    return Found(plan, uneven, shares, even)
