"""What ``simulate`` found, drawn: a Gantt chart, and a page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cl_compiler.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cl_compiler.cli.output import Table
    from cl_compiler.plan.clock import Event
    from cl_compiler.plan.simulate import Run

__all__ = ["GANTT_SUFFIXES", "draw", "write_page"]

GANTT_SUFFIXES = (".png", ".svg")
_KINDS = {
    "compute": ("#2f6ea5", "computing"),
    "send": ("#7fb069", "shards and totals"),
    "gradient": ("#c0622b", "gradients on their way back"),
    "statistics": ("#e3b23c", "statistics on their way back"),
    "copy": ("#8e6bb0", "host copies"),
    "wait": ("#d0d3d8", "waiting"),
}
"""Of each kind of event its colour, and what a legend calls it."""
_LANES = {"compute": (0.0, "device"), "wait": (0.0, "device"), "send": (0.45, "send")}
"""Of each kind its line, and the events that follow one another there; others have their own."""
_HEIGHT = 0.4
"""Of a line, where ranks are 1 apart."""
_TOUCHING_S = 1e-12
"""Bars that overlap by less follow one another."""
_FIRST = 80
"""Of a run that is too long to be drawn, the events of a rank that are: told apart by eye."""
_PIXELS = 1200
"""Across a chart, about: narrower bars cannot be told apart."""
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:left;"
    "border-bottom:1px solid #ddd}td.n,th.n{text-align:right}img{max-width:100%}"
)


def chart(run: Run, title: str) -> Figure:
    """A Gantt chart: two lines a rank, computing and waiting above what it sends.

    What a rank sends at the same time shares its line's height.
    Of a run of more events than are kept, the first steps, and the title says so.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    events = first_steps(run)
    ranks = 1 + max((e.rank for e in events), default=0)
    figure = Figure(figsize=(10, 1.4 + 0.5 * ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    bars = legible(events)
    apart_s = 3 * max((e.end_s for e in events), default=0.0) / _PIXELS
    spans = heights(bars)
    for what, (colour, _) in _KINDS.items():
        of = [(e, span) for e, span in zip(bars, spans, strict=True) if e.what == what]
        corners = [
            [(1e3 * x, y) for x, y in zip(xs, (low, low, high, high), strict=True)]
            for e, (low, high) in of
            for xs in [(e.start_s, e.end_s, e.end_s, e.start_s)]
        ]
        # an edge, and no rounding to pixels: what is narrow is faint, and not gone; a white one
        # where there is room for it, between bars that follow one another
        edges = ["white" if e.end_s - e.start_s > apart_s else colour for e, _ in of]
        shape = PolyCollection(corners, facecolors=colour, edgecolors=edges, linewidths=0.3)
        shape.set_snap(False)
        axes.add_collection(shape)
    axes.autoscale_view()
    axes.set(xlabel="ms", ylabel="rank")
    axes.set_title("\n".join([title, *_cut_short(run, events)]), loc="left")
    axes.invert_yaxis()
    axes.set_yticks(range(ranks))
    drawn = {e.what for e in bars}
    legend = [Patch(color=c, label=name) for what, (c, name) in _KINDS.items() if what in drawn]
    # below the axis, where no title is so long that it runs into it
    figure.legend(
        handles=legend, ncols=len(legend), fontsize=7, loc="outside lower left", frameon=False
    )
    return figure


def heights(bars: Sequence[Event]) -> list[tuple[float, float]]:
    """Of each bar its lower and upper edge: where several of a rank's line overlap, a part each."""
    lines: dict[tuple[int, float], list[int]] = {}
    for index, event in enumerate(bars):
        top = event.rank + _LANES.get(event.what, (0.45, ""))[0] - _HEIGHT / 2
        lines.setdefault((event.rank, top), []).append(index)
    found = [(0.0, 0.0)] * len(bars)
    for (_, top), line in lines.items():
        ends: list[float] = []  # of the last bar in each part of the line
        part = {}
        for index in sorted(line, key=lambda k: bars[k].start_s):
            free = (k for k, end in enumerate(ends) if end <= bars[index].start_s + _TOUCHING_S)
            part[index] = next(free, len(ends))
            ends[part[index] : part[index] + 1] = [bars[index].end_s]
        each = _HEIGHT / len(ends)
        for index in line:
            found[index] = (top + part[index] * each, top + (part[index] + 1) * each)
    return found


def first_steps(run: Run) -> Sequence[Event]:
    """All events of a run; where they are not all kept, or cannot be, its first steps alone."""
    drawn_s = max((e.end_s for e in run.events), default=run.seconds)
    if drawn_s >= run.seconds or format_seconds(drawn_s) == format_seconds(run.seconds):
        return run.events  # or short of it by less than can be told
    until_s = max(e.end_s for e in [e for e in run.events if not e.rank][:_FIRST])
    return [e for e in run.events if e.end_s <= until_s]


def _cut_short(run: Run, events: Sequence[Event]) -> list[str]:
    """What of the run is drawn, where that is not all of it."""
    if len(events) == len(run.events):
        return []
    drawn_s = max(e.end_s for e in events)
    return [f"its first steps: {format_seconds(drawn_s)} of {format_seconds(run.seconds)}"]


def legible(events: Iterable[Event]) -> list[Event]:
    """Bars that can be told apart: of those that fit into a pixel together, one of each kind.

    It is as long as they are, so that a lane of narrow bars keeps its mixture.
    """
    lanes: dict[tuple[int, str], list[Event]] = {}
    for event in events:
        lane = _LANES.get(event.what, (0.45, event.what))[1]
        lanes.setdefault((event.rank, lane), []).append(event)
    pixel_s = max((e.end_s for line in lanes.values() for e in line), default=0.0) / _PIXELS
    found: list[Event] = []
    for line in lanes.values():
        group: list[Event] = []
        for event in sorted(line, key=lambda e: e.start_s):
            if group and event.end_s - group[0].start_s > pixel_s:
                found += _one_of_each(group)
                group = []
            group.append(event)
        found += _one_of_each(group)
    return found


def _one_of_each(group: Sequence[Event]) -> list[Event]:
    """Events of a lane, those of a kind joined, in the order in which they first began."""
    lengths: dict[str, float] = {}
    for event in group:
        lengths[event.what] = lengths.get(event.what, 0.0) + event.end_s - event.start_s
    end, start = max(e.end_s for e in group), group[0].start_s
    joined = []
    for what, length in lengths.items():
        until = min(start + length, end)
        joined.append(replace(group[0], what=what, start_s=start, end_s=until))
        start = until
    return joined


def draw(run: Run, title: str, path: Path) -> None:
    """Write the chart of a run to a .png or .svg."""
    chart(run, title).savefig(path, dpi=150, bbox_inches="tight")


def write_page(
    path: Path,
    title: str,
    tables: Sequence[Table],
    notes: Sequence[str],
    runs: Sequence[tuple[str, Run]],
) -> None:
    """Write one HTML file: tables, what is to be said about them, and a chart of every run."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [_table(table) for table in tables]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    for name, run in runs:
        image = io.BytesIO()
        chart(run, name).savefig(image, format="png", dpi=120, bbox_inches="tight")
        data = base64.b64encode(image.getvalue()).decode()
        title_of, alt = html.escape(name), f"Gantt chart of {html.escape(name)}"
        parts.append(f'<h2>{title_of}</h2><img alt="{alt}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n',
        encoding="utf-8",
    )


def _table(table: Table) -> str:
    def row(cells: Sequence[str], kind: str) -> str:
        texts = (
            f"<{kind}{' class=n' if k in table.numbers else ''}>{html.escape(cell)}</{kind}>"
            for k, cell in enumerate(cells)
        )
        return f"<tr>{''.join(texts)}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    caption = f"<h2>{html.escape(table.title.strip())}</h2>" if table.title.strip() else ""
    return f"{caption}<table>{row(table.columns, 'th')}{body}</table>"
