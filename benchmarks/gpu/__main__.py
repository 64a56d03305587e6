"""``python -m benchmarks.gpu``: the device's limits, every provider's errors, time and memory.

Results go to ``benchmarks/results/<device>-<date>.json`` as they are measured; figures go beside
it, and a table comes last.  ``--resume FILE`` goes on where a run ended.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from benchmarks.gpu.options import parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 if nothing could be measured, 2 if it could not begin, 130 if it was interrupted.
    """
    options = parse(arguments)
    if options.worker:
        _obey_supervisor(int(options.worker.rpartition("-")[2]))
        from benchmarks.gpu.worker import work

        gc.freeze()  # modules stay: collections between turns need not look at them
        return work(options)
    from benchmarks.gpu.supervisor import INTERRUPTED, supervise
    from cl_compiler.cli.compare import show
    from cl_compiler.errors import ArgumentError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        path, why = supervise(options)
        if path is not None:
            show([path], path.parent)
    except ArgumentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if why:
        print(f"ended early: {why}", file=sys.stderr)
    if why == INTERRUPTED:
        return 130
    return 0 if why in ("", "the time budget is spent") else 1


def _obey_supervisor(pid: int) -> None:
    """Leave Ctrl-C to the supervisor, and let Linux end this process with it.

    So a killed run leaves nothing.  For a process of its own, before it takes seconds to import
    PyTorch: it is not taken back.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != pid:  # it died before it could be asked for
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
