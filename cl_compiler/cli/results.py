"""Results files of the benchmarks as rows to print and to draw, whatever device wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_compiler.errors import ArgumentError

__all__ = ["OURS", "Ceiling", "Judged", "Line", "Profile", "Results", "read_results"]

OURS = ("ours", "compiled", "triton")
"""A compiled loss in results of a GPU and of a CPU; the GPU's kernels without a planner."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Ceiling:
    """One measured limit: ``rate`` in ``unit``; ``spread`` of its repetitions, relative."""

    key: str
    kind: str
    dtype: str
    shape: str
    K: int
    rate: float
    unit: str
    spread: float
    error: str


@dataclass(frozen=True)
class Judged:
    """A provider's relative errors against float64, by what they are of; None: not given."""

    case: str
    loss: str
    scale: float
    provider: str
    errors: Mapping[str, float | None]
    repeats: bool | None
    error: str


@dataclass(frozen=True)
class Line:
    """A provider at one size.

    Attributes:
        key: of the case in its file.
        seconds: median of forward and backward together; None if it did not run.
        spread: of the repetitions: the middle half's width over the median.
        live_bytes: peak beyond the inputs.
        scale: ``logit_scale``; 0 where the file does not say.
        flops: of the least work; 0 where the file does not say.
        ceiling: fraction of the library's best product, of the device or of the file's own limit.
        same_width: fraction of the library's square product with K = D.
        target: the promised ``ceiling``.
        note: schedule of a compiled loss, and its templates where the file says.
    """

    key: str
    loss: str
    size: str
    scale: float
    provider: str
    seconds: float | None
    forward_s: float | None
    backward_s: float | None
    spread: float | None
    live_bytes: int | None
    flops: float
    ceiling: float | None
    same_width: float | None
    target: float | None
    note: str
    error: str

    @property
    def is_ours(self) -> bool:
        return self.provider.partition(":")[0] in OURS


@dataclass(frozen=True)
class Profile:
    """Where one provider's step spends its time: (kernel, how often, seconds in all)."""

    size: str
    provider: str
    kernels: tuple[tuple[str, int, float], ...]
    error: str


@dataclass(frozen=True)
class Results:
    """One file."""

    path: Path
    device: str
    about: str
    ceilings: tuple[Ceiling, ...]
    judged: tuple[Judged, ...]
    lines: tuple[Line, ...]
    profiles: tuple[Profile, ...]
    early: str


