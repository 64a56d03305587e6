"""Show an outcome: tables for the terminal, ``report.html`` and ``results.json`` for later.

The page is one file: its figures are embedded and it loads nothing.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal

from rich.table import Table

from cl_compiler.cli.demo.comparison import Row, verdict
from cl_compiler.cli.demo.outcome import Outcome, to_json
from cl_compiler.cli.demo.same_batch import SameBatch
from cl_compiler.cli.demo.training import best_evaluation
from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.busy import cores_here, is_busy
from cl_compiler.units import format_bytes, format_seconds

__all__ = [
    "caveats",
    "headline",
    "prepare_folder",
    "render_page",
    "result_table",
    "same_batch_table",
    "write_report",
]

_TEMPLATE = "report.html.jinja"


def headline(outcome: Outcome) -> str:
    """What holds whatever the data: batch, memory, time."""
    compiled, dense = outcome.arm("compiled"), outcome.arm("dense")
    full_bytes = next(
        (point.dense_bytes for point in outcome.memory if point.batch == compiled.batch), 0
    )
    said = (
        f"A batch of {compiled.batch:,} in {format_bytes(compiled.measured_bytes)}: plain PyTorch "
        f"needs {format_bytes(full_bytes)} for it, {full_bytes / compiled.measured_bytes:.0f} "
        f"times as much, and fits {dense.batch:,} into the budget of "
        f"{format_bytes(outcome.budget_bytes)}."
    )
    same = outcome.same_batch
    if same is None:
        return said
    ratio = same.dense.loss_s / same.compiled.loss_s
    pace = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times as slow"
    return (
        f"{said} At the same batch the compiled loss is {pace}, and {same.steps} training steps "
        f"gave the same losses to {same.largest_difference:.0e}."
    )


def same_batch_table(same: SameBatch) -> Table:
    """Both losses at the same batch, a line each, for a terminal."""
    return _table(f"Same batch: {same.batch:,}", _SAME_BATCH_HEADINGS, _same_batch_cells(same))


def result_table(outcome: Outcome) -> Table:
    """The comparisons in the same memory, a line per arm, for a terminal."""
    title = "Same memory: finding code from its description"
    return _table(title, _HEADINGS, _cells(outcome))


def caveats(outcome: Outcome) -> list[str]:
    """What a reader has to know before believing the tables; one sentence each."""
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
    same = outcome.same_batch
    foreign = None if same is None else same.foreign_cores
    if foreign is not None and is_busy(foreign):
        notes.append(
            f"Other processes kept {foreign:.1f} of {cores_here()} cores busy during the steps at "
            "the same batch, which slows the compiled loss more than the dense one: run it again "
            "when the machine is quiet, or with OMP_WAIT_POLICY=PASSIVE."
        )
    if outcome.no_same_batch:
        notes.append(f"The losses were not run at the same batch: {outcome.no_same_batch}.")
    notes.append(
        f"Recall is that of {outcome.data.test_pairs:,} functions in {outcome.data.test_modules} "
        "held-out modules; ± is one standard error over modules. Before training, shared words "
        f"alone give recall@10 {outcome.untrained.recall_at_10:.1%} to both."
    )
    chosen = [run for run in outcome.runs if run.is_chosen]
    if chosen:
        rates = ", ".join(f"{run.arm} {run.rate:.2g}" for run in chosen)
        count = sum(run.arm == chosen[0].arm for run in outcome.runs)
        notes.append(f"Learning rates, chosen of {count} each on validation modules: {rates}.")
        if count > 1 and all(
            run.rate == min(each.rate for each in outcome.runs if each.arm == run.arm)
            for run in chosen
        ):
            notes.append("Both losses did best at their lowest rate; a lower one might do better.")
    notes.append(
        f"An epoch is {outcome.data.train_pairs / compiled.batch:.1f} steps at a batch of "
        f"{compiled.batch:,} and {outcome.data.train_pairs / dense.batch:.1f} at {dense.batch:,}."
    )
    notes.append(
        "One seed, one data set. Whether a large batch learns more depends on data, encoders and "
        "budget; memory and time at the same batch do not."
    )
    return notes


def prepare_folder(folder: Path) -> bool:
    """Make ``folder`` before the work begins, so that a run cannot end without a place to write.

    Returns:
        Whether it was not there before.

    Raises:
        ArgumentError: it cannot be made or written.
    """
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as obstacle:
        raise ArgumentError(
            f"cannot write the report into {folder}: {obstacle.strerror}; "
            "name another folder with --out"
        ) from obstacle
    return is_new


def write_report(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``results.json``; each is replaced whole."""
    page, results = folder / "report.html", folder / "results.json"
    _replace(results, json.dumps(to_json(outcome), indent=1) + "\n")
    _replace(page, render_page(outcome))
    return page, results


