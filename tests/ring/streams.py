"""CUDA streams that need no GPU: copies come as late, or as early, as the waits of a file allow.

Emitted files for GPUs copy shards out of host memory on a stream of their own.  Here such a copy is
held back, its destination full of NaN, until another stream waits for it; or it is made at once,
over whatever still uses the destination.  A file that is right in both ways waits where it must.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch


class Stream:
    """A stream of one thread, which stands for a rank; ``held``: copies that nobody waited for."""

    late = True
    waits = 0
    copies = 0

    def __init__(self, device: Any = None) -> None:
        self.held: list[Callable[[], Any]] = []

    def wait_stream(self, other: Stream) -> None:
        Stream.waits += 1
        other.synchronize()

    def synchronize(self) -> None:
        while self.held:
            self.held.pop(0)()


class _Current(threading.local):
    def __init__(self) -> None:
        self.stream = self.default = Stream()


def pretend(set_attribute: Callable[[Any, str, Any], Any], *, late: bool) -> Callable[..., None]:
    """Put such streams in place of PyTorch's; what is returned prepares an emitted file.

    ``set_attribute``: as ``setattr``; a monkeypatch's puts things back.
    """
    here = _Current()
    set_attribute(Stream, "late", late)
    set_attribute(Stream, "waits", 0)
    set_attribute(Stream, "copies", 0)

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        before, here.stream = here.stream, stream
        yield
        here.stream = before

    set_attribute(torch.cuda, "Stream", Stream)
    set_attribute(torch.cuda, "stream", entered)
    set_attribute(torch.cuda, "current_stream", lambda device=None: here.stream)
    set_attribute(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def prepare(module: ModuleType) -> None:
        plain = module._copied  # type: ignore[attr-defined]

        def copied(room: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            if here.stream is here.default or not Stream.late:
                return plain(room, rows)
            Stream.copies += 1
            part = room[: len(rows)].fill_(torch.nan)
            here.stream.held.append(lambda: part.copy_(rows))
            return part

        module._copied = copied  # type: ignore[attr-defined]

    return prepare
