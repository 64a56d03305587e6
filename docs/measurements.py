"""Paste measured times and memory into the README, from a results file of ``benchmarks/``.

    python docs/measurements.py                                          # print the newest
    python docs/measurements.py --write [benchmarks/results/FILE.json]   # put it into README.md

A CPU's results and a GPU's have a place of their own in the README.

A test compares the README with the file that it names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_compiler.cli.compare import ours_of, rivals_of
from cl_compiler.cli.results import Results, read_results
from cl_compiler.units import format_bytes, format_seconds, parse_bytes

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu measurements: begin -->", "<!-- gpu measurements: end -->"
GROUPS = ("headline", "losses", "bf16")
"""Of the benchmark's groups, those that compare a compiled loss with its dense form."""


def measurements(path: Path) -> str:
    """A results file as markdown: one line for each compiled loss beside its dense form."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    lines = [line for case in cases if case["case"]["group"] in GROUPS for line in rows_of(case)]
    where = cases[0]["environment"]
    busy = any(row.get("dirty") for case in cases for row in case["rows"].values())
    machine, versions = where["machine"], where["versions"]
    return "\n".join(
        [
            f"Forward and backward with gradients of both sides, on {machine['cpu']} "
            f"({machine['arch']}, {machine['cores']} cores) with PyTorch {versions['torch']}; "
            "medians. One thread is timed in CPU time, several in wall time. Memory is the peak "
            "of live tensors beyond the inputs. Every repetition is in "
            f"[{path.name}]({path.relative_to(ROOT).as_posix()})."
            + (" Other work ran on the machine meanwhile, which the file marks." if busy else ""),
            "",
            "| loss | M = N | D | threads | budget | dense | compiled | dense / compiled "
            "| memory: dense | compiled | schedule |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def rows_of(case: Mapping[str, Any]) -> Iterator[str]:
    """A line for each compiled provider that ran, beside the dense one.

    None where nothing dense was tried; of the comparison of products only what other groups have
    not.
    """
    of, dense = case["case"], case["rows"].get("dense")
    for name, row in case["rows"].items():
        if not name.startswith("compiled") or row["error"] or row["median_s"] is None:
            continue
        if dense is None or (of["group"] == "bf16" and name == "compiled"):
            continue
        beside = ["did not run", "", ""]
        if dense.get("median_s"):
            ratio = dense["median_s"] / row["median_s"]
            beside = [
                format_seconds(dense["median_s"]), f"{ratio:.2f}", format_bytes(dense["live_bytes"])
            ]  # fmt: skip
        dtype = "" if of["dtype"] == "float32" else f", {of['dtype']}"
        products = ", bf16 products" if name == "compiled:bf16" else ""
        cells = [
            of["loss"] + dtype + products, f"{of['M']:,}", str(of["D"]), str(of["threads"]),
            format_bytes(parse_bytes(of["budget"])), beside[0],
            format_seconds(row["median_s"]), beside[1], beside[2],
            format_bytes(row["live_bytes"]), f"`{row['plan']['schedule']}`",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def gpu_measurements(path: Path) -> str:
    """A GPU's results file as markdown: one line for each size, beside the fastest other."""
    results = read_results(path)
    keys = dict.fromkeys(line.key for line in results.lines)
    lines = [row for key in keys if (row := gpu_row(results, key))]
    return "\n".join(
        [
            f"bf16 inputs, gradients of both sides, on {results.device} ({results.about}); medians "
            "of CUDA events. The fraction is of the library's 8192³ product in the same run, on "
            "the least work that a loss allows. Memory is the allocator's peak beyond the inputs. "
            "Every repetition and every error is in "
            f"[{path.name}]({path.relative_to(ROOT).as_posix()}).",
            "",
            "| loss | M = N, D | forward | backward | both | of best product | memory "
            "| fastest other | other / compiled | its memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def gpu_row(results: Results, key: str) -> str:
    """One size as a line; "" where the compiled loss did not run."""
    ours, rivals = ours_of(results.lines, key), rivals_of(results, key)
    if ours is None or ours.seconds is None:
        return ""
    beside = ["none ran", "", ""]
    if rivals:
        rival, seconds = rivals[0], rivals[0].seconds or 0.0
        beside = [f"`{rival.provider}`, {format_seconds(seconds)}",
                  f"{seconds / ours.seconds:.2f}", size_of(rival.live_bytes)]  # fmt: skip
    fraction = "" if ours.ceiling is None else f"{ours.ceiling:.2f}"
    cells = [
        ours.loss, ours.size.removeprefix(f"{ours.loss} ").removesuffix(" bfloat16"),
        format_seconds(ours.forward_s or 0.0), format_seconds(ours.backward_s or 0.0),
        format_seconds(ours.seconds), fraction, size_of(ours.live_bytes), *beside,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def size_of(count: int | None) -> str:
    return "" if count is None else format_bytes(count)


def readme_with(text: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with its measurements replaced."""
    before, found, rest = README.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    if not found:
        sys.exit(f"README.md has no {begin} … {end}: put them where the table is to stand")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main(arguments: list[str]) -> None:
    """Print or write."""
    write = "--write" in arguments
    named = [Path(a).resolve() for a in arguments if not a.startswith("-")]
    found = named or sorted(RESULTS.glob("cpu-*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"no results in {RESULTS.relative_to(ROOT)}: run `python -m benchmarks.cpu`")
    of_gpu = "runs" in json.loads(found[-1].read_text(encoding="utf-8"))
    text = gpu_measurements(found[-1]) if of_gpu else measurements(found[-1])
    if write:
        markers = (GPU_BEGIN, GPU_END) if of_gpu else (BEGIN, END)
        README.write_text(readme_with(text, *markers), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
