"""The compiled and the dense loss at the same batch: what has to be equal, and what is not.

Both train from the same weights on the same pairs, step by step in turn.  Their losses then differ
by rounding alone; what differs is memory and time.  The dense loss goes far beyond the budget here,
so this is done only where the machine has the memory.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cl_compiler.cli.demo.arms import Arm, dense_loss, measure_bytes
from cl_compiler.cli.demo.metrics import Retrieval
from cl_compiler.cli.demo.training import Dataset, Learner, ModelSettings, learning_rate
from cl_compiler.runtime.busy import CpuTimes, foreign_cores
from cl_compiler.units import format_bytes

__all__ = ["SameBatch", "Side", "available_bytes", "run_same_batch", "why_not"]

_MIN_STEPS = 2  # the first of them warms up and is not timed


@dataclass(frozen=True)
class Side:
    """One loss: its bytes, its training loss at every step, what the encoders learned.

    loss_s: median seconds of forward and backward of the loss in a step; step_s: of a whole step.
    """

    peak_bytes: int
    losses: tuple[float, ...]
    loss_s: float
    step_s: float
    test: Retrieval


@dataclass(frozen=True)
class SameBatch:
    """Both sides after the same steps at ``batch`` and ``rate``.

    foreign_cores: that other processes kept busy meanwhile; None where nobody knows.
    """

    batch: int
    rate: float
    compiled: Side
    dense: Side
    foreign_cores: float | None = None

    @property
    def steps(self) -> int:
        return len(self.compiled.losses)

    @property
    def largest_difference(self) -> float:
        """Of the two losses at any step, relative."""
        pairs = zip(self.compiled.losses, self.dense.losses, strict=True)
        return max(abs(first - second) / abs(second) for first, second in pairs)


def run_same_batch(
    compiled: Arm,
    data: Dataset,
    settings: ModelSettings,
    *,
    max_steps: int,
    max_s: float,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> SameBatch | None:
    """Train both losses at the batch of ``compiled``; None where it was stopped too early.

    Args:
        compiled: the arm whose batch is taken.
        data: what is learned.
        settings: the encoders.
        max_steps: of each loss.
        max_s: begin no further step after so many seconds, once there are two.
        stop: asked before every step.
        progress: called with (what is done, steps so far, steps in all).
    """
    peak_bytes = measure_bytes(dense_loss, compiled.batch, settings.dim, "meta")
    arms = (compiled, replace(compiled, name="dense", function=dense_loss))
    rate = learning_rate(1.0, compiled.batch)
    learners = [Learner(arm, rate, data, settings) for arm in arms]
    losses: tuple[list[float], list[float]] = ([], [])
    loss_s: tuple[list[float], list[float]] = ([], [])
    step_s: tuple[list[float], list[float]] = ([], [])
    started, times = time.perf_counter(), CpuTimes.now()
    for step in range(max_steps):
        if step >= _MIN_STEPS and time.perf_counter() - started > max_s:
            break
        for side, learner in enumerate(learners):
            if stop():
                return None
            progress(f"{learner.arm.name}, batch {learner.arm.batch:,}", step, max_steps)
            before = (learner.loss_seconds, learner.seconds)
            learner.step()
            losses[side].append(learner.loss)
            loss_s[side].append(learner.loss_seconds - before[0])
            step_s[side].append(learner.seconds - before[1])
    foreign = foreign_cores(times, CpuTimes.now(), time.perf_counter() - started)
    sides = [
        Side(
            bytes_,
            tuple(losses[side]),
            statistics.median(loss_s[side][1:]),
            statistics.median(step_s[side][1:]),
            learner.evaluate().test,
        )
        for side, (learner, bytes_) in enumerate(
            zip(learners, (compiled.measured_bytes, peak_bytes), strict=True)
        )
    ]
    return SameBatch(compiled.batch, rate, sides[0], sides[1], foreign)


def why_not(batch: int, dim: int, available: int | None) -> str:
    """Why the dense loss had better not run at ``batch``; "" where it may."""
    needed = 2 * measure_bytes(dense_loss, batch, dim, "meta")  # it is not alone on the machine
    if available is None or needed <= available:
        return ""
    return (
        f"the dense loss at a batch of {batch:,} wants {format_bytes(needed)} free with room to "
        f"spare; {format_bytes(available)} are"
    )


def available_bytes() -> int | None:
    """Memory that this process may still take, as far as Linux tells; None elsewhere."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    return min(found, default=None)
