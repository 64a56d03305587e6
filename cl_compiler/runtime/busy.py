"""What else runs on the machine while something is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CpuTimes", "cores_here", "foreign_cores", "in_the_way", "is_busy"]

_STAT = Path("/proc/stat")
_LITTLE = 0.1
"""Of all cores: what others may use without changing much."""


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds so far: ``machine_s`` of all processes on the cores that this one may use, stolen
    ones included, None where nobody counts them; ``own_s`` of this process."""

    machine_s: float | None
    own_s: float

    @classmethod
    def now(cls) -> CpuTimes:
        """As they are counted at this moment."""
        times = os.times()
        return cls(_machine_s(), times.user + times.system)


def cores_here() -> int:
    """Cores, as the system counts them, on which this process may run."""
    return len(_allowed()) or os.cpu_count() or 1


def _allowed() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def _machine_s() -> float | None:
    try:
        lines = [line.split() for line in _STAT.read_text().splitlines()]
    except OSError:
        return None
    names = {f"cpu{core}" for core in _allowed()}
    fields = [[int(n) for n in line[1:9]] for line in lines if line and line[0] in names]
    ticks = sum(
        user + nice + system + irq + softirq + steal
        for user, nice, system, _idle, _iowait, irq, softirq, steal in fields
    )
    return ticks / os.sysconf("SC_CLK_TCK") if fields else None


def foreign_cores(
    before: CpuTimes, after: CpuTimes, wall_s: float, own_s: float | None = None
) -> float | None:
    """Cores that other processes kept busy in between; None where nobody knows.

    ``own_s``: CPU seconds of all processes that are one's own, where there are several.
    """
    if before.machine_s is None or after.machine_s is None:
        return None
    own_s = after.own_s - before.own_s if own_s is None else own_s
    # A tick of 10 ms on each side is the counters' own uncertainty, not somebody else's work.
    return max(0.0, after.machine_s - before.machine_s - own_s - 0.02) / wall_s


def is_busy(foreign: float | None) -> bool:
    """Whether others kept at least a tenth of all cores busy; not where nobody knows."""
    return foreign is not None and foreign >= _LITTLE * cores_here()


def in_the_way(foreign: float | None, wanted: int, so: str = "") -> str:
    """What to say of cores that others kept busy; "" where enough were left.

    ``wanted``: threads or processes that were measured.  ``so``: what follows from it; by default
    that rates are too low.
    """
    if foreign is None or not is_busy(foreign) or foreign + wanted <= (cores := cores_here()):
        return ""
    so = so or "these rates are too low; calibrate again when the machine is quiet"
    return f"other processes kept {foreign:.1f} of {cores} cores busy meanwhile, so {so}"
