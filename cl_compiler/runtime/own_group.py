"""A process group that belongs to one loss, and of which no other group notices anything.

PyTorch names groups after how many a process knows, which members of overlapping groups need not
agree about: they would wait for each other under different names.  Groups of a loss are named after
their members, and where some ranks are no members, PyTorch knows the group only while something is
posted in it: groups that a program makes later are named as if there was no loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cl_compiler.errors import GroupError
from cl_compiler.runtime.guard import ranks_in_words

WATCHDOG_S = 86400.0
"""When NCCL's own watchdog aborts a group; the loss's thread does, far earlier, and says why.

It counts from when a call is posted, so products that this rank has posted before count, too.
"""
NCCL_ENVIRONMENT = {
    # Errors abort the group's communicators.  The default ends the process, from another thread.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    # A wait queues on the stream: the host goes on while shards travel.
    "TORCH_NCCL_BLOCKING_WAIT": "0",
}
"""What NCCL's groups read when they are made."""


class OwnGroup:
    """A process group of a parent's members, in their order.

    Args:
        parent: every rank of it makes the group, as often as every other.
        backend: "gloo" or "nccl".
        timeout_s: of calls in it.

    Raises:
        GroupError: not every rank came to make it in time.
    """

    def __init__(self, parent: dist.ProcessGroup, backend: str, timeout_s: float) -> None:
        members = dist.get_process_group_ranks(parent)
        self.backend = backend
        with _named(members, backend) as missing:
            try:
                group = dist.new_group(
                    members,
                    timeout=timedelta(seconds=timeout_s),
                    backend=backend,
                    # Processes outside of the parent need not call this.
                    use_local_synchronization=len(members) < dist.get_world_size(),
                    sort_ranks=False,
                )
            except RuntimeError as error:
                raise GroupError(_not_made(missing(), timeout_s)) from error
        assert group is not None
        self.group: dist.ProcessGroup = group
        self.rank, self.world_size = dist.get_rank(group), len(members)
        self._entries: list[tuple[dict[Any, Any], Any]] = []
        self._users, self._lock = 0, threading.Lock()
        if self.world_size < dist.get_world_size():
            world = c10d._world
            tables = (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config)
            self._entries = [(table, table.pop(group)) for table in tables]

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """While it is entered, functions of ``torch.distributed`` take the group."""
        with self._lock:
            self._users += 1
            for table, entry in self._entries:
                table[self.group] = entry
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    for table, _ in self._entries:
                        table.pop(self.group, None)

    def all_gather(self, own: torch.Tensor) -> torch.Tensor:
        """[ranks, ...]: every rank's tensor, in their order; the host waits for it.

        Raises:
            RuntimeError: a rank is gone or late.
        """
        everyone = own.new_empty(self.world_size, *own.shape)
        self.group._allgather_base(everyone, own.unsqueeze(0)).wait()
        return everyone

    def break_up(self) -> None:
        """Make everything that waits in the group, in this process, raise."""
        if self.backend != "gloo":
            with contextlib.suppress(Exception):
                self.group.abort()
            return
        for step in range(1, self.world_size):
            # Gloo closes all of a group's connections when a wait times out, and has no other way.
            # What is closed already cannot be waited for: one that is not has to be found.
            with contextlib.suppress(Exception):
                peer = (self.rank + step) % self.world_size
                self.group.recv([torch.empty(1)], peer, 0x5AFE).wait(timedelta(milliseconds=1))

    def destroy(self) -> None:
        """Take the group down; it need not be whole any more."""
        with contextlib.suppress(Exception):  # also when all of the process's groups are gone
            for table, entry in self._entries:
                table[self.group] = entry
            dist.destroy_process_group(self.group)
        for table, _ in self._entries:
            table.pop(self.group, None)


def _not_made(missing: Sequence[int], timeout_s: float) -> str:
    if not missing:
        return "the process group of a loss could not be made, though all ranks are there."
    return (
        f"{ranks_in_words(missing)} did not come within {timeout_s:g} s to make the process group "
        "of a loss: every rank of group= calls compile_loss, equally often and in the same order."
    )


@contextlib.contextmanager
def _named(members: Sequence[int], backend: str) -> Iterator[Callable[[], list[int]]]:
    """While it is entered, a new group has a name that all members give it, and no one used before.

    Gives what says which of the members, by their place, have not come so far.

    Members that have made the same groups count alike, also after all groups were taken down and
    made again in the same store, where what earlier ones left would be mistaken for their peers.
    """
    default, store = c10d._get_default_group(), c10d._get_default_store()
    digest = hashlib.sha256("_".join(map(str, members)).encode()).hexdigest()[:16]
    rank, prefix = dist.get_rank(), f"cl_compiler/{digest}/{backend}"
    counter = f"{prefix}/made by {rank}"
    name = f"{prefix}/{store.add(counter, 1)}"
    came = {member: f"{name}/came {member}" for member in members}
    store.set(came[rank], "")

    def missing() -> list[int]:
        return [place for place, key in enumerate(came.values()) if not store.check([key])]

    plain, device = c10d._process_group_name, default.bound_device_id
    before = {key: os.environ.get(key) for key in NCCL_ENVIRONMENT}
    c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    # Splitting the communicator of all ranks would take all ranks.
    default.bound_device_id = None
    os.environ.update(NCCL_ENVIRONMENT)
    try:
        yield missing
    except BaseException:
        with contextlib.suppress(Exception):
            store.add(counter, -1)  # there is no such group: who tries again counts it again
        raise
    finally:
        c10d._process_group_name = plain
        default.bound_device_id = device
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


__all__ = ["NCCL_ENVIRONMENT", "WATCHDOG_S", "OwnGroup"]
