"""The figures of the report, as SVG that reads on a light and on a dark page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from cl_compiler.cli.demo.arms import MemoryPoint
from cl_compiler.cli.demo.same_batch import SameBatch
from cl_compiler.cli.demo.training import Run
from cl_compiler.units import format_bytes

__all__ = ["memory_figure", "recall_figure", "same_batch_figure"]

_COLOURS = {"compiled": "#2a7de1", "dense": "#d9731a"}
_INK = "#7d838c"  # legible on white and on near-black
_STYLE: dict[Any, Any] = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "font.size": 10,
    "svg.hashsalt": "cl-compiler-demo",  # the same data give the same bytes
}


def same_batch_figure(same: SameBatch) -> str:
    """Training loss over steps and over seconds, both losses at the same batch."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.4), layout="constrained")
        by_step, by_second = figure.subplots(1, 2, sharey=True)
        steps = range(1, same.steps + 1)
        for name, side, style in (
            ("dense", same.dense, {"marker": "o", "markersize": 11, "fillstyle": "none"}),
            ("compiled", same.compiled, {"marker": "o", "markersize": 4}),
        ):
            looks: dict[str, Any] = {"color": _COLOURS[name], "linewidth": 1.6, **style}
            by_step.plot(
                steps, side.losses, label=f"{name}, {format_bytes(side.peak_bytes)}", **looks
            )
            by_second.plot([side.step_s * step for step in steps], side.losses, **looks)
        by_step.set_xlabel("optimiser steps")
        by_second.set_xlabel("seconds, at the median of a step")
        by_second.set_xlim(left=0)
        by_step.set_ylabel(f"training loss, batch {same.batch:,}")
        by_step.legend()
        return _svg(figure)


def recall_figure(runs: Sequence[Run], untrained_recall: float) -> str:
    """Recall@10 on the test modules over seconds and epochs; chosen runs drawn heavily."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for run in runs:
            for axes, name in zip(panels, ("seconds", "epochs"), strict=True):
                axes.plot(
                    [getattr(each, name) for each in run.evaluations],
                    [each.test.recall_at_10 for each in run.evaluations],
                    color=_COLOURS[run.arm],
                    linewidth=2.2 if run.is_chosen else 0.9,
                    alpha=1.0 if run.is_chosen else 0.35,
                    marker="o" if run.is_chosen else None,
                    markersize=3,
                    label=f"{run.arm}, rate {run.rate:.2g}" if run.is_chosen else None,
                )
        for axes, label in zip(panels, ("seconds of training", "epochs"), strict=True):
            axes.axhline(untrained_recall, color=_INK, linestyle=":", label="before training")
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[0].set_ylabel("recall@10, held-out modules")
        panels[0].legend(loc="lower right")
        return _svg(figure)


def memory_figure(points: Sequence[MemoryPoint], dense_batch: int, budget_bytes: int) -> str:
    """Bytes over batch size: the dense loss, the compiled one as predicted and as measured."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes: Axes = figure.subplots()
        batches = [point.batch for point in points]
        axes.plot(
            batches,
            [point.dense_bytes for point in points],
            color=_COLOURS["dense"],
            marker="s",
            linewidth=2,
            label="dense PyTorch, counted",
        )
        axes.plot(
            batches,
            [point.compiled_predicted_bytes for point in points],
            color=_COLOURS["compiled"],
            linestyle="--",
            marker="x",
            label="compiled, predicted by its plan",
        )
        axes.plot(
            batches,
            [point.compiled_measured_bytes for point in points],
            color=_COLOURS["compiled"],
            marker="o",
            linewidth=2,
            label="compiled, measured",
        )
        axes.axhline(budget_bytes, color=_INK, linestyle=":", linewidth=1.5)
        axes.annotate(
            f"budget {format_bytes(budget_bytes)}",
            (batches[0], budget_bytes),
            xytext=(0, 4),
            textcoords="offset points",
        )
        axes.axvline(dense_batch, color=_COLOURS["dense"], linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))
        axes.set_xlabel("batch")
        axes.set_ylabel("peak bytes of the loss, forward and backward")
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0))
        return _svg(figure)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue().decode()
