"""Measure what joins the ranks of a process group: messages of four sizes, all ranks at it.

In one direction even places send to odd ones; in two every rank sends to the next and receives
from the one before, as rings do, and that is the rate that plans use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["SIZES", "message_seconds"]

SIZES = (1 << 20, 1 << 22, 3 << 22, 1 << 25)
"""Bytes of the messages."""
REPEATS = 25
"""Of which the lower quartile counts: what else runs only ever adds to a message's time."""


def message_seconds(
    group: dist.ProcessGroup,
    circle: Sequence[int],
    device: torch.device,
    *,
    two_directions: bool,
    sizes: Sequence[int] = SIZES,
) -> list[float]:
    """Seconds of a message of each size to the next rank of a circle: the slowest rank's.

    Args:
        group: every rank of it calls this.
        circle: this rank's circle of ranks of the group, in order; every rank is in one.
        device: where the messages lie.
        two_directions: every rank sends and receives; otherwise every other one sends.
        sizes: bytes of the messages.
    """
    place = list(circle).index(dist.get_rank(group))
    after, before = circle[(place + 1) % len(circle)], circle[place - 1]
    sends = two_directions or (place % 2 == 0 and place + 1 < len(circle))
    receives = two_directions or place % 2 == 1
    found = []
    for size in (sizes[0], *sizes):  # once more: connections are made
        sent, received = (torch.ones(size // 4, device=device) for _ in (0, 1))
        seconds = []
        for _ in range(REPEATS):
            _together(group, device)
            began = time.perf_counter()
            calls = [dist.P2POp(dist.irecv, received, group=group, group_peer=before)] * receives
            calls += [dist.P2POp(dist.isend, sent, group=group, group_peer=after)] * sends
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
        found.append(_largest(group, statistics.quantiles(seconds, n=4)[0], device))
    return found[1:]


def _together(group: dist.ProcessGroup, device: torch.device) -> None:
    _largest(group, 0.0, device)


def _largest(group: dist.ProcessGroup, value: float, device: torch.device) -> float:
    number = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
    return float(number)
