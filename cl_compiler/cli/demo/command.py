"""`cl-compiler demo`: the command line of the demonstration, and the run from harvest to report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cl_compiler.cli.demo.collection import Collection, collect
from cl_compiler.cli.demo.screen import Screen
from cl_compiler.cli.demo.settings import QUICK, DemoSettings
from cl_compiler.cli.demo.sources import SourceRoot, installed_roots
from cl_compiler.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from cl_compiler.cli.demo.arms import PlanLoss

__all__ = ["INTERRUPTED", "demo", "run_demo"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report SIGINT."""

_FULL = DemoSettings(out=Path("cl-compiler-demo"))


def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = _FULL.out,
    batch: Annotated[
        int | None, typer.Option(min=8, help=f"Batch of the compiled loss.  [{_FULL.batch}]")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Memory that either loss may allocate, such as 64MiB.  "
            f"[{format_bytes(_FULL.budget_bytes)}]"
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Time for training, all learning rates of both losses together.  "
            f"[{_FULL.seconds:g}]",
        ),
    ] = None,
    dim: Annotated[
        int | None, typer.Option(min=8, help=f"Width of the embeddings.  [{_FULL.dim}]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and shuffles.")] = _FULL.seed,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A few hundred pairs in a few seconds; numbers mean nothing."),
    ] = False,
) -> None:
    """Learn to find code from its description: a large batch in a small memory budget.

    Pairs of docstrings and code come from the Python sources installed here.  Two encoders learn
    with the compiled CLIP loss and with plain PyTorch: first at the same batch, then at the
    largest batch that plain PyTorch fits into the same memory.
    """
    base = QUICK if quick else _FULL
    settings = replace(
        base,
        out=out,
        batch=base.batch if batch is None else batch,
        budget_bytes=base.budget_bytes if budget is None else parse_bytes(budget),
        seconds=base.seconds if seconds is None else seconds,
        dim=base.dim if dim is None else dim,
        seed=seed,
    )
    code = run_demo(settings)
    if code:
        raise typer.Exit(code)


def run_demo(
    settings: DemoSettings,
    *,
    console: Console | None = None,
    cache_directory: Path | None = None,
    roots: Sequence[SourceRoot] | None = None,
    plan: PlanLoss | None = None,
) -> int:
    """Harvest, train with both losses, compare, write the report.

    Args:
        settings: what to run.
        console: where progress and the table go; standard output where None.
        cache_directory: keeps the harvested pairs; ``demo`` in the cache's folder where None.
        roots: what to harvest; what is installed where None.
        plan: makes the compiled loss; ``arms.plan_loss`` where None.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        ArgumentError: the folder cannot be written, or there are too few pairs for the batch.
        BudgetError: the compiled loss does not fit the budget at this batch.
    """
    # Imported here, like PyTorch further down: a command line has to start at once.
    from cl_compiler.cache.store import cache_root
    from cl_compiler.cli.demo.report import (
        caveats,
        headline,
        prepare_folder,
        result_table,
        same_batch_table,
        write_report,
    )

    console = Console() if console is None else console
    screen = Screen(console)
    is_new = prepare_folder(settings.out)
    directory = cache_root() / "demo" if cache_directory is None else cache_directory
    started = time.perf_counter()
    try:
        collection = _harvest(
            settings, directory, installed_roots() if roots is None else roots, screen
        )
        harvest_s = time.perf_counter() - started
        from cl_compiler.cli.demo.arms import plan_loss
        from cl_compiler.cli.demo.experiment import conduct

        outcome = conduct(settings, collection, harvest_s, screen, plan or plan_loss)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            if is_new and not any(settings.out.iterdir()):
                settings.out.rmdir()
        screen.say(
            "Interrupted before there was anything to report; nothing was left half-written. "
            "Run the same command again: pairs once harvested are kept."
        )
        return INTERRUPTED
    screen.say("")
    screen.say(headline(outcome))
    screen.say("")
    if outcome.same_batch:
        console.print(same_batch_table(outcome.same_batch))
        screen.say("")
    if outcome.comparisons:
        console.print(result_table(outcome))
        screen.say("")
    for note in caveats(outcome):
        screen.say(f"- {note}")
    page, results = write_report(outcome, settings.out)
    screen.say(f"Report: {page}\nNumbers: {results}")
    if outcome.ended == "interrupted":
        screen.say("Run the same command again for the whole comparison; the pairs are kept.")
        return INTERRUPTED
    return 0


def _harvest(
    settings: DemoSettings, directory: Path, roots: Sequence[SourceRoot], screen: Screen
) -> Collection:
    what = "Reading installed sources"
    with screen.bar(what) as advance:
        collection = collect(
            roots,
            directory,
            max_files=settings.max_files,
            progress=lambda done, total: advance(what, done, total),
        )
    where = f"kept in {collection.path}" if collection.path else "not kept"
    screen.say(f"{len(collection.pairs):,} pairs of description and code, {where}")
    return collection
