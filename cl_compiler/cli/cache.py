"""``cl-compiler cache``: what is in the cache of generated code, and making it smaller."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table
from cl_compiler.units import counted

if TYPE_CHECKING:
    from cl_compiler.cache import Removal

__all__ = ["app", "parse_age"]

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    help="List, verify, prune or clear the cache of generated code.",
)

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


@app.command("list")
def list_(json: opt.Json = False) -> None:
    """List what is in the cache, last used first."""
    from cl_compiler.cache import cache_root, list_entries
    from cl_compiler.units import format_bytes

    entries = list_entries()
    if json:
        described = [
            {
                "name": f"{entry.loss}-{entry.digest}",
                "loss": entry.loss,
                "hardware": entry.hardware,
                "fingerprint": entry.fingerprint,
                "bytes": entry.file_bytes,
                "created_unix_s": entry.created_unix_s,
                "last_used_unix_s": entry.last_used_unix_s,
                "path": str(entry.path / "kernels.py"),
            }
            for entry in entries
        ]
        write_json({"root": str(cache_root()), "entries": described})
        return
    now = time.time()
    rows = tuple(
        (
            f"{entry.loss}-{entry.digest}",
            entry.hardware,
            format_bytes(entry.file_bytes),
            _age(now - entry.last_used_unix_s),
            entry.fingerprint,
        )
        for entry in entries
    )
    total = format_bytes(sum(entry.file_bytes for entry in entries))
    if rows:
        columns = ("variant", "hardware", "size", "last used", "environment")
        write_table(Table("", columns, rows, frozenset({2, 3})))
    write(f"{counted(len(rows), 'variant')}, {total}, in {cache_root()}")


def _age(seconds: float) -> str:
    for unit, length in reversed(_SECONDS.items()):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"


@app.command()
def verify(json: opt.Json = False) -> None:
    """Check every file of every variant; exit code 1 if anything would not be executed."""
    from cl_compiler.cache import list_entries
    from cl_compiler.cache import verify as find_problems

    with working("verifying"):
        problems = find_problems()
        count = len(list_entries())
    if json:
        described = [{"path": str(p.path), "reason": p.reason} for p in problems]
        write_json({"variants": count, "problems": described})
    else:
        for problem in problems:
            write(f"{problem.path} {problem.reason}")
        write(f"{counted(count, 'variant')}, {counted(len(problems), 'problem')}")
    if problems:
        raise typer.Exit(1)


@app.command()
def prune(
    max_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-bytes", help="Keep the last used that fit into this much: 1GiB.",
            show_default=False,
        ),
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option(
            "--older-than", help="Remove what was not used for this long: 90m, 12h, 30d, 2w.",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:  # fmt: skip
    """Remove what killed processes left behind, and the variants that the options name.

    Without options, variants are kept as far as CL_COMPILER_CACHE_MAX_BYTES allows.
    """
    from cl_compiler.cache import max_cache_bytes
    from cl_compiler.cache import prune as remove
    from cl_compiler.cli.requests import reading
    from cl_compiler.units import parse_bytes

    with reading("--max-bytes"):
        limit = max_cache_bytes() if max_bytes is None else parse_bytes(max_bytes)
    age = None if older_than is None else parse_age(older_than)
    _report(remove(max_bytes=limit, older_than_s=age), json)


@app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: opt.Json = False,
) -> None:
    """Remove every variant; they are generated again when they are needed."""
    from cl_compiler.cache import cache_root, list_entries
    from cl_compiler.cache import clear as remove

    count = len(list_entries())
    if count and not yes:
        typer.confirm(
            f"remove {counted(count, 'variant')} from {cache_root()}?", abort=True, err=True
        )
    _report(remove(), json)


def _report(removal: Removal, json: bool) -> None:
    from cl_compiler.units import format_bytes

    if json:
        names = [f"{entry.loss}-{entry.digest}" for entry in removal.removed]
        kept = {"freed_bytes": removal.freed_bytes, "kept_bytes": removal.kept_bytes}
        write_json({"removed": names, **kept})
        return
    write(
        f"removed {counted(len(removal.removed), 'variant')}, {format_bytes(removal.freed_bytes)}; "
        f"{format_bytes(removal.kept_bytes)} left"
    )


def parse_age(text: str) -> float:
    """Seconds of "90m", "12h", "30d" or "2w".

    Raises:
        typer.BadParameter: the text is no duration.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if match is None:
        raise typer.BadParameter(f"--older-than {text!r}: write a number and s, m, h, d or w: 30d")
    return float(match[1]) * _SECONDS[match[2]]
