"""What ranks do in the tests of failures: draw shards, call a loss, misbehave."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cl_compiler import compile_loss
from cl_compiler.errors import GroupError
from cl_compiler.lang.ring import BOTH_WAYS, CANONICAL, HALF_RING
from cl_compiler.runtime import group_loss

TIMEOUT_S = 2.0
"""Of groups in which a rank is stopped."""


def shards(rank: int, rows: int = 20, width: int = 8, **kinds: Any) -> tuple[torch.Tensor, ...]:
    """x and y of one rank, different on each; both need gradients."""
    generator = torch.Generator().manual_seed(100 + rank)
    pair = (torch.randn(rows, width, generator=generator) for _ in range(2))
    return tuple(torch.nn.functional.normalize(t, dim=1).to(**kinds).requires_grad_() for t in pair)


def compiled(timeout_s: float = 20.0, **options: Any) -> Any:
    """The shipped symmetric loss on all ranks; ring_owner unless told otherwise."""
    options = {"schedule": "ring_owner", "memory_budget": "16MiB", **options}
    budget = options.pop("memory_budget")
    group = options.pop("group", dist.group.WORLD)
    return compile_loss("xeon-amx-2c", budget, group=group, timeout_s=timeout_s, **options)


def acting_at(step: int, action: Callable[[], None]) -> None:
    """Do something before this rank's ``step``-th post of shards, forward and backward together."""
    plain, count = group_loss.guarded_ring, itertools.count()

    def ring_of(*args: Any) -> Any:
        ring = plain(*args)

        def counting(post: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*tensors_and_peers: Any) -> Any:
                if next(count) == step:
                    action()
                return post(*tensors_and_peers)

            return counted

        for name in ("exchange", "gather", "swap", "spread"):  # a file has one or two of them
            if hasattr(ring, name):
                setattr(ring, name, counting(getattr(ring, name)))
        return ring

    group_loss.guarded_ring = ring_of


def die(
    rank: int, victim: int, step: int, how: str, marker: str, schedule: str = "ring_owner"
) -> float:
    """``victim`` gets a signal at a post; the others must raise.  Returns when it happened."""

    def action() -> None:
        Path(marker).write_text(str(time.time()))
        os.kill(os.getpid(), signal.Signals[how])

    one_set = schedule == HALF_RING
    loss = "nt_xent" if one_set else "clip"
    operands = shards(rank, 256 if schedule == CANONICAL else 20)[: 1 if one_set else 2]
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    asked = {"schedule": schedule}
    if schedule == CANONICAL:  # which is asked for in another way
        asked = {"schedule": "auto", "deterministic": CANONICAL}
    loss_fn = compiled(loss=loss, **asked)
    if how == "SIGSTOP":  # code is compiled before ranks have little time
        loss_fn(*operands, logit_scale=10.0).backward()
        loss_fn = compiled(TIMEOUT_S, loss=loss, **asked)
    loss_fn(*operands, logit_scale=10.0).backward()  # connections exist, code is compiled
    assert loss_fn.plan.cluster.schedule == schedule
    if rank == victim:
        acting_at(step, action)
    for _ in range(2):  # who has all that it needs from a rank that dies sees it in the next call
        loss_fn(*operands, logit_scale=10.0).backward()
    return time.time()


def die_along(rank: int, victim: int, step: int, schedule: str, marker: str) -> float:
    """As ``die``, killed while shards travel in another way."""
    return die(rank, victim, step, "SIGKILL", marker, schedule)


