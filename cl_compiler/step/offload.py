"""Where a step's tensors wait: on the device, or in host memory beside it, and the way between.

A batch, its embeddings and their cached gradients are needed chunk by chunk; only the loss wants
all embeddings at once.  So they can wait on the host: a ``Link`` begins the copy of the next chunk
while the present one is encoded, and a ``Room`` keeps rows that come and go.  Where host and device
are one memory (a CPU), everything stays where it is and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError
from cl_compiler.step.inputs import mapped

__all__ = ["PARTS", "Link", "Pending", "Room", "RowsHere", "StreamLink", "ahead"]
__all__ += ["fetched", "link_to", "parts"]

PARTS = ("inputs", "gradients", "embeddings")
"""What can wait on the host, in the order in which it costs time."""

T = TypeVar("T")
S = TypeVar("S")


class Pending:
    """A tensor on its way to the device."""

    def get(self) -> Tensor:
        """It, for operators that are launched from now on."""
        raise NotImplementedError


class Room(Protocol):
    """Rows [n, …] that are kept on the host."""

    def put(self, start: int, rows: Tensor) -> None:
        """Begin to copy ``rows`` from the device to where they belong."""

    def begin(self, start: int, stop: int) -> Pending:
        """Begin to copy rows to the device."""


class Link:
    """The way between a device and its host where both are one memory: nothing moves."""

    separate = False

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return True

    def begin(self, tensor: Tensor) -> Pending:
        """Begin to copy a tensor to the device; one that is there stays."""
        return _Here(tensor)

    def room(self, like: Tensor, rows: int) -> Room:
        """Room for ``rows`` rows of the kind of ``like`` [any, …]."""
        return RowsHere(like.new_empty((rows, *like.shape[1:])))


@dataclass(frozen=True)
class _Here(Pending):
    tensor: Tensor

    def get(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class RowsHere:
    """A tensor on the device as a ``Room``."""

    kept: Tensor

    def put(self, start: int, rows: Tensor) -> None:
        self.kept[start : start + len(rows)] = rows

    def begin(self, start: int, stop: int) -> Pending:
        return _Here(self.kept[start:stop])


class StreamLink(Link):
    """The way to an accelerator: copies in a stream of their own, through pinned memory.

    Args:
        device: with an index.
    """

    separate = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = torch.Stream(device)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.device == self.device

    def begin(self, tensor: Tensor) -> Pending:
        """Begin to copy; only from pinned memory does the copy run beside the encoder."""
        if self.holds(tensor):
            return _Here(tensor)
        with self.copies:
            moved = tensor.to(self.device, non_blocking=True)
        return _Moving(moved, self.copies.record_event())

    def room(self, like: Tensor, rows: int) -> Room:
        """Pinned host memory."""
        size = (rows, *like.shape[1:])
        return _PinnedRoom(torch.empty(size, dtype=like.dtype, pin_memory=True), self)


@dataclass(frozen=True)
class _Moving(Pending):
    tensor: Tensor
    arrival: Any

    def get(self) -> Tensor:
        now = torch.accelerator.current_stream(self.tensor.device)
        now.wait_event(self.arrival)
        self.tensor.record_stream(now)
        return self.tensor


@dataclass(frozen=True)
class _PinnedRoom:
    kept: Tensor
    link: StreamLink

    def put(self, start: int, rows: Tensor) -> None:
        copies = self.link.copies
        copies.wait_stream(torch.accelerator.current_stream(self.link.device))
        with copies:
            self.kept[start : start + len(rows)].copy_(rows, non_blocking=True)
        rows.record_stream(copies)

    def begin(self, start: int, stop: int) -> Pending:
        return self.link.begin(self.kept[start:stop])  # the stream keeps the order of copies


def link_to(device: torch.device | str | None) -> Link:
    """The way to a device; None: everything is where it belongs."""
    if device is None or torch.device(device).type in ("cpu", "meta"):
        return Link()
    found = torch.device(device)
    if found.index is None:
        found = torch.device(found.type, torch.accelerator.current_device_index())
    return StreamLink(found)


def parts(offload: Collection[str]) -> frozenset[str]:
    """What is to wait on the host.

    Raises:
        ArgumentError: something that cannot.
    """
    given = {offload} if isinstance(offload, str) else set(offload)
    if given - set(PARTS):
        raise ArgumentError(
            f"offload={offload!r}: what can wait in host memory is any of {', '.join(PARTS)}."
        )
    return frozenset(given)


def fetched(value: Any, link: Link) -> Callable[[], Any]:
    """Begin to copy every tensor of a chunk to the device; call the result to have the chunk."""
    if not link.separate:
        return lambda: value
    moving = mapped(value, Tensor, link.begin)
    return lambda: mapped(moving, Pending, lambda pending: pending.get())


def ahead(items: Iterable[S], begin: Callable[[S], T]) -> Iterator[T]:
    """Begin each item one step before it is wanted."""
    waiting: list[T] = []
    for item in items:
        waiting.append(begin(item))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