def render_page(outcome: Outcome) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    from cl_compiler.cli.demo.figures import (
        memory_figure,
        recall_figure,
        same_batch_figure,
    )

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    compiled, dense = outcome.arm("compiled"), outcome.arm("dense")
    recall = recall_figure(outcome.runs, outcome.untrained.recall_at_10) if outcome.runs else ""
    same = outcome.same_batch
    return environment.from_string(source).render(
        ended=outcome.ended,
        headline=headline(outcome),
        same_batch=same,
        same_headings=_SAME_BATCH_HEADINGS,
        same_rows=_same_batch_cells(same) if same else (),
        same_figure=_image(same_batch_figure(same)) if same else "",
        headings=_HEADINGS,
        rows=_cells(outcome),
        notes=caveats(outcome),
        recall_figure=_image(recall),
        memory_figure=_image(memory_figure(outcome.memory, dense.batch, outcome.budget_bytes)),
        rate_rows=_rate_rows(outcome),
        plan=compiled.explanation,
        source_path=compiled.source_path,
        data=outcome.data,
        dim=outcome.dim,
        seed=outcome.seed,
        budget=format_bytes(outcome.budget_bytes),
        run_time=format_seconds(outcome.run_s),
        times=[(what, format_seconds(value)) for what, value in outcome.seconds_by_part],
        machine=outcome.machine,
    )


_SAME_BATCH_HEADINGS = (
    "loss",
    "memory",
    "s/step, loss",
    "s/step, all",
    "first loss",
    "last loss",
    "recall@10",
)

_HEADINGS = (
    "compared at",
    "loss",
    "batch",
    "memory",
    "epochs",
    "seconds",
    "recall@1",
    "recall@10",
    "median",
)


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),  # 80 columns, for a pipe
        pad_edge=False,
    )
    for heading in headings:
        justify: Literal["left", "right"] = (
            "left" if heading in ("loss", "compared at") else "right"
        )
        table.add_column(heading, justify=justify, no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def _same_batch_cells(same: SameBatch) -> list[tuple[str, ...]]:
    return [
        (
            name,
            format_bytes(side.peak_bytes),
            f"{side.loss_s:.3g}",
            f"{side.step_s:.3g}",
            f"{side.losses[0]:.5f}",
            f"{side.losses[-1]:.5f}",
            f"{side.test.recall_at_10:.1%}",
        )
        for name, side in (("compiled", same.compiled), ("PyTorch", same.dense))
    ]


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


def _rate_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for run in outcome.runs:
        last, best = run.evaluations[-1], best_evaluation(run.evaluations)
        rows.append(
            (
                run.arm,
                f"{run.rate:.2g}",
                f"{last.epochs:.1f}",
                f"{last.steps:,}",
                f"{last.seconds:.1f}",
                f"{best.valid.mean_reciprocal_rank:.3f}",
                f"{best.test.recall_at_10:.1%}",
                "chosen" if run.is_chosen else "" if run.is_complete else "cut short",
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
