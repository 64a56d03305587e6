"""Real ranks: forked from a server that has imported PyTorch, killed at a time limit of their own.

``launch(function, world_size, …)`` calls ``function(rank, *args)`` in every process, inside a Gloo
process group.  Nothing waits longer than its ``seconds``: what is still running then is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.links import Place

SECONDS = 60.0
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "tests.ring.preload"])


@dataclass(frozen=True)
class Outcome:
    """What became of a rank: its result, or its error; ``at`` is when (``time.time()``)."""

    result: Any = None
    error: str = ""
    at: float = 0.0
    ended: bool = True

    def needed(self) -> Any:
        """The result of a rank that must not fail."""
        assert self.ended and not self.error, self.error or "killed at the time limit, or gone"
        return self.result


def launch(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    seconds: float = SECONDS,
    store: str = "file",
    places: Sequence[Place] = (),
) -> list[Outcome]:
    """Every rank's outcome.  ``store``: ranks meet in a file, or in a server of rank 0 ("tcp").

    ``places``: network namespaces that the ranks live in; left out, they share a loopback device.

    A rank that is stopped is not waited for once the others are back.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/rendezvous"
        if store == "tcp":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        ends = [_context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            _context.Process(
                target=_run,
                args=(
                    function,
                    rank,
                    world_size,
                    where,
                    ends[rank][1],
                    args,
                    *places[rank : rank + 1],
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for _, sending in ends:
            sending.close()
        outcomes = [Outcome(ended=False)] * world_size
        open_ends: dict[Connection, int] = {end: rank for rank, (end, _) in enumerate(ends)}
        limit = time.monotonic() + seconds
        try:
            while (
                any(_is_running(ranks[r]) for r in open_ends.values())
                and (left := limit - time.monotonic()) > 0
            ):
                for end in wait(list(open_ends), timeout=min(left, 0.5)):
                    assert isinstance(end, Connection)
                    rank = open_ends.pop(end)
                    with contextlib.suppress(EOFError):
                        outcomes[rank] = Outcome(*end.recv())
        finally:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.join(10.0)
        return outcomes


def _is_running(rank: BaseProcess) -> bool:
    """Not over, nor stopped."""
    try:
        return Path(f"/proc/{rank.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T"
    except OSError:
        return False


def _run(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    where: str,
    end: Connection,
    args: tuple[Any, ...],
    place: Place | None = None,
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if place is not None:
        place.enter()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=where,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=SECONDS),
        )
        result = function(rank, *args)
        end.send((result, "", time.time()))
    except BaseException as error:
        end.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}", time.time()))
        sys.excepthook(*sys.exc_info())  # as in a script that nobody forked
    end.close()
    os._exit(0)  # whatever threads are left


__all__ = ["SECONDS", "Outcome", "launch"]
