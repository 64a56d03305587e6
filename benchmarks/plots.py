"""One figure per results file: time and memory of every provider against the dense formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_compiler.runtime.measure import FOREIGN_LIMIT

__all__ = ["plot"]

Entry = Mapping[str, Any]
GROUPS = ("headline", "providers", "sizes", "losses")
COLOURS = {"compiled": "#1f77b4", "dense": "#7f7f7f", "gemm": "#2ca02c", "open_clip": "#c7c7c7",
           "chunked": "#ff7f0e", "torch_compile": "#9467bd"}  # fmt: skip


def plot(cases: Sequence[Entry], path: Path) -> None:
    """Draw time (dense = 1) above, and peak memory in MiB below, and write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shown = [case for case in cases if case["case"]["group"] in GROUPS]
    shown = [case for case in shown if case["rows"].get("dense", {}).get("median_s")]
    figure = Figure(figsize=(max(7.0, 1.7 * len(shown)), 8.0), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    names = list(dict.fromkeys(_family(n) for case in shown for n in case["rows"]))
    width = 0.85 / max(1, len(names))
    for index, name in enumerate(names):
        at, times, memory = [], [], []
        for position, case in enumerate(shown):
            row: Entry = next((r for n, r in case["rows"].items() if _family(n) == name), {})
            if not row.get("median_s"):
                continue
            at.append(position + (index - (len(names) - 1) / 2) * width)
            times.append(row["median_s"] / case["rows"]["dense"]["median_s"])
            memory.append((row["live_bytes"] or row["process_bytes"] or 0) / 2**20)
        colour = COLOURS.get(name)
        upper.bar(at, times, width, label=name, color=colour)
        lower.bar(at, memory, width, label=name, color=colour)
    upper.axhline(1, color="black", linewidth=0.8)
    upper.set_ylabel("time, dense = 1")
    lower.set_ylabel("peak memory, MiB")
    lower.set_yscale("log")
    for axes in (upper, lower):
        axes.set_xticks(range(len(shown)), [_label(case) for case in shown], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    upper.legend(frameon=False, ncols=3, fontsize=8)
    figure.suptitle(_title(cases), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _family(name: str) -> str:
    return name.partition(":")[0]


def _label(case: Entry) -> str:
    of, rows = case["case"], case["rows"].values()
    threads = f"{of['threads']} thread{'s' * (of['threads'] > 1)}"
    foreign = [f for row in rows for f in row.get("foreign_cores", ()) if f is not None]
    noisy = sum(f > FOREIGN_LIMIT for f in foreign) * 2 > len(foreign)
    disturbed = "\n(disturbed)" if noisy else ""
    return f"{of['loss']}\nN={of['N']} D={of['D']}\n{threads}{disturbed}"


def _title(cases: Sequence[Entry]) -> str:
    if not cases:
        return "no cases"
    environment = cases[-1]["environment"]
    machine = environment["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores ({machine['arch']}), "
        f"torch {environment['versions']['torch']}: forward and backward"
    )
