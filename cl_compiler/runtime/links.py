"""Measure what joins the ranks of a process group: messages of four sizes, all ranks at it.

In one direction even places send to odd ones; in two every rank sends to the next and receives
from the one before, as rings do, and that is the rate that plans use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

__all__ = ["SIZES", "message_seconds"]

SIZES = (1 << 20, 1 << 22, 3 << 22, 1 << 25)
"""Bytes of the messages."""
REPEATS = 25
"""Of each size, in turns: what disturbs a while disturbs some messages of every size."""


def message_seconds(
    group: dist.ProcessGroup,
    circle: Sequence[int],
    device: torch.device,
    *,
    two_directions: bool,
    sizes: Sequence[int] = SIZES,
) -> list[list[float]]:
    """Of each size, seconds of its messages to the next rank of a circle: the slowest rank's.

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
    sent, received = (torch.ones(max(sizes) // 4, device=device) for _ in (0, 1))
    seconds = torch.zeros(len(sizes), REPEATS + 1, dtype=torch.float64)
    for repeat in range(REPEATS + 1):  # once more: connections are made
        for index, size in enumerate(sizes):
            _together(group, device)
            began = time.perf_counter()
            count = size // 4
            calls = [dist.P2POp(dist.irecv, received[:count], group=group, group_peer=before)]
            calls = calls * receives
            calls += [dist.P2POp(dist.isend, sent[:count], group=group, group_peer=after)] * sends
            for work in dist.batch_isend_irecv(calls) if calls else ():
                work.wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[index, repeat] = time.perf_counter() - began
    found: list[list[float]] = _largest(group, seconds[:, 1:], device).tolist()
    return found


def _together(group: dist.ProcessGroup, device: torch.device) -> None:
    _largest(group, torch.zeros(1), device)


def _largest(group: dist.ProcessGroup, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Of every number the largest of all ranks."""
    numbers = values.to(device, torch.float64).contiguous()
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=group)
    return numbers.cpu()
