"""The command line of ``python -m benchmarks.gpu``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import LOSSES, PROVIDERS, SECTIONS, is_provider, items_of

__all__ = ["asked", "parse"]


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
        help="of every case these, as far as they apply; broken:… fail on purpose",
    )
    add(
        "--budget-seconds",
        type=float,
        default=480.0,
        help="what the run takes at most, tables and figures included (default 480)",
    )
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
        help="new results file; default benchmarks/results/<device>-<date>.json, a dry run's "
        "dry-run-…, each with a number if there is one",
    )
    add("--resume", type=Path, default=None, help="go on with a results file that is not complete")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda",
        help="cpu is a dry run and implies --quick; without a GPU nothing else runs",
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
    unknown = [n for n in options.providers or () if not is_provider(n)]
    if unknown:
        known = ", ".join(f"{n}[:{v}]" if v else n for n, v in PROVIDERS.items())
        known = known.replace(PROVIDERS["triton"], "ROWSxCOLUMNS")
        parser.error(f"--providers {' '.join(unknown)}: not known; there are {known}")
    options.out = options.resume or options.out
    options.quick = options.quick or options.device == "cpu"
    if not items_of(**asked(options)):
        parser.error("--only, --losses and --providers leave nothing to measure; drop one of them")
    return options


def asked(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``items_of``."""
    return {name: getattr(options, name) for name in ("only", "losses", "providers", "quick")}
