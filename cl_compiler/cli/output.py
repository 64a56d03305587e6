"""What commands print: tables and highlighted code in a terminal, plain text in a pipe.

Results go to stdout; progress and warnings to stderr, so that a pipe holds results only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import typer

from cl_compiler.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "Table",
    "bytes_or_dash",
    "drawn_table",
    "in_options",
    "working",
    "write",
    "write_code",
    "write_json",
    "write_report",
    "write_table",
]


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text; ``numbers`` are columns that align to the right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()


_PYTHON = (
    (re.compile(r"\bmemory_budget="), "--budget "),
    (re.compile(r"\bProblem\((\w+)=([^)]*)\)"), r"--\1 \2"),
    (re.compile(r"\b(problem|precision|schedule|positives)='?([^\s',.;:]*)'?"), r"--\1 \2"),
)


def in_options(text: str) -> str:
    """A message of the compiler with its arguments called as the command line calls them."""
    for pattern, words in _PYTHON:
        text = pattern.sub(words, text)
    return text


def bytes_or_dash(count: int | None) -> str:
    """Bytes with a unit, "-" where nobody measured."""
    return "-" if count is None else format_bytes(count)


def write(text: str = "") -> None:
    """A line, or several."""
    typer.echo(text)


def write_json(value: Any) -> None:
    """A value for other programs: sorted keys, so that equal values print equal text."""
    typer.echo(json.dumps(value, indent=2, sort_keys=True, allow_nan=False))


def write_table(table: Table) -> None:
    """A table: drawn and folded to the window in a terminal, aligned columns otherwise."""
    if not sys.stdout.isatty():
        typer.echo("\n".join(_plain(table)))
        return
    from rich.console import Console

    console = Console()
    if table.title:
        console.print(table.title, style="bold", markup=False, highlight=False, soft_wrap=True)
    drawn = drawn_table(table, console.width)
    if drawn is None:
        typer.echo("\n".join(_plain(replace(table, title=""))))
    else:
        console.print(drawn)


def drawn_table(table: Table, width: int) -> RichTable | None:
    """The table for a terminal: words fold, numbers and what a row begins with do not.

    None where the window is too narrow for that.
    """
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    whole = {0, *table.numbers}
    cells = [max([0, *map(len, column)]) for column in zip(*table.rows, strict=True)]
    cells = cells or [0] * len(table.columns)
    least = [
        max(cell, *map(len, name.split())) if index in whole else 8
        for index, (name, cell) in enumerate(zip(table.columns, cells, strict=True))
    ]
    lines = 2 * len(table.columns) + 1
    if sum(least) + lines > width:
        return None
    natural = sum(max(cell, len(n)) for n, cell in zip(table.columns, cells, strict=True))
    narrow = natural + lines > width
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(table.columns):
        justify: Literal["left", "right"] = "right" if index in table.numbers else "left"
        fixed = index in whole
        head = name.replace(" ", "\n") if narrow and fixed else name
        drawn.add_column(
            head, justify=justify, no_wrap=fixed, min_width=least[index], overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _plain(table: Table) -> Iterator[str]:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    if table.title:
        yield table.title
    for line in lines:
        cells = [
            cell.rjust(width) if i in table.numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
    yield ""


def write_report(text: str) -> None:
    """Text in sections whose titles are not indented: set off in a terminal, else as it is.

    What it says of the compiler's arguments is said of options (``in_options``).
    """
    text = in_options(text)
    if not sys.stdout.isatty():
        typer.echo(text, nl=not text.endswith("\n"))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for line in text.splitlines():
        is_title = bool(line) and not line.startswith((" ", "-"))
        console.print(Text(line, style="bold" if is_title else ""), soft_wrap=True)


def write_code(text: str, language: str) -> None:
    """Source or a diff: highlighted in a terminal, byte for byte otherwise."""
    if not sys.stdout.isatty():
        typer.echo(text, nl=not text.endswith("\n"))
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, language, word_wrap=True, background_color="default"))


@contextmanager
def working(what: str, steps: Sequence[str] = ()) -> Iterator[Any]:
    """A progress bar on stderr while something takes long, if anybody is there to see it.

    Args:
        what: shown beside the bar.
        steps: what is done one after the other; none for work of unknown length.

    Yields:
        A function to call when the next step starts.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=len(steps) or None)
        waiting = iter(steps)
        started = False

        def advance() -> None:
            nonlocal started
            progress.update(
                task, description=f"{what}: {next(waiting, 'done')}", advance=int(started)
            )
            started = True

        yield advance
