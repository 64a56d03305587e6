"""Figures of a results file: time, memory, and the fraction of the device's best product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from cl_compiler.cli.results import OURS, Line, Results
from cl_compiler.errors import ArgumentError
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["FIGURES", "draw"]

FIGURES = ("time", "memory", "ceiling")
_INK = "#7d838c"  # legible on white and on near-black
_STYLE: dict[Any, Any] = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
}
_OURS = "#2a7de1"
_OTHERS = ("#d9731a", "#3a9d5d", "#9467bd", "#c44e52", "#8c7a5b", "#17a2b8", "#b5b83a", "#e377c2")


@dataclass(frozen=True)
class _Kind:
    """What a figure shows; without ``units`` it is a fraction, on a linear scale."""

    name: str
    label: str
    value: Callable[[Line], float | None]
    units: Callable[[float], str] | None = None
    base: int = 10


def draw(
    runs: Sequence[Results], folder: Path, name: str, wanted: Sequence[str] = FIGURES
) -> list[Path]:
    """Write the figures that a file's runs have data for; returns their paths.

    Raises:
        ArgumentError: the folder cannot be written.
    """
    lines = [line for results in runs for line in results.lines]
    shown = [line for line in lines if line.seconds and line.provider != "gemm"]
    shown = [n for n in shown if n.is_step or not n.provider.startswith(("ours:", "triton:"))]
    kinds: tuple[_Kind, ...] = (
        _Kind("time", "forward and backward", lambda line: line.seconds, format_seconds, 10),
        _Kind("memory", "peak beyond the inputs", lambda line: line.live_bytes, _size, 2),
        _Kind("ceiling", "fraction of the best matrix product", lambda line: line.ceiling),
    )
    about = "\n".join(f"{r.device}: {r.about}" for r in runs if r.lines)
    found = []
    for kind in kinds:
        own = [line for line in shown if kind.value(line)]
        if own and kind.name in wanted:
            path = folder / f"{name}-{kind.name}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _figure(own, kind, about, path)
            except OSError as error:
                raise ArgumentError(
                    f"cannot write {path}: {error.strerror}; name another folder with --out"
                ) from error
            found.append(path)
    return found


def _size(count: float) -> str:
    return format_bytes(int(count))


def _figure(lines: Sequence[Line], kind: _Kind, about: str, path: Path) -> None:
    """One group of points for each size, sizes of one loss beside each other."""
    losses = list(dict.fromkeys(line.loss for line in lines))
    ordered = sorted(lines, key=lambda line: losses.index(line.loss))
    keys = list(dict.fromkeys(line.key for line in ordered))
    colours = _colours(lines)
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(6.5, 1.5 + 0.8 * len(keys)), 4.6), layout="constrained")
        axes: Axes = figure.subplots()
        step = 0.7 / len(colours)
        for index, (name, colour) in enumerate(colours.items()):
            own = [line for line in lines if line.provider == name]
            at = [keys.index(line.key) + (index - (len(colours) - 1) / 2) * step for line in own]
            style: dict[str, Any] = {"marker": "o", "linestyle": "", "color": colour}
            style |= {"label": name, "markersize": 7 if name in OURS else 5}
            axes.plot(at, [kind.value(line) or 0.0 for line in own], **style)
        sizes = {line.key: line.size.replace(" ", "\n") for line in lines}
        axes.set_xticks(range(len(keys)), [sizes[key] for key in keys], fontsize=7)
        axes.set_xlim(-0.5, len(keys) - 0.5)
        _scale(axes, kind)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center",
                      ncols=min(6, len(colours)))  # fmt: skip
        figure.supxlabel(about, fontsize=7)
        figure.savefig(path, dpi=150, transparent=True)


def _scale(axes: Axes, kind: _Kind) -> None:
    axes.set_ylabel(kind.label)
    axes.grid(axis="y", alpha=0.25)
    for position in range(round(axes.get_xlim()[1])):
        axes.axvline(position + 0.5, color=_INK, linewidth=0.5, alpha=0.3)
    units = kind.units
    if units is None:
        axes.axhline(1, color=_INK, linestyle=":", linewidth=1)
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log", base=kind.base)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _colours(lines: Sequence[Line]) -> dict[str, str]:
    names = list(dict.fromkeys(line.provider for line in lines))
    others = [n for n in names if n not in OURS]
    found = {n: _OTHERS[i % len(_OTHERS)] for i, n in enumerate(others)}
    return {n: found.get(n, _OURS) for n in names}
