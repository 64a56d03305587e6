"""``python -m benchmarks.cpu``: compiled losses against dense and chunked PyTorch on this CPU.

Options: see ``--help``.  Results go to ``benchmarks/results/cpu-<machine>-<date>.json``, a case at
a time, so that an interrupted run keeps what it has; a figure goes beside it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import GROUPS, Case, cases_of
from benchmarks.claims import check_claims
from benchmarks.measure import run_case, step_count, torch_threads
from benchmarks.plots import plot
from benchmarks.record import default_path, environment, load, merge, require_writable
from benchmarks.report import case_table, claim_table
from cl_compiler.cli.output import write, write_table
from cl_compiler.errors import ArgumentError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the number of providers that failed (skipped ones have not)."""
    options = _parse(arguments)
    cases = cases_of(
        options.threads,
        only=options.only,
        repeats=options.repeats,
        quick=options.quick,
        long=options.long,
    )
    path = options.out or default_path()
    try:
        load(path)
        require_writable(path)
    except ArgumentError as error:
        sys.exit(f"error: {error}")
    described = environment()
    done = []
    with _progress(sum(map(step_count, cases))) as advance:
        for case in cases:
            advance(case)
            entry = run_case(case, partial(advance, case))
            entry["environment"] = described
            done.append(entry)
            merge(path, [entry])
            gc.collect()
    content = merge(path, [])
    picture = path.with_suffix(".png")
    plot(content["cases"], picture)
    write_table(case_table(done))
    claims = check_claims(done)
    if claims and not options.quick:
        write_table(claim_table(claims))
    write(f"{path}\n{picture}")
    errors = [row["error"] for entry in done for row in entry["rows"].values() if row["error"]]
    return sum(not error.startswith("skipped: ") for error in errors)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny sizes, seconds: shows that it runs, no more")
    add("--long", action="store_true", help="also the longest: one thread at 16k, and 32k")
    add("--threads", type=int, nargs="+", default=None, help="default: 1 and all that PyTorch uses")
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of cases")
    add("--repeats", type=int, default=None, help="instead of each group's own number")
    add("--out", type=Path, default=None, help="results file")
    options = parser.parse_args(arguments)
    threads = options.threads or [1, torch_threads()]
    if min(threads) < 1:
        parser.error("--threads: at least 1")
    options.threads = sorted(set(threads))
    if options.repeats is not None and options.repeats < 1:
        parser.error("--repeats: at least 1")
    return options


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr in a terminal, a line per case elsewhere.

    Yields:
        A function of (case), when it starts, and (case, provider), when a step is done.
    """
    if not sys.stderr.isatty():

        def line(case: Case, name: str = "") -> None:
            if not name:
                print(case.key, file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(),
               TextColumn("{task.description}"))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def step(case: Case, name: str = "") -> None:
            bar.update(task, description=f"{case.key} {name}", advance=int(bool(name)))

        yield step


if __name__ == "__main__":
    gc.freeze()  # modules stay: collections between turns need not look at them
    sys.exit(min(main(), 1))
