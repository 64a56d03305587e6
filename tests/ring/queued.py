"""What ranks do in ``test_streams.py``: post calls, and wait for none of them, as on streams."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cl_compiler.runtime import group_loss
from cl_compiler.runtime.streams import Posted
from tests.ring.ranks import acting_at, compiled, shards

TIMEOUT_S = 2.0


class Queued:
    """A call of Gloo whose ``wait()`` returns at once; a thread is the stream that waits for it."""

    def __init__(self, work: Any) -> None:
        self._work, self._error = work, ""
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = str(error)
        self._ended.set()

    def is_completed(self) -> bool:
        return self._ended.is_set()

    def wait(self) -> None:
        if self._ended.is_set() and self._error:
            raise RuntimeError(self._error)


def on_streams(loss_fn: Any) -> None:
    """From now on, what this rank posts is only queued."""
    ranks = loss_fn.ranks
    ranks._posted = Posted(ranks.timeout_s, torch.device("cpu"))
    ranks._watch.look = ranks._posted.look_from_thread
    plain = group_loss.guarded_ring

    def ring_of(module: Any, *args: Any) -> Any:
        ring = plain(module, *args)
        exchange = module.Ring.exchange

        def queued(*tensors_and_peers: Any) -> list[Queued]:
            with ring.ranks.watched(), ring.ranks.registered():
                works = [Queued(w) for w in exchange(ring, *tensors_and_peers)]
            ring.ranks.expect(works)
            return works

        ring.exchange = queued
        return ring

    group_loss.guarded_ring = ring_of


def die(rank: int, victim: int, how: str, marker: str) -> float:
    """``victim`` gets a signal in a pass whose messages the others only queue."""

    def action() -> None:
        Path(marker).write_text(str(time.time()))
        os.kill(os.getpid(), signal.Signals[how])

    x, y = shards(rank)
    compiled()(x, y, logit_scale=10.0).backward()  # code is compiled
    loss_fn = compiled(TIMEOUT_S)
    on_streams(loss_fn)
    if rank == victim:
        acting_at(1, action)
    loss_fn(x, y, logit_scale=10.0).backward()
    return time.time()


def woken(rank: int) -> float:
    """Seconds that rank 2 waits for rank 1, which is well, once its thread breaks the group up.

    What joins it to the next rank, rank 0, is closed already.
    """
    control = compiled().ranks.control
    if rank == 0:
        control.break_up()
    time.sleep(0.5)
    began = time.monotonic()
    if rank == 2:
        waiting = control.group.recv([torch.empty(1)], 1, 7)
        threading.Timer(0.1, control.break_up).start()
        with contextlib.suppress(RuntimeError):
            waiting.wait(timedelta(seconds=4))
    return time.monotonic() - began


def run_out_of_memory(rank: int, victim: int) -> tuple[str, float, float]:
    """``victim`` has an error in the middle of a backward, and catches it.

    Returns every rank's error, after how long, and what ``woken`` says.
    """

    def action() -> None:
        raise MemoryError("no room for a tile")

    loss_fn = compiled()
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()
    woken_after_s = woken(rank)
    if rank == victim:
        acting_at(5, action)  # the fifth of seven: in the backward
    dist.barrier()
    began = time.time()
    try:
        loss_fn(x, y, logit_scale=10.0).backward()
    except Exception as error:
        text, seconds = f"{type(error).__name__}: {error}", time.time() - began
        time.sleep(3.0)  # this process does not end, nor does what it keeps
        return text, seconds, woken_after_s
    return "", 0.0, 0.0
