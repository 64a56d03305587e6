"""Ranks that end as scripts do: ``python -m tests.ring.ending folder`` (``test_failures.py``).

They are forked from a process that has imported PyTorch, and unlike other tests' ranks run to the
end of their interpreter.  One is killed; the others let the error pass.  Printed are what became of
them, as JSON: exit codes and what they wrote.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

import tests.ring.preload  # noqa: F401
from cl_compiler.runtime.watch import Watch
from tests.ring.ranks import compiled, shards

RANKS, VICTIM, LIMIT_S = 3, 1, 90.0


def look_again_and_again(watch: Watch) -> None:
    """The thread is inside of the store most of the time."""
    for _ in range(1000):
        watch.store.check(["never said"])


class Lasting:
    """Makes the end of an interpreter last long enough for a thread to come back into it."""

    def __del__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        sleep(0.3)


lasting = None


def survive(rank: int, folder: str) -> None:
    """Until the error: nothing is closed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=LIMIT_S),
    )
    loss_fn = compiled()
    x, y = shards(rank)
    loss_fn(x, y, logit_scale=10.0).backward()
    if rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    global lasting
    lasting = Lasting()
    Watch._look = look_again_and_again  # type: ignore[method-assign]
    loss_fn(x, y, logit_scale=10.0).backward()


def main(folder: str) -> None:
    children: dict[int, int] = {}
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            written = os.open(f"{folder}/{rank}", os.O_CREAT | os.O_WRONLY, 0o600)
            os.dup2(written, 2)
            survive(rank, folder)
            return
        children[rank] = child
    codes: dict[int, int] = {}
    limit = time.monotonic() + LIMIT_S
    while len(codes) < RANKS and time.monotonic() < limit:
        time.sleep(0.05)
        for rank, child in children.items():
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
    for rank in children.keys() - codes.keys():
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
    written = {rank: Path(folder, str(rank)).read_text()[-20000:] for rank in children}
    print(json.dumps([[codes.get(rank), written[rank]] for rank in children]))


if __name__ == "__main__":
    main(sys.argv[1])
