"""What ``simulate`` found, drawn: a Gantt chart, and a page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cl_compiler.cli.output import Table
    from cl_compiler.plan.simulate import Run

__all__ = ["draw", "write_page"]

_COLOURS = {"compute": "#2f6ea5", "send": "#7fb069", "gradient": "#c0622b", "wait": "#d0d3d8"}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .8rem;text-align:left;"
    "border-bottom:1px solid #ddd}td.n,th.n{text-align:right}img{max-width:100%}"
)


def chart(run: Run, title: str) -> Figure:
    """A Gantt chart: two lines a rank, products and waiting above what it sends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = 1 + max((e.rank for e in run.events), default=0)
    figure = Figure(figsize=(10, 1.2 + 0.5 * ranks))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for what, colour in _COLOURS.items():
        bars = [e for e in run.events if e.what == what]
        lane = {"compute": 0.0, "wait": 0.0}.get(what, 0.45)
        axes.barh(
            [e.rank + lane for e in bars],
            [1e3 * (e.end_s - e.start_s) for e in bars],
            left=[1e3 * e.start_s for e in bars],
            height=0.4,
            color=colour,
            label=what,
        )
    axes.set(xlabel="ms", ylabel="rank", title=title)
    axes.invert_yaxis()
    axes.legend(loc="upper right", fontsize=7)
    return figure


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
        parts.append(f'<h2>{html.escape(name)}</h2><img alt="" src="data:image/png;base64,{data}">')
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
