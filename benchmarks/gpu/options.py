"""The command line of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.cases import LOSSES, SECTIONS

__all__ = ["parse"]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is wrong with it ends the program with a message."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes, seconds: shows that it runs, no more")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections")
    add("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="of contests")
    add(
        "--providers",
        nargs="+",
        default=None,
        help="of every case only these; broken:raise, :memory, :exit, :hang fail on purpose",
    )
    add("--budget-seconds", type=float, default=480.0, help="stop cleanly after so long")
    add(
        "--provider-seconds",
        type=float,
        default=90.0,
        help="a provider that takes longer for one step is ended and counts as failed",
    )
    add(
        "--out",
        type=Path,
        default=None,
        help="results file; default benchmarks/results/<device>-<date>.json",
    )
    add("--resume", type=Path, default=None, help="go on with a results file that is not complete")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default=None,
        help="default: the GPU if there is one; cpu is a dry run and implies --quick",
    )
    add(
        "--wheels",
        type=Path,
        default=None,
        help="folder of peers' wheels, where there is no network (fetch_peer_wheels.sh)",
    )
    add("--commit", default="", help="recorded where there is no git repository")
    # How the supervisor starts the process that measures.
    add("--worker", default="", metavar="RUN", help=argparse.SUPPRESS)
    add("--deadline", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.resume is not None and not options.resume.exists():
        parser.error(f"--resume {options.resume}: no such file")
    if options.resume is not None and options.out not in (None, options.resume):
        parser.error("--resume goes on with its own file; leave --out away")
    if options.wheels is not None and not sorted(options.wheels.glob("*.whl")):
        parser.error(f"--wheels {options.wheels}: no wheels there; run fetch_peer_wheels.sh first")
    if min(options.budget_seconds, options.provider_seconds) <= 0:
        parser.error("--budget-seconds and --provider-seconds must be positive")
    options.out = options.resume or options.out
    options.quick = options.quick or options.device == "cpu"
    return options