def die_unconnected(rank: int, victim: int, marker: str) -> None:
    """``victim`` is killed before it makes the second group of the first call; the others wait."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    loss_fn = compiled(schedule=BOTH_WAYS)
    if rank == victim:
        connect = loss_fn.ranks.connect

        def die_first(*args: object) -> None:
            Path(marker).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
            connect(*args)

        loss_fn.ranks.connect = die_first
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0)


def send_slowly(rank: int) -> tuple[str, float]:
    """A call over links of which one is slow: the error, and after how long."""
    loss_fn = compiled(TIMEOUT_S, memory_budget="64MiB")
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()  # small messages pass
    wide = compiled(TIMEOUT_S, memory_budget="64MiB")
    wide(*shards(rank, 4, 1024), logit_scale=10.0)  # compiled
    began = time.time()
    try:
        wide(*shards(rank, 1024, 1024), logit_scale=10.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.time() - began
    return "", time.time() - began


AFTERMATH_S = 4.0
"""How long a rank goes on after an exception that it catches: longer than the others may wait."""


def raise_instead(rank: int, victim: int, told: str, marker: str) -> None:
    """``victim`` fails between two calls, on its own account.

    ``told``: "" (the exception ends the process), "by hand" (``fail``) or "guarded"; the process
    then catches it, and goes on for a while.
    """
    loss_fn = compiled()
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()
    if rank == victim:
        time.sleep(0.5)  # the others wait by now
        Path(marker).write_text(str(time.time()))
        try:
            with loss_fn.ranks.guarded() if told == "guarded" else contextlib.nullcontext():
                raise ValueError("the data loader broke")
        except ValueError as error:
            if not told:
                raise
            if told == "by hand":
                loss_fn.ranks.fail(error)
        with contextlib.suppress(GroupError):  # this rank has left, too
            loss_fn(x, y, logit_scale=10.0)
            raise AssertionError("the group goes on without its other ranks")
        time.sleep(AFTERMATH_S)
        return
    loss_fn(x, y, logit_scale=10.0).backward()


def out_of_step(rank: int) -> list[str]:
    """A backward twice on rank 1, a forward that rank 1 skips, a loss that it does not compile.

    Returns what the errors say, and after how many seconds.
    """
    texts = []
    loss_fn = compiled(TIMEOUT_S)
    x, y = shards(rank)
    value = loss_fn(x, y, logit_scale=10.0)
    value.backward(retain_graph=True)
    try:
        if rank == 1:
            value.backward()
        else:
            loss_fn(x, y, logit_scale=10.0)
    except Exception as error:
        texts.append(f"{type(error).__name__}: {error}")
    if rank == 1:
        time.sleep(2 * (TIMEOUT_S + 1.5))
        return texts
    for step in (lambda: loss_fn(x, y, logit_scale=10.0), lambda: compiled(TIMEOUT_S)):
        began = time.time()
        try:
            step()
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
            texts.append(str(time.time() - began))
    return texts


def closed(rank: int) -> str:
    """Rank 1 closes its loss, stays, and rank 0 calls it: what rank 0 is told."""
    loss_fn = compiled(TIMEOUT_S)
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()
    if rank == 1:
        loss_fn.close()
        time.sleep(2.0)
        return ""
    try:
        loss_fn(x, y, logit_scale=10.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told_by_one(rank: int) -> list[str]:
    """Rank 1 fails beside the loss, while rank 0 waits; rank 2 calls later: who is told what."""
    loss_fn = compiled()
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()
    said = []
    if rank == 1:
        time.sleep(0.5)  # rank 0 waits by now
        with contextlib.suppress(RuntimeError), loss_fn.ranks.guarded():
            raise RuntimeError("my data is bad")
    if rank == 2:
        time.sleep(1.5)
    for _ in range(2):
        try:
            loss_fn(x, y, logit_scale=10.0)
        except GroupError as error:
            said.append(str(error))
    time.sleep(2.0 if rank == 1 else 0.0)  # it is there, and has said why
    loss_fn.close()
    loss_fn.close()
    return said


def disagreements(rank: int) -> dict[str, tuple[str, float]]:
    """Rank 1 differs from the others, in one way after the other: every rank's error and seconds.

    The group goes on afterwards: what was wrong was seen before anything was sent.
    """
    odd, found = rank == 1, {}
    loss_fn = compiled()

    def attempt(name: str, call: Callable[[], Any]) -> None:
        began = time.time()
        try:
            call()
            found[name] = ("", 0.0)
        except Exception as error:
            found[name] = (f"{type(error).__name__}: {error}", time.time() - began)

    x, y = shards(rank)
    wide = shards(rank, width=12 if odd else 8)

    def guarded_call() -> None:  # what all ranks raise alike fails none of them
        with loss_fn.ranks.guarded():
            loss_fn(*wide, logit_scale=10.0)

    attempt("width", guarded_call)
    double = shards(rank, dtype=torch.float64 if odd else torch.float32)
    attempt("dtype", lambda: loss_fn(*double, logit_scale=10.0))
    attempt("scale", lambda: loss_fn(x, y, logit_scale=11.0 if odd else 10.0))
    number = x.detach().long() if odd else x
    attempt("integers", lambda: loss_fn(number, y, logit_scale=10.0))
    attempt("needs", lambda: loss_fn(x.detach() if odd else x, y, logit_scale=10.0))

    @loss_fn.ranks.guarded()
    def wrong_call() -> None:
        loss_fn(x, y[:3] if odd else y, logit_scale=10.0)

    attempt("arguments", wrong_call)
    ids = {} if odd else {"row_ids": torch.arange(20), "col_ids": torch.arange(20)}
    attempt("ids", lambda: loss_fn(x, y, logit_scale=10.0, **ids))
    attempt("empty", lambda: loss_fn(x[:0], y[:0], logit_scale=10.0))
    divided = 20 if odd else 40
    attempt("factor", lambda: (loss_fn(x, y, logit_scale=10.0) / divided).backward())
    attempt("fine", lambda: loss_fn(x, y, logit_scale=10.0).backward())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    squared = lambda: loss_fn(x, y, logit_scale=10.0) ** 2  # noqa: E731
    attempt("scaled", lambda: scaler.scale(squared()).backward())
    other = compiled(loss="infonce" if odd else "clip")
    attempt("loss", lambda: other(x, y, logit_scale=10.0))
    other = compiled(loss="nt_xent" if odd else "clip")
    attempt("operands", lambda: other(x, y, logit_scale=10.0))
    other = compiled(memory_budget="32MiB" if odd else "16MiB")
    attempt("budget", lambda: other(x, y, logit_scale=10.0))
    other = compiled(problem="60x8" if odd else None)
    attempt("problem", lambda: other(x, y, logit_scale=10.0))
    other = compiled(schedule="ring_travel" if odd else "ring_owner")
    attempt("plan", lambda: other(x, y, logit_scale=10.0))
    other = compiled(grad_convention="sum" if odd else "mean")
    attempt("convention", lambda: other(x, y, logit_scale=10.0))
    finite = compiled(nonfinite="error")
    bad = x.detach().clone()
    if odd:
        bad[3, 2] = float("nan")
    attempt("nonfinite", lambda: finite(bad, y.detach(), logit_scale=10.0))
    value = float(loss_fn(bad, y.detach(), logit_scale=10.0))
    found["propagate"] = (str(value), 0.0)
    return found


@dataclass(frozen=True)
class Held:
    """What a process holds: open files, threads, resident memory, and storages of live tensors.

    Tensors are those that were made since ``gc.freeze()``.
    """

    descriptors: int
    threads: int
    resident_bytes: int
    storages: int
    storage_bytes: int


def held() -> Held:
    """What this process holds now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # freed memory goes back, where that exists
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(storages),
        sum(storages.values()),
    )


