"""``cl-compiler bench --compare FILE…``: results files as tables, ratios, a verdict and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cl_compiler.cli.output import Table, bytes_or_dash, write, write_table
from cl_compiler.cli.results import Ceiling, Judged, Line, Results, read_results
from cl_compiler.units import format_flops, format_rate, format_seconds

__all__ = ["names_of", "ours_of", "rivals_of", "show", "tables_of"]

WORST_ERROR = 0.05
"""Relative error of a gradient above which a provider's time is not comparable; bf16 inputs give
0.2 to 2 %."""
SHOWN_KERNELS = 6


def show(paths: Sequence[Path], folder: Path | None = None) -> None:
    """Print every run's tables, what changed between files, and draw figures.

    Args:
        paths: results files.
        folder: for the figures; None draws none.

    Raises:
        ArgumentError: a file cannot be read or is no results file, or the folder cannot be written.
    """
    names = names_of(paths)
    found = dict(zip(names, map(read_results, paths), strict=True))
    for name, runs in found.items():
        for results in runs:
            write(f"{results.device or name}: {results.about}")
            for table in tables_of(results):
                write_table(table)
            if results.early:
                write(f"{results.path.name} ended early: {results.early}; go on with --resume")
    if len(found) > 1 and (changed := _between(found)).rows:
        write_table(changed)
    if folder is not None:
        from cl_compiler.cli.compare_plots import draw

        for name, runs in found.items():
            for picture in draw(runs, folder, name):
                write(str(picture))
    for path in paths:
        write(str(path))


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each file, with as many of its folders as tell it from the others."""
    parts = [path.resolve().with_suffix("").parts[1:] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{own[-1]}-{index}" for index, own in enumerate(parts, 1)]  # one of them twice


def tables_of(results: Results) -> Iterator[Table]:
    """Limits, correctness, speed and verdict, as far as the file has them."""
    if results.ceilings:
        yield _ceilings(results)
    if results.judged:
        yield _correctness(results.judged)
    if results.profiles:
        yield _kernels(results)
    if results.lines:
        yield _without_empty_columns(_speed(results))
        verdict = _verdict(results)
        if verdict.rows:
            yield verdict


def _ceilings(results: Results) -> Table:
    rows = []
    for c in results.ceilings:
        name = c.key.removeprefix("ceilings: ")
        rows.append((name, c.error or _rate(c), "" if c.error else f"{c.spread:.1%}"))
    return Table("Limits", ("what", "rate", "spread"), tuple(rows), frozenset({1, 2}))


def _rate(ceiling: Ceiling) -> str:
    match ceiling.unit:
        case "FLOP/s":
            return format_flops(ceiling.rate)
        case "B/s":
            return format_rate(ceiling.rate)
        case _:
            return f"{ceiling.rate:.3g} {ceiling.unit}"


def _correctness(judged: Sequence[Judged]) -> Table:
    rows: list[tuple[str, ...]] = []
    last = ""
    for j in judged:
        title, last = ("" if j.case == last else j.case), j.case
        if j.error:
            rows.append((title, j.provider, "", "", "", "", "", _short(j.error)))
            continue
        left = j.errors.get("d_x", j.errors.get("d_z"))
        cells = (j.errors.get("value"), left, j.errors.get("d_y"),
                 j.errors.get("d_logit_scale"), j.errors.get("d_logit_bias"))  # fmt: skip
        said = "the same bits twice" if j.repeats else ""
        rows.append((title, j.provider, *(_error(e) for e in cells), said))
    heads = ("errors against float64", "provider", "value", "dX", "dY", "dscale", "dbias", "")
    return Table("Correctness", heads, tuple(rows), frozenset(range(2, 7)))


def _short(error: str) -> str:
    """An error as far as a table has room for it; the file has all of it."""
    return error if len(error) <= 90 else f"{error[:89]}…"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _speed(results: Results) -> Table:
    rows: list[tuple[str, ...]] = []
    last = ""
    for line in results.lines:
        title, last = ("" if line.key == last else line.size), line.key
        name = line.provider + (f" ({line.note})" if line.note else "")
        if line.error or line.seconds is None:
            rows.append((title, name, *[""] * 8, _short(line.error) or "no time left"))
            continue
        ours = ours_of(results.lines, line.key)
        ratio = line.seconds / ours.seconds if ours and ours.seconds and line is not ours else None
        rows.append((
            title, name, _seconds(line.forward_s), _seconds(line.backward_s),
            format_seconds(line.seconds), "" if ratio is None else f"{ratio:.2f}",
            format_flops(line.flops / line.seconds) if line.flops else "",
            _share(line.ceiling), _share(line.same_width),
            bytes_or_dash(line.live_bytes),
            _caution(line),
        ))  # fmt: skip
    heads = ("speed", "provider", "forward", "backward", "both", "it/ours", "least work",
             "of best", "of K=D", "memory", "")  # fmt: skip
    return Table("Speed and memory beyond the inputs", heads, tuple(rows), frozenset(range(2, 10)))


def _without_empty_columns(table: Table) -> Table:
    """A CPU's file does not tell the forward from the backward, nor count the least work."""
    kept = [i for i, head in enumerate(table.columns) if not head or any(r[i] for r in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    numbers = frozenset(new for new, old in enumerate(kept) if old in table.numbers)
    return Table(table.title, tuple(table.columns[i] for i in kept), rows, numbers)


def _seconds(value: float | None) -> str:
    return "" if value is None else format_seconds(value)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _caution(line: Line) -> str:
    """What keeps a time from being taken at its face value."""
    said = []
    if line.worst_error is not None and line.worst_error > WORST_ERROR:
        said.append(f"gradients wrong by {line.worst_error:.0%}")
    if line.spread is not None and line.spread > 0.1:
        said.append(f"spread {line.spread:.0%}")
    return ", ".join(said)


def ours_of(lines: Sequence[Line], key: str) -> Line | None:
    """The compiled loss whose schedule the planner chose, else the fastest one.

    Of whole steps the one that keeps activations as the others do: caching buys memory with time.
    """
    found = [line for line in lines if line.key == key and line.is_ours and line.seconds]
    if any(line.is_step for line in found):
        return next((line for line in found if line.provider == "ours:uncached"), None)
    chosen = next((line for line in found if line.provider in ("ours", "compiled")), None)
    return chosen or min(found, key=lambda line: line.seconds or 0.0, default=None)


def _kernels(results: Results) -> Table:
    rows: list[tuple[str, ...]] = []
    for profile in results.profiles:
        title = (profile.size, profile.provider)
        total = sum(seconds for _, _, seconds in profile.kernels)
        for name, count, seconds in profile.kernels[:SHOWN_KERNELS]:
            cells = (str(count), format_seconds(seconds), f"{seconds / total:.0%}")
            rows.append((*title, *cells, _short(name)))
            title = ("", "")
        if profile.error:
            rows.append((*title, "", "", "", _short(profile.error)))
    heads = ("kernels", "provider", "calls", "time", "share", "")
    return Table("Where the time goes", heads, tuple(rows), frozenset({2, 3, 4}))


def rivals_of(lines: Sequence[Line], key: str) -> list[Line]:
    """Everybody else who computed the same thing: fastest first."""
    found = [
        line
        for line in lines
        if line.key == key and line.seconds and not line.is_ours and line.provider != "gemm"
        and (line.worst_error or 0.0) <= WORST_ERROR
    ]  # fmt: skip
    return sorted(found, key=lambda line: line.seconds or 0.0)


def _verdict(results: Results) -> Table:
    """For each size: the compiled loss beside the fastest and the leanest of the others."""
    rows = []
    for key in dict.fromkeys(line.key for line in results.lines):
        ours = ours_of(results.lines, key)
        others = rivals_of(results.lines, key)
        if not others:
            continue
        if ours is None or ours.seconds is None:
            size = next(line.size for line in results.lines if line.key == key)
            rows.append((size, "-", others[0].provider, "", "DID NOT RUN", "", "", ""))
            continue
        rival = others[0]
        ratio = (rival.seconds or 0.0) / ours.seconds
        lean = min(others, key=lambda line: line.live_bytes or float("inf"))
        rows.append((
            ours.size, format_seconds(ours.seconds), rival.provider, f"{ratio:.2f}",
            "ahead" if ratio >= 1 else "BEHIND", _memory(results.lines, ours),
            f"{bytes_or_dash(lean.live_bytes)} {lean.provider}",
            _promise(ours),
        ))  # fmt: skip
    heads = ("verdict", "ours", "fastest other", "it/ours", "", "memory", "leanest other",
             "promise")  # fmt: skip
    return Table("Verdict", heads, tuple(rows), frozenset({1, 3, 5}))


def _memory(lines: Sequence[Line], ours: Line) -> str:
    """Of ours; of a whole step also what it takes where nothing but chunks of activations stay."""
    cached = next((o for o in lines if (o.key, o.provider) == (ours.key, "ours")), None)
    beside = f", cached {bytes_or_dash(cached.live_bytes)}" if ours.is_step and cached else ""
    return bytes_or_dash(ours.live_bytes) + beside


def _promise(line: Line) -> str:
    if line.target is None or line.ceiling is None:
        return ""
    verdict = "met" if line.ceiling >= line.target else "MISSED"
    return f">= {line.target:.2f} of the best product: {line.ceiling:.2f}, {verdict}"


def _between(found: Mapping[str, Sequence[Results]]) -> Table:
    """The same measurements in several files: the first file's time, and others' over it."""
    names = list(found)
    ceilings = [[c for results in runs for c in results.ceilings] for runs in found.values()]
    lines = [[line for results in runs for line in results.lines] for runs in found.values()]
    rows = []
    for c in ceilings[0]:
        others = [next((o.rate for o in own if o.key == c.key), 0.0) for own in ceilings[1:]]
        if c.rate and any(others):
            ratios = [f"{c.rate / o:.3f}" if o else "-" for o in others]
            rows.append((c.key.removeprefix("ceilings: "), "library", "", *ratios))
    for line in lines[0]:
        same = [next((o for o in own if (o.key, o.provider) == (line.key, line.provider)), None)
                for own in lines[1:]]  # fmt: skip
        if line.seconds and any(o and o.seconds for o in same):
            ratios = [f"{o.seconds / line.seconds:.3f}" if o and o.seconds else "-" for o in same]
            rows.append((line.size, line.provider, format_seconds(line.seconds), *ratios))
    heads = ("between files, in time", "provider", names[0], *(f"{n} / it" for n in names[1:]))
    return Table("Between files", heads, tuple(rows), frozenset(range(2, 2 + len(names))))
