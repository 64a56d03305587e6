"""Paste measured times and memory into the README, from a results file of ``benchmarks/``.

    python docs/measurements.py                                          # print the newest
    python docs/measurements.py --write [benchmarks/results/FILE.json]   # put it into README.md

A test compares the README with the file that it names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_compiler.units import format_bytes, format_seconds

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measurements: begin -->", "<!-- measurements: end -->"
GROUPS = ("headline", "losses", "retain", "bf16")
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
            "| loss | M = N | D | threads | dense | compiled | dense / compiled | memory: dense "
            "| compiled | schedule |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
        ]
    )


def rows_of(case: Mapping[str, Any]) -> Iterator[str]:
    """A line for each compiled provider that ran, beside the dense one if that ran too."""
    of, dense = case["case"], case["rows"].get("dense", {})
    for name, row in case["rows"].items():
        if not name.startswith("compiled") or row["error"] or row["median_s"] is None:
            continue
        beside = ["did not run" if dense else "not measured", "", ""]
        if dense.get("median_s"):
            ratio = dense["median_s"] / row["median_s"]
            beside = [
                format_seconds(dense["median_s"]), f"{ratio:.2f}", format_bytes(dense["live_bytes"])
            ]  # fmt: skip
        dtype = "" if of["dtype"] == "float32" else f", {of['dtype']}"
        cells = [
            of["loss"] + dtype, f"{of['M']:,}", str(of["D"]), str(of["threads"]), beside[0],
            format_seconds(row["median_s"]), beside[1], beside[2],
            format_bytes(row["live_bytes"]), f"`{row['plan']['schedule']}`",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def readme_with(text: str) -> str:
    """The README with its measurements replaced."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(arguments: list[str]) -> None:
    """Print or write."""
    write = "--write" in arguments
    named = [Path(a).resolve() for a in arguments if not a.startswith("-")]
    found = named or sorted(RESULTS.glob("cpu-*.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"no results in {RESULTS.relative_to(ROOT)}: run `python -m benchmarks.cpu`")
    text = measurements(found[-1])
    if write:
        README.write_text(readme_with(text), encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