CYCLE_ROWS, CYCLE_WIDTH = 512, 1024
"""Of a shard in a cycle: 2 MiB, as much as a chunk that is received."""


def again_and_again(rank: int, cycles: int, folder: str) -> list[Held]:
    """Make a group and take it down, or forget it: what is held after each cycle.

    With a ``folder``, to meet in, all groups of the process are taken down and made anew.
    """
    forgotten = compiled()
    watched = weakref.ref(forgotten.ranks)
    del forgotten
    gc.collect()
    assert watched() is None
    assert "cl_compiler watch" not in {thread.name for thread in threading.enumerate()}
    found, closed, ranks = [], [], dist.get_world_size()
    x, y = shards(rank, CYCLE_ROWS, CYCLE_WIDTH)
    gc.freeze()  # what was imported is not looked at in every cycle
    for cycle in range(cycles):
        if folder:
            dist.destroy_process_group()
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/{cycle}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=20),
            )
        schedule = ("ring_owner", BOTH_WAYS)[cycle % 2]  # with one group of processes, and with two
        loss_fn = compiled(memory_budget="64MiB", schedule=schedule)
        loss_fn(x, y, logit_scale=10.0).backward()
        assert loss_fn.plan.cluster.chunk == CYCLE_ROWS
        loss_fn.close()
        closed.append(loss_fn)
        del loss_fn
        x.grad = y.grad = None
        dist.barrier()
        found.append(held())
    dist.destroy_process_group()
    return found
