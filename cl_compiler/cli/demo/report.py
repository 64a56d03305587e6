"""Show an outcome: a table for the terminal, ``report.html`` and ``results.json`` for later.

The page is one file: its figures are embedded and it loads nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path

from rich.table import Table

from cl_compiler.cli.demo.comparison import Row, verdict
from cl_compiler.cli.demo.outcome import Outcome, to_json
from cl_compiler.cli.demo.training import within_epochs
from cl_compiler.errors import ArgumentError
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["caveats", "prepare_folder", "render_page", "result_table", "write_report"]

_TEMPLATE = "report.html.jinja"


def result_table(outcome: Outcome) -> Table:
    """The comparisons, a line per arm, for a terminal."""
    table = Table(
        title="Finding code from its description, held-out modules",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),  # 80 columns, for a pipe
        pad_edge=False,
    )
    for heading in _HEADINGS:
        is_text = heading in ("compared at", "loss")
        table.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    for cells in _cells(outcome):
        table.add_row(*cells)
    return table


def caveats(outcome: Outcome) -> list[str]:
    """What a reader has to know before believing the table; one sentence each."""
    compiled, dense = outcome.arm("compiled"), outcome.arm("dense")
    notes = [
        f"The {arm.name} loss was measured to exceed the budget: "
        f"{format_bytes(arm.measured_bytes)} of {format_bytes(outcome.budget_bytes)}."
        for arm in outcome.arms
        if arm.measured_bytes > outcome.budget_bytes
    ]
    notes += [verdict(comparison) for comparison in outcome.comparisons]
    if outcome.ended == "interrupted":
        notes.append("The run was interrupted: this is what was done until then.")
    if outcome.ended == "out of time":
        notes.append("The time limit ended the run: this is what was done until then.")
    if outcome.epochs < outcome.epochs_asked:
        notes.append(
            f"This machine had time for {outcome.epochs} of {outcome.epochs_asked} epochs."
        )
    if outcome.chosen:
        rates = ", ".join(f"{run.arm} {run.rate:g}" for run in outcome.chosen)
        notes.append(f"Learning rates, chosen on validation modules: {rates}.")
    if not all(run.is_complete for run in outcome.runs):
        notes.append("Some learning rates were cut short and were not chosen where others ended.")
    edges = (min(outcome.rates), max(outcome.rates))
    for run in outcome.chosen:
        if len(outcome.rates) > 1 and run.rate in edges:
            notes.append(
                f"The {run.arm} arm chose the outermost rate {run.rate:g}: "
                "a rate beyond the three might do better."
            )
    notes.append(
        f"Before training, shared words alone give recall@1 {outcome.untrained.recall_at_1:.1%} "
        f"and recall@10 {outcome.untrained.recall_at_10:.1%} to both."
    )
    notes.append(
        f"An epoch is {outcome.data.train_pairs / compiled.batch:.1f} steps for the compiled arm "
        f"(batch {compiled.batch:,}) and {outcome.data.train_pairs / dense.batch:.1f} for the "
        f"dense one (batch {dense.batch:,}); a pair meets as many others as its batch holds, so "
        "the compiled arm computes more per epoch."
    )
    notes.append(
        f"One seed, one data set of {outcome.data.train_pairs:,} training pairs; ± is one standard "
        f"error over {outcome.data.test_modules} held-out modules."
    )
    return notes


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` before the work begins, so that a run cannot end without a place to write.

    Raises:
        ArgumentError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as obstacle:
        raise ArgumentError(
            f"cannot write the report into {folder}: {obstacle.strerror}; "
            "name another folder with --out"
        ) from obstacle


def write_report(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``results.json``; each is replaced whole."""
    page, results = folder / "report.html", folder / "results.json"
    _replace(results, json.dumps(to_json(outcome), indent=1) + "\n")
    _replace(page, render_page(outcome))
    return page, results


def render_page(outcome: Outcome) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    from cl_compiler.cli.demo.figures import memory_figure, recall_figure

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    compiled, dense = outcome.arm("compiled"), outcome.arm("dense")
    recall = (
        recall_figure(outcome.runs, outcome.chosen, outcome.untrained.recall_at_10)
        if outcome.runs
        else ""
    )
    dense_full_bytes = next(
        (point.dense_bytes for point in outcome.memory if point.batch == compiled.batch), 0
    )
    return environment.from_string(source).render(
        ended=outcome.ended,
        headline=_headline(outcome, dense_full_bytes),
        headings=_HEADINGS,
        rows=_cells(outcome),
        notes=caveats(outcome),
        recall_figure=_image(recall),
        memory_figure=_image(memory_figure(outcome.memory, dense.batch, outcome.budget_bytes)),
        memory_rows=[
            (
                f"{point.batch:,}",
                format_bytes(point.dense_bytes),
                format_bytes(point.compiled_predicted_bytes),
                format_bytes(point.compiled_measured_bytes),
            )
            for point in outcome.memory
        ],
        rate_rows=_rate_rows(outcome),
        plan=compiled.explanation,
        source_path=compiled.source_path,
        data=outcome.data,
        dim=outcome.dim,
        seed=outcome.seed,
        rates=", ".join(f"{rate:g}" for rate in outcome.rates),
        budget=format_bytes(outcome.budget_bytes),
        times=[(what, format_seconds(value)) for what, value in outcome.seconds_by_part],
        machine=outcome.machine,
    )


_HEADINGS = (
    "compared at",
    "loss",
    "batch",
    "peak",
    "epochs",
    "seconds",
    "recall@1",
    "recall@10",
    "median",
)


def _cells(outcome: Outcome) -> list[tuple[str, ...]]:
    return [
        _line(outcome, comparison.what if row is comparison.compiled else "", row)
        for comparison in outcome.comparisons
        for row in (comparison.compiled, comparison.dense)
    ]


def _line(outcome: Outcome, what: str, row: Row) -> tuple[str, ...]:
    arm = outcome.arm(row.arm)
    return (
        what,
        "compiled" if row.arm == "compiled" else "PyTorch",
        f"{arm.batch:,}",
        format_bytes(arm.measured_bytes),
        f"{row.spent_epochs:.1f}",
        f"{row.spent_s:.1f}",
        f"{row.test.recall_at_1:.1%}",
        f"{row.test.recall_at_10:.1%}",
        f"{row.test.median_rank:g}",
    )


def _headline(outcome: Outcome, dense_full_bytes: int) -> str:
    compiled, dense = outcome.arm("compiled"), outcome.arm("dense")
    return (
        f"Under a budget of {format_bytes(outcome.budget_bytes)}, the compiled CLIP loss ran at a "
        f"batch of {compiled.batch:,} and peaked at {format_bytes(compiled.measured_bytes)}. Plain "
        f"PyTorch fits up to {dense.batch:,}; at {compiled.batch:,} it would need "
        f"{format_bytes(dense_full_bytes)}."
    )


def _rate_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for run in outcome.runs:
        last = run.evaluations[-1]
        within = within_epochs(run.evaluations, outcome.epochs)
        score = max(each.valid.mean_reciprocal_rank for each in within)
        rows.append(
            (
                run.arm,
                f"{run.rate:g}",
                f"{last.epochs:.1f}",
                f"{last.steps:,}",
                f"{last.seconds:.1f}",
                f"{score:.3f}",
                "chosen" if any(run is other for other in outcome.chosen) else "",
            )
        )
    return rows


def _image(svg: str) -> str:
    """A data URI; an image of its own keeps the identifiers of two figures apart."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode() if svg else ""


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp's 0600 would keep a web server from showing it
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