def read_results(path: Path) -> Results:
    """Read a results file of ``python -m benchmarks.gpu`` or ``benchmarks.cpu``.

    Raises:
        ArgumentError: it is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return _results(path, content)
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}; name a results file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} is no results file ({type(error).__name__}: {error}); name one that "
            "python -m benchmarks.gpu or benchmarks.cpu wrote"
        ) from error


def _results(path: Path, content: Entry) -> Results:
    cases, runs = content["cases"], content.get("runs", {})
    ceilings = tuple(_ceiling(c) for c in cases if c["case"]["group"] == "ceilings")
    judged = tuple(j for c in cases if c["case"]["group"] == "correctness" for j in _judged(c))
    profiles = tuple(p for c in cases if c["case"]["group"] == "kernels" for p in _profiles(c))
    other = ("ceilings", "correctness", "kernels")
    timed = [c for c in cases if c["case"]["group"] not in other]
    lines = tuple(line for c in timed for line in _lines(c, ceilings))
    latest: Entry = next(reversed(runs.values()), {})
    about = latest or (cases[-1]["environment"] if cases else {})
    device = latest["device"]["name"] if latest else about.get("machine", {}).get("cpu", "")
    return Results(
        path, device, _about(about), ceilings, judged, lines, profiles,
        str(latest.get("ended_early", "")),
    )  # fmt: skip


def _about(run: Entry) -> str:
    versions = run.get("versions", {})
    driver = run.get("device", {}).get("driver", "")
    parts = [f"torch {versions.get('torch', '?')}", f"driver {driver}" if driver else ""]
    parts += [f"commit {run['commit'][:10]}" if run.get("commit") else "", run.get("at", "")]
    parts += ["tiny sizes: figures mean nothing" if run.get("is_quick") else ""]
    return ", ".join(part for part in parts if part)


def _ceiling(entry: Entry) -> Ceiling:
    case, row = entry["case"], entry["rows"].get("library", {"error": "not measured"})
    return Ceiling(
        entry["key"], case["kind"], case["dtype"], case["shape"], case["K"], row.get("rate", 0.0),
        row.get("unit", ""), _spread(row.get("seconds", ())) or 0.0, row.get("error", ""),
    )  # fmt: skip


def _judged(entry: Entry) -> Iterator[Judged]:
    case = entry["case"]
    title = f"{_title(case)} scale={case['scale']:.3g}"
    for name, row in entry["rows"].items():
        yield Judged(
            title, case["loss"], case["scale"], name, row.get("errors", {}), row.get("repeats"),
            row.get("error", ""),
        )  # fmt: skip


def _profiles(entry: Entry) -> Iterator[Profile]:
    for name, row in entry["rows"].items():
        kernels = tuple((str(k), int(n), float(s)) for k, n, s in row.get("kernels", ()))
        yield Profile(_title(entry["case"]), name, kernels, row.get("error", ""))


def _lines(entry: Entry, ceilings: Sequence[Ceiling]) -> Iterator[Line]:
    case = entry["case"]
    best, width = best_product(ceilings, case["dtype"]), case["D"]
    same = next((c.rate for c in _square(ceilings, case["dtype"]) if width == c.K), None)
    flops = float(case.get("flops", 0.0))
    for name, row in entry["rows"].items():
        seconds = row.get("median_s")
        rate = flops / seconds if seconds else 0.0
        plan = row.get("plan")
        yield Line(
            key=entry["key"], loss=case["loss"], size=_title(case),
            scale=float(case.get("scale", 0.0)), provider=name, seconds=seconds,
            forward_s=row.get("forward_s"), backward_s=row.get("backward_s"),
            spread=_spread(row.get("seconds", ())), live_bytes=row.get("live_bytes"), flops=flops,
            ceiling=row.get("gemm_fraction") or (rate / best if rate and best else None),
            same_width=rate / same if rate and same else None, target=case.get("target"),
            note=_note(plan), error=row.get("error", ""),
        )  # fmt: skip


def _note(plan: Entry | None) -> str:
    """Schedule, and where Triton was possible, which templates printed it."""
    if plan is None:
        return ""
    schedule = str(plan["schedule"])
    return f"{schedule}, {plan['template']}" if "template" in plan else schedule


def _title(case: Entry) -> str:
    size = f"{case['M']:,}" if case["M"] == case["N"] else f"{case['M']:,} x {case['N']:,}"
    threads = f" {case['threads']} threads" if "threads" in case else ""
    budget = f" {case['budget']}" if "budget" in case else ""
    step = " whole step" if case.get("group") == "step" else ""
    return f"{case['loss']}{step} {size} D={case['D']} {case['dtype']}{budget}{threads}"


def _square(ceilings: Sequence[Ceiling], dtype: str) -> list[Ceiling]:
    return [c for c in ceilings if c.kind == "gemm" and c.dtype == dtype and c.shape == "square"]


def best_product(ceilings: Sequence[Ceiling], dtype: str) -> float:
    """The library's rate on the largest contracted dimension, FLOP/s; 0 if not measured."""
    found = [c for c in _square(ceilings, dtype) if c.rate]
    return max(found, key=lambda c: c.K).rate if found else 0.0


def _spread(seconds: Sequence[float]) -> float | None:
    """Width of the middle half over the median."""
    if len(seconds) < 2:
        return None
    ordered = sorted(seconds)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / ordered[len(ordered) // 2]
