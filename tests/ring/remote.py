"""What ranks do in ``test_remote_chunks.py``: look at what is there of other ranks' shards."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from cl_compiler import compile_loss
from cl_compiler.runtime import group_loss
from tests.ring.ranks import shards

WIDTH = 51
"""No other matrix has it."""


def held(rank: int, schedules: list[str]) -> dict[str, dict[str, int]]:
    """Of each schedule: the most matrices of other ranks' rows at once, the largest, a chunk.

    Looked at whenever something was posted or has arrived, forward and backward.
    """
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    plain, found = group_loss.guarded_ring, {}
    rows = 1500 - 7 * rank
    own_bytes = rows * WIDTH * 4  # of no other rank's shard
    seen: dict[str, int] = {}

    def look() -> None:
        objects = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
        storages = [t.untyped_storage() for t in objects if t.dim() == 2 and t.shape[1] == WIDTH]
        remote = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes() != own_bytes}
        seen["matrices"] = max(seen["matrices"], len(remote))
        seen["largest_bytes"] = max([seen["largest_bytes"], *remote.values()])

    def ring_of(*args: Any) -> Any:
        ring = plain(*args)

        def looking(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                result = method(*args)
                look()
                return result

            return call

        ring.exchange, ring.wait = looking(ring.exchange), looking(ring.wait)
        return ring

    group_loss.guarded_ring = ring_of
    for schedule in schedules:
        loss_fn = compile_loss(
            "xeon-amx-2c", "64MiB", group=dist.group.WORLD, schedule=schedule, timeout_s=30
        )
        seen = {"matrices": 0, "largest_bytes": 0}
        gc.collect()
        gc.freeze()  # what was imported is not looked at every time
        loss_fn(*shards(rank, rows, WIDTH), logit_scale=10.0).backward()
        chunk = loss_fn.plan.cluster.chunk
        assert chunk < rows
        found[schedule] = {**seen, "chunk_bytes": chunk * WIDTH * 4}
        loss_fn.close()
    return found
