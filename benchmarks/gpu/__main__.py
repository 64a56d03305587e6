"""``python -m benchmarks.gpu``: the device's limits, every provider's errors, time and memory.

Results go to ``benchmarks/results/<device>-<date>.json`` as they are measured; figures go beside
it, and a table comes last.  ``--resume FILE`` goes on where a run ended.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu.options import parse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 unless nothing could be measured, 130 if it was interrupted."""
    options = parse(arguments)
    if options.worker:
        from benchmarks.gpu.worker import obey_supervisor, work

        obey_supervisor()
        return work(options)
    from benchmarks.gpu.supervisor import INTERRUPTED, supervise
    from cl_compiler.cli.compare import show

    path, why = supervise(options)
    if path.exists():
        show([path], path.parent)
    if why:
        print(f"ended early: {why}", file=sys.stderr)
    if why == INTERRUPTED:
        return 130
    return 0 if why in ("", "the time budget is spent") else 1


if __name__ == "__main__":
    sys.exit(main())
