"""Processes of a group: started together, waited for, and none of them left."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["run_processes"]


def run_processes(
    target: Callable[..., None], arguments: Sequence[tuple[Any, ...]], limit_s: float
) -> None:
    """Call ``target`` with each of the arguments in a process of its own.

    Raises:
        RuntimeError: a process failed, or all of them took longer than ``limit_s``.
    """
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=given, daemon=True) for given in arguments]
    for process in processes:
        process.start()
    limit = time.monotonic() + limit_s
    try:
        for process in processes:
            process.join(max(0.0, limit - time.monotonic()))
        if any(process.exitcode != 0 for process in processes):
            raise RuntimeError(
                f"{len(processes)} ranks: a process failed, or took over {limit_s:g} s"
            )
    finally:
        for process in processes:
            process.kill()
