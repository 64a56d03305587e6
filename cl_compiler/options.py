"""The words that ``compile_loss`` takes, and what it says to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cl_compiler.errors import ArgumentError, ScheduleError, instead_of
from cl_compiler.lang.ring import CANONICAL, CLUSTER_SCHEDULES
from cl_compiler.plan.precision import PRECISIONS
from cl_compiler.plan.types import MemoryBudget, Problem
from cl_compiler.units import exact_bytes

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec


def check_options(
    precision: str,
    schedule: str,
    schedules: Sequence[str],
    nonfinite: str,
    deterministic: bool | str,
    verify: bool,
    tune: bool,
) -> None:
    """Refuse what is none of the known words.

    Raises:
        ArgumentError, ScheduleError: the message names those that are.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r}: {instead_of(precision, PRECISIONS)}.")
    if schedule in CLUSTER_SCHEDULES and schedule not in schedules:
        raise ScheduleError(
            f"schedule={schedule!r} is of a group of ranks, and this process is alone: pass "
            f"group=, or {instead_of('', ['auto', *schedules])}."
        )
    if schedule not in ("auto", *schedules):
        raise ScheduleError(f"schedule={schedule!r}: {instead_of(schedule, ['auto', *schedules])}.")
    if nonfinite not in ("propagate", "error"):
        raise ArgumentError(f"nonfinite={nonfinite!r}: use 'propagate' or 'error'.")
    repeats = True if deterministic == CANONICAL else deterministic
    for name, switch in (("deterministic", repeats), ("verify", verify), ("tune", tune)):
        if not isinstance(switch, bool):
            more = ', or "canonical"' if name == "deterministic" else ""
            raise ArgumentError(f"{name}={switch!r}: use True or False{more}.")


def canonical_schedule(schedule: str, on_group: bool) -> str:
    """The cluster schedule whose results do not depend on the number of ranks.

    Raises:
        ArgumentError, ScheduleError: there is no group, or another schedule is asked for.
    """
    if not on_group:
        raise ArgumentError(
            'deterministic="canonical" compares groups of different sizes, and this process is '
            "alone: pass group=, be it of one rank, or deterministic=True."
        )
    if schedule not in ("auto", CANONICAL):
        raise ScheduleError(
            f'deterministic="canonical" is a schedule of its own, and schedule={schedule!r} asks '
            "for another; leave it out."
        )
    return CANONICAL


def check_on_group(verify: bool, tune: bool) -> None:
    """Refuse what one process does alone.

    Raises:
        ArgumentError: the message says what to do instead.
    """
    if verify:
        raise ArgumentError(
            "verify=True on a group: the sample would have to be the same on every rank; "
            "verify the loss in one process, where the same tiles run."
        )
    if tune:
        raise ArgumentError(
            "tune=True on a group: ranks would choose different plans; tune the loss in one "
            "process with a rank's share of the problem."
        )


def asked_of_group(
    hardware_spec: str | Path | HardwareSpec,
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None,
    problem: Problem | str | None,
    precision: str,
    schedule: str,
    deterministic: bool | str,
    grad_convention: str,
) -> dict[str, str]:
    """What a rank asks ``compile_loss`` for, by its arguments' names: all ranks ask for the same.

    The machine and the memory are those that rank 0 sees, so "auto" and None say no more.

    Raises:
        ArgumentError, BudgetError: the budget or the problem cannot be read.
    """
    hardware = hardware_spec if isinstance(hardware_spec, (str, Path)) else hardware_spec.name
    amount = "none"
    if memory_budget is not None:
        budget = MemoryBudget.parse(memory_budget)
        amount = exact_bytes(budget.device_bytes)
        if budget.host_bytes is not None:
            amount += f" and {exact_bytes(budget.host_bytes)} of the host"
    sizes = "none" if problem is None else str(Problem.parse(problem)).removeprefix("Problem")
    return {
        "hardware_spec": Path(hardware).name,
        "memory_budget": amount,
        "problem": sizes,
        "precision": precision,
        "schedule": schedule,
        "deterministic": str(deterministic),
        "grad_convention": grad_convention,
    }


__all__ = ["asked_of_group", "canonical_schedule", "check_on_group", "check_options"]
