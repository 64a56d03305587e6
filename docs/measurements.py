"""Put measured times and memory into the README: a table and figures, from one results file.

    python docs/measurements.py                                          # print the newest of a CPU
    python docs/measurements.py --write [benchmarks/results/FILE.json]   # README.md, docs/images

A CPU's results and a GPU's have a place of their own in the README.  Only what is committed in
``benchmarks/results`` is written, and nothing of a dry run: every figure has its file.

A test compares the README with the file that it names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_compiler.cli.compare import ours_of, rivals_of
from cl_compiler.cli.compare_plots import draw
from cl_compiler.cli.results import Line, read_results
from cl_compiler.units import format_bytes, format_seconds, parse_bytes

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
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
            "",
            "![Time and providers](docs/images/cpu-time.png)",
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
    runs = read_results(path)
    all_lines = [line for results in runs for line in results.lines]
    lines = [
        row for key in dict.fromkeys(n.key for n in all_lines) if (row := gpu_row(all_lines, key))
    ]
    where = "; ".join(f"{results.device} ({results.about})" for results in runs)
    return "\n".join(
        [
            f"bf16 inputs, gradients of both sides, on {where}; medians "
            "of CUDA events. The fraction is of the library's 8192³ product in the same run, on "
            "the least work that a loss allows. Memory is the allocator's peak beyond the inputs. "
            "Every repetition and every error is in "
            f"[{path.name}]({path.relative_to(ROOT).as_posix()}).",
            "",
            "| loss | M = N, D | forward | backward | both | of best product | memory "
            "| fastest other | other / compiled | its memory |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines,
            "",
            "![Time and providers](docs/images/gpu-time.png)",
        ]
    )


def gpu_row(lines: Sequence[Line], key: str) -> str:
    """One size as a line; "" where the compiled loss did not run."""
    ours, rivals = ours_of(lines, key), rivals_of(lines, key)
    if ours is None or ours.seconds is None:
        return ""
    beside = ["none ran", "", ""]
    if rivals:
        rival, seconds = rivals[0], rivals[0].seconds or 0.0
        beside = [f"`{rival.provider}`, {format_seconds(seconds)}",
                  f"{seconds / ours.seconds:.2f}", size_of(rival.live_bytes)]  # fmt: skip
    fraction = "" if ours.ceiling is None else f"{ours.ceiling:.2f}"
    forward, backward = (
        "" if part is None else format_seconds(part) for part in (ours.forward_s, ours.backward_s)
    )
    cells = [
        ours.loss, ours.size.removeprefix(f"{ours.loss} ").removesuffix(" bfloat16"),
        forward, backward, format_seconds(ours.seconds), fraction, size_of(ours.live_bytes),
        *beside,
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


def check_committed(path: Path, content: Mapping[str, Any]) -> None:
    """End with a message unless the figures to be written have a file that everybody can read."""
    tracked = ["git", "-C", str(RESULTS), "ls-files", "--error-unmatch", str(path)]
    if (
        path.parent != RESULTS
        or subprocess.run(tracked, capture_output=True, timeout=30).returncode
    ):
        sys.exit(f"{path} is not committed in {RESULTS}: README.md shows nothing else; commit it")
    if any(run["is_quick"] for run in content.get("runs", {}).values()):
        sys.exit(f"{path} is of a dry run, whose figures mean nothing: name another")


def main(arguments: list[str]) -> None:
    """Print or write."""
    named = [Path(a).resolve() for a in arguments if not a.startswith("-")]
    found = named or sorted(RESULTS.glob("cpu-*.json"))
    if not found:
        sys.exit(f"no results in {RESULTS.relative_to(ROOT)}: run `python -m benchmarks.cpu`")
    path = found[-1]
    content = json.loads(path.read_text(encoding="utf-8"))
    of_gpu = "runs" in content
    text = gpu_measurements(path) if of_gpu else measurements(path)
    if "--write" not in arguments:
        print(text)
        return
    check_committed(path, content)
    markers = (GPU_BEGIN, GPU_END) if of_gpu else (BEGIN, END)
    README.write_text(readme_with(text, *markers), encoding="utf-8")
    draw(read_results(path), IMAGES, "gpu" if of_gpu else "cpu", ["time"])


if __name__ == "__main__":
    main(sys.argv[1:])
