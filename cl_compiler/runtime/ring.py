"""Ranks as threads of one process: a ring that needs no network.

``LoopbackRing`` has the methods of the ``Ring`` that emitted files define, so the same files run on
it: for tests, and to try a loss on many ranks where there is one machine.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Post = Callable[[], None]
"""What was posted: calling it waits until it is done."""


class Hub:
    """What the ranks of one loopback group share.

    ``timeout_s``: how long a rank waits for another before it raises.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0) -> None:
        self.world_size, self.timeout_s = world_size, timeout_s
        every = itertools.product(range(world_size), range(world_size), (False, True))
        self.channels: dict[tuple[int, int, bool], queue.Queue[list[Tensor]]] = {
            channel: queue.Queue() for channel in every
        }
        self.barrier = threading.Barrier(world_size)
        self.board: list[Any] = [None] * world_size
        self.broken = threading.Event()

    def fail(self) -> None:
        """Make every rank that waits raise."""
        self.broken.set()
        self.barrier.abort()

    def receive(self, source: int, target: int, second: bool = False) -> list[Tensor]:
        """What ``source`` sent to ``target`` next, in one of two groups.

        Raises:
            TimeoutError: nothing came in time, or another rank failed.
        """
        waited = 0.0
        while not self.broken.is_set() and waited < self.timeout_s:
            try:
                return self.channels[source, target, second].get(timeout=0.05)
            except queue.Empty:
                waited += 0.05
        raise TimeoutError(f"rank {target} got nothing from rank {source}")

    def all_gather(self, rank: int, value: T) -> list[T]:
        """Every rank's value, in the order of ranks.

        Raises:
            threading.BrokenBarrierError: not every rank came in time.
        """
        self.board[rank] = value
        self.barrier.wait(self.timeout_s)
        result = list(self.board)
        self.barrier.wait(self.timeout_s)  # before the next call writes
        return result


class LoopbackRing:
    """One rank of a group of threads; see the ``Ring`` of an emitted file.

    ``posted_bytes``: what this rank has sent to others so far, numbers not counted.
    """

    def __init__(
        self,
        hub: Hub,
        rank: int,
        lengths: Mapping[str, Sequence[int]],
        shard_scale: float = 1.0,
        scalar_scale: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.hub, self.rank, self.world_size = hub, rank, hub.world_size
        self.lengths = {axis: tuple(n) for axis, n in lengths.items()}
        self.shard_scale, self.scalar_scale = shard_scale, scalar_scale
        self.device = torch.device(device)
        self.posted_bytes = 0
        self._expected: dict[tuple[int, bool], list[Sequence[Tensor]]] = {}

    def during(
        self, phase: str, factor: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Threads need no guard."""
        return contextlib.nullcontext()

    def settle(self) -> None:
        """Threads need no guard."""

    def wait(self, posted: Iterable[Post]) -> None:
        """Until everything that was posted is done."""
        for work in posted:
            work()

    def exchange(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        after: int,
        before: int,
        second: bool = False,
    ) -> list[Post]:
        """Post: tensors to rank ``after``, others from rank ``before``, in one of two groups."""
        self._send(sent, after, second)
        return [self._expect(before, received, second)]

    def gather(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Post]:
        """Post: every rank's ``sent`` into the parts of ``received`` [ranks, ...]."""
        return self._all_to_all([sent] * self.world_size, received)

    def swap(self, sent: Sequence[Tensor], received: Sequence[Tensor]) -> list[Post]:
        """Post: part p of ``sent`` [ranks, ...] to rank p, whose part for us is received."""
        return self._all_to_all([[t[p] for t in sent] for p in range(self.world_size)], received)

    def spread(self, owner: int, tensors: Sequence[Tensor]) -> list[Post]:
        """Post: the owner's tensors to every rank."""
        if owner != self.rank:
            return [self._expect(owner, tensors)]
        for other in range(self.world_size):
            if other != self.rank:
                self._send(tensors, other)
        return []

    def in_order(self, vector: Tensor, axis: str) -> Tensor:
        """A fp64 number of every chunk of an axis, of all ranks in their order."""
        return torch.cat(self.hub.all_gather(self.rank, vector.detach().clone()))

    def numbers(self, *numbers: float | Tensor) -> Tensor:
        """Numbers of every rank, in their order: [ranks, numbers] fp64."""
        own = [torch.as_tensor(n, dtype=torch.float64).detach().reshape(()) for n in numbers]
        return torch.stack(self.hub.all_gather(self.rank, torch.stack(own)))

    def total(self, *numbers: float | Tensor) -> Tensor:
        """The sum of a number over the ranks, [] fp64; or those of several, in one message."""
        totals = self.numbers(*numbers).sum(0)
        return totals if len(numbers) > 1 else totals[0]

    def largest(self, *vectors: Tensor) -> Tensor:
        """The largest element of every rank's vector, [] fp64; -inf where there is none."""
        found = (v.max() if v.numel() else v.new_tensor(-torch.inf) for v in vectors)
        largest = self.numbers(*found).amax(0)
        return largest if len(vectors) > 1 else largest[0]

    def agrees(self, condition: bool) -> bool:
        """Whether a condition holds on every rank."""
        return bool(self.numbers(float(condition)).all())

    def _send(self, tensors: Sequence[Tensor], target: int, second: bool = False) -> None:
        # Copied at once: a test that overwrites what is on its way would not notice otherwise.
        self.hub.channels[self.rank, target, second].put([t.detach().clone() for t in tensors])
        if target != self.rank:
            self.posted_bytes += sum(t.numel() * t.element_size() for t in tensors)

    def _expect(self, source: int, into: Sequence[Tensor], second: bool = False) -> Post:
        """Post a receive.  Messages match receives in the order of posting, not of waiting."""
        expected = self._expected.setdefault((source, second), [])
        expected.append(into)

        def done() -> None:
            while any(posted is into for posted in expected):
                self._receive(source, expected.pop(0), second)

        return done

    def _receive(self, source: int, into: Sequence[Tensor], second: bool) -> None:
        for tensor, came in zip(into, self.hub.receive(source, self.rank, second), strict=True):
            if tensor.shape != came.shape or tensor.dtype != came.dtype:
                raise ValueError(
                    f"rank {self.rank} expected {list(tensor.shape)} {tensor.dtype} from rank "
                    f"{source} and got {list(came.shape)} {came.dtype}"
                )
            tensor.copy_(came)

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], received: Sequence[Tensor]
    ) -> list[Post]:
        for target, tensors in enumerate(sent):
            self._send(tensors, target)

        return [self._expect(s, [t[s] for t in received]) for s in range(self.world_size)]


def run_ranks(
    world_size: int, function: Callable[[Hub, int], T], timeout_s: float = 60.0
) -> list[T]:
    """``function(hub, rank)`` in a thread per rank; their results in the order of ranks.

    Raises:
        The first error of any rank; the others are woken and end.
        TimeoutError: a rank waited longer than ``timeout_s`` for another.
    """
    hub = Hub(world_size, timeout_s)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(hub, rank)
        except BaseException as error:
            errors.append(error)
            hub.fail()

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * timeout_s + 1)
    if errors:  # those that another rank's error woke come last
        raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError | TimeoutError))
    if any(thread.is_alive() for thread in threads):
        raise TimeoutError(f"not every rank came back within {2 * timeout_s:g} s")
    return results


__all__ = ["Hub", "LoopbackRing", "run_ranks"]
