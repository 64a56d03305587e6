"""The words that ``compile_loss`` takes, and what it says to others."""

from __future__ import annotations

from collections.abc import Sequence

from cl_compiler.errors import ArgumentError, ScheduleError
from cl_compiler.lang.ring import CANONICAL
from cl_compiler.plan.precision import PRECISIONS


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
        raise ArgumentError(f"precision={precision!r}: use one of {', '.join(PRECISIONS)}.")
    if schedule not in ("auto", *schedules):
        raise ScheduleError(f"schedule={schedule!r}: use auto or one of {', '.join(schedules)}.")
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


__all__ = ["canonical_schedule", "check_on_group", "check_options"]
