"""Ranks of a group on the command line: how many there are, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from cl_compiler.cli.requests import reading
from cl_compiler.units import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec
    from cl_compiler.lang.sweeps import SweepPlan
    from cl_compiler.plan.shards import RankShares
    from cl_compiler.plan.types import Plan, Request

__all__ = [
    "Budgets",
    "Ranks",
    "Speeds",
    "if_left_out",
    "in_words",
    "on_its_ranks",
    "on_ranks",
    "ranks_of",
    "step_of",
    "table_of",
]

Speeds = Annotated[
    str | None,
    typer.Option(
        "--speeds",
        help="Of each rank, as 1,1,0.5,1: shards are weighed for ranks that differ.",
        show_default=False,
    ),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--budgets",
        help="Of each rank, as 2GiB,2GiB,1GiB,2GiB: no rank gets more rows than it has room for.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Ranks:
    """What was said of each rank; ``budgets`` is empty where all have the same."""

    speeds: tuple[float, ...]
    budgets: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.speeds)

    @property
    def relative_speeds(self) -> tuple[float, ...]:
        """1 for the fastest."""
        return tuple(s / max(self.speeds) for s in self.speeds)


def ranks_of(speeds: str | None, budgets: str | None, budget: str | None) -> Ranks | None:
    """Ranks that differ; None where nothing says so.

    Raises:
        typer.BadParameter: a text cannot be read, the lists differ in length, or there is a budget
            of all ranks beside one of each.
    """
    if speeds is None and budgets is None:
        return None
    if budgets is not None and budget is not None:
        raise typer.BadParameter("--budgets says what each rank has: leave out --budget")
    amounts = () if budgets is None else _budgets(budgets)
    numbers = (1.0,) * len(amounts) if speeds is None else _speeds(speeds)
    if amounts and len(numbers) != len(amounts):
        raise typer.BadParameter(
            f"--speeds has {counted(len(numbers), 'number')} and --budgets "
            f"{counted(len(amounts), 'amount')}: give one of each for every rank"
        )
    return Ranks(numbers, amounts)


def _speeds(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--speeds {text}: give numbers, as 1,1,0.5,1") from None
    if not all(math.isfinite(n) and n > 0 for n in numbers):
        raise typer.BadParameter(f"--speeds {text}: every rank's speed is a number above 0")
    return numbers


def _budgets(text: str) -> tuple[int, ...]:
    from cl_compiler.plan.types import MemoryBudget

    with reading("--budgets"):
        return tuple(MemoryBudget.parse(part.strip()).device_bytes for part in text.split(","))


def on_ranks(request: Request, count: int, ranks: Ranks | None) -> Request:
    """The request of one rank with an even share of what is asked for.

    Args:
        request: of all ranks together.
        count: ranks of one machine, in place of those of the hardware; 0: as the hardware says.
        ranks: what is said of each; of one machine there are then as many.

    Raises:
        typer.BadParameter: the numbers of ranks differ.
    """
    from cl_compiler.hardware.ranks import one_device, with_ranks
    from cl_compiler.plan.types import MemoryBudget

    hardware: HardwareSpec = request.hardware
    if count < 0:
        raise typer.BadParameter(f"--ranks {count}: give at least 1")
    if not count and ranks is not None and hardware.world_size == 1:
        count = ranks.count
    if count:
        hardware = with_ranks(one_device(hardware), count, count)
    count = hardware.world_size
    if ranks is not None and ranks.count != count:
        option = "--budgets" if ranks.budgets else "--speeds"
        what = counted(ranks.count, "amount" if ranks.budgets else "number")
        raise typer.BadParameter(f"{option} has {what} for {count} ranks of {hardware.name}")
    budget = request.budget
    if ranks is not None and ranks.budgets:
        budget = MemoryBudget(min(ranks.budgets))
    step = request.row_step
    m, n = (
        step * -(-length // (step * count)) for length in (request.problem.M, request.problem.N)
    )
    return replace(
        request,
        hardware=hardware,
        budget=budget,
        problem=replace(request.problem, M=m, N=n),
        group_size=count,
    )


def on_its_ranks(request: Request) -> Request:
    """The same on a machine of one device; on more, of one of their ranks."""
    return request if request.hardware.world_size == 1 else on_ranks(request, 0, None)


def in_words(rows: Sequence[int]) -> str:
    """How many ranks have how many rows."""
    counts: dict[int, int] = {}
    for n in rows:
        counts[n] = counts.get(n, 0) + 1
    return ", ".join(f"{n} on {count} of them" for n, count in counts.items())


def step_of(seconds: float, plan: Plan, ranks: Ranks | None) -> str:
    """A simulated step, and what the plan's own time beside it is of."""
    alike = ""
    if ranks is not None:
        rows = f"{plan.problem.M} rows"
        alike = f" of these ranks; the time is of ranks that all have {rows} and the highest speed"
    return f"{format_seconds(seconds)} simulated{alike or ', message by message'}"


def if_left_out(asked: Request, sweeps: SweepPlan, total: int, ranks: Ranks, seconds: float) -> str:
    """What leaving out the rank with least memory is predicted to gain; "" where it does not."""
    from cl_compiler.codegen.ring.backend import fits_group, plan_group
    from cl_compiler.plan.shards import without_poorest

    found = without_poorest(
        asked, sweeps, total, ranks.speeds, ranks.budgets, plan_group, fits_group
    )
    if found is None or found[1] >= seconds:
        return ""
    return (
        f"without rank {found[0]}, which has {format_bytes(ranks.budgets[found[0]])}, a step is "
        f"predicted to take {format_seconds(found[1])} in place of {format_seconds(seconds)}: "
        "consider leaving it out"
    )


def table_of(ranks: Ranks, shares: RankShares) -> list[tuple[str, ...]]:
    """(ranks, speed, rows, memory, budget) of each kind of rank."""
    from cl_compiler.runtime.guard import ranks_in_words

    kinds: dict[tuple[float, int, int, int], list[int]] = {}
    budgets = ranks.budgets or (shares.plan.budget.device_bytes,) * ranks.count
    for rank, kind in enumerate(
        zip(ranks.speeds, shares.rows, shares.peak_bytes, budgets, strict=True)
    ):
        kinds.setdefault(kind, []).append(rank)
    return [
        (
            ranks_in_words(members).partition(" ")[2],
            f"{speed:g}",
            str(rows),
            format_bytes(peak),
            format_bytes(budget),
        )
        for (speed, rows, peak, budget), members in kinds.items()
    ]
