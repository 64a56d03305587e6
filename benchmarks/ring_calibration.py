"""What ``benchmarks.rings`` measures of links and ranks before it measures rings."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.ring_configurations import CALIBRATED_ROWS, ROW_BYTES, WIDTH
from cl_compiler.plan.clock import Links

ATTEMPTS = 10
LEAST_R2 = 0.98


def come_first(at_once: bool) -> None:
    """What else runs on this machine is not what is measured: all threads of this process go first.

    ``at_once``: whenever they can go on, and for as long as they can.  Else they take turns, so
    that what sends does not wait for products that have every core.
    """
    policy, priority = (os.SCHED_FIFO, 1) if at_once else (os.SCHED_OTHER, 0)
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))
            os.setpriority(os.PRIO_PROCESS, thread, -15)


def together(ring: Any, act: Callable[[], object]) -> float:
    """Seconds of this rank's ``act``, which all ranks begin at the same time."""
    begin = float(ring.largest(torch.tensor([time.perf_counter()], dtype=torch.float64))) + 5e-3
    time.sleep(max(0.0, begin - time.perf_counter()))
    act()
    return time.perf_counter() - begin


def arrival_seconds(ring: Any, rows: int) -> np.ndarray:
    """[ranks]: until what each rank sends has arrived, all of them sending.

    The lower quartile of some: what else runs on the machine only ever adds to it.
    """
    sent, received = torch.ones(rows, WIDTH), torch.empty(rows, WIDTH)
    ranks, rank = ring.world_size, ring.rank
    found = []

    def act() -> None:
        posted = ring.exchange([sent], [received], (rank + 1) % ranks, (rank - 1) % ranks)
        posted[0].wait()
        works.extend(posted[1:])  # to wait for one twice is to wait for ever

    for _ in range(9):
        works: list[Any] = []
        arrived = ring.numbers(together(ring, act)).flatten().numpy()
        ring.wait(works)
        found.append(np.roll(arrived, -1))  # the next rank received what this one sent
    quartile: np.ndarray = np.quantile(np.array(found), 0.25, axis=0)
    return quartile


def fitted_links(ring: Any) -> tuple[Links, float]:
    """Every rank's link, and the worst fit's R².

    Raises:
        RuntimeError: messages do not take latency plus bytes over bandwidth.
    """
    sizes = np.array(CALIBRATED_ROWS) * float(ROW_BYTES)
    for _ in range(ATTEMPTS):
        arrival_seconds(ring, CALIBRATED_ROWS[0])  # connections exist
        seconds = np.array([arrival_seconds(ring, rows) for rows in CALIBRATED_ROWS])
        s_per_byte, latency_s, r2 = [], [], []
        for of_rank in seconds.T:
            slope, latency = np.polyfit(sizes, of_rank, 1, w=1 / of_rank)
            rest = of_rank - slope * sizes - latency
            s_per_byte.append(slope)
            latency_s.append(max(0.0, latency))
            r2.append(1 - float((rest**2).sum() / ((of_rank - of_rank.mean()) ** 2).sum()))
        if min(r2) >= LEAST_R2:
            return Links(np.array(s_per_byte), np.array(latency_s)), min(r2)
    raise RuntimeError(f"links fit with R² = {min(r2):.3f}, and {LEAST_R2} is asked for")


def post_seconds(ring: Any) -> float:
    """Of posting an exchange of few bytes, after a wait as long as products."""
    ranks, rank = ring.world_size, ring.rank
    tiny = [torch.ones(1), torch.empty(1)]
    works: list[Any] = []

    def act() -> None:
        works.extend(ring.exchange(tiny[:1], tiny[1:], (rank + 1) % ranks, (rank - 1) % ranks))

    found = []
    for _ in range(30):
        found.append(together(ring, act))
        ring.wait(works)
        works.clear()
    return float(ring.largest(torch.tensor([statistics.median(found)])))


def memory_seconds(ring: Any) -> tuple[float, float]:
    """Per byte, all ranks at it: (to start an accumulator, to join another's part)."""
    into, new = torch.zeros(CALIBRATED_ROWS[-1], WIDTH), torch.zeros(CALIBRATED_ROWS[-1], WIDTH)
    result = []
    for act in (lambda: into.fill_(0.0), lambda: into.add_(new)):
        found = statistics.median(together(ring, act) for _ in range(9))
        result.append(float(ring.largest(torch.tensor([found]))) / (into.numel() * 4))
    return result[0], result[1]


def oversleeping_seconds() -> float:
    """What a wait takes beyond what was asked for."""
    found = []
    for _ in range(20):
        began = time.perf_counter()
        time.sleep(2e-3)
        found.append(time.perf_counter() - began - 2e-3)
    return statistics.median(found)


__all__ = [
    "come_first",
    "fitted_links",
    "memory_seconds",
    "oversleeping_seconds",
    "post_seconds",
    "together",
]
