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

GRADIENTS = ("d_x", "d_y", "d_z")
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
        ceiling: fraction of the library's best product in the same run, or of the file's own limit.
        same_width: fraction of the library's square product with K = D.
        target: the promised ``ceiling``.
        worst_error: of its gradients at the same scale, in any run of the file; None if not judged.
        is_step: a whole step of training, encoders included.
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
    worst_error: float | None
    is_step: bool
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
    """What one run left in a file; a file that was resumed has several."""

    path: Path
    device: str
    about: str
    ceilings: tuple[Ceiling, ...]
    judged: tuple[Judged, ...]
    lines: tuple[Line, ...]
    profiles: tuple[Profile, ...]
    early: str


def read_results(path: Path) -> tuple[Results, ...]:
    """Read a results file of ``python -m benchmarks.gpu`` or ``benchmarks.cpu``, run by run.

    Raises:
        ArgumentError: it is not one.
    """
    try:
        return tuple(_results(path, json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}; name a results file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} is no results file ({type(error).__name__}: {error}); name one that "
            "python -m benchmarks.gpu or benchmarks.cpu wrote"
        ) from error


def _results(path: Path, content: Entry) -> Iterator[Results]:
    """Each run with its own device, versions and limits; errors count wherever they were found."""
    cases, runs = content["cases"], content.get("runs", {})
    by_run: dict[str, list[Entry]] = {run: [] for run in runs}
    for case in cases:
        by_run.setdefault(case["run"] if runs else case["environment"]["commit"], []).append(case)
    everybody = [j for case in cases for j in _judged(case)]
    for run, own in by_run.items():
        about = runs[run] if runs else own[-1]["environment"]
        early = str(about.get("ended_early", "")) if run == next(reversed(by_run)) else ""
        if not own and not early:
            continue
        device = about["device"]["name"] if runs else about.get("machine", {}).get("cpu", "")
        ceilings = tuple(_ceiling(c) for c in own if c["case"]["group"] == "ceilings")
        yield Results(
            path, device, _about(about), ceilings,
            tuple(j for c in own for j in _judged(c)),
            tuple(line for c in own for line in _lines(c, ceilings, everybody)),
            tuple(p for c in own if c["case"]["group"] == "kernels" for p in _profiles(c)),
            early,
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
    if case["group"] != "correctness":
        return
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


def _lines(entry: Entry, ceilings: Sequence[Ceiling], judged: Sequence[Judged]) -> Iterator[Line]:
    case = entry["case"]
    if case["group"] in ("ceilings", "correctness", "kernels"):
        return
    best, width = best_product(ceilings, case["dtype"]), case["D"]
    same = next((c.rate for c in _square(ceilings, case["dtype"]) if width == c.K), None)
    flops, scale = float(case.get("flops", 0.0)), float(case.get("scale", 0.0))
    is_step = case["group"] == "step"  # cached, its forward makes the gradients: no parts to show
    for name, row in entry["rows"].items():
        seconds = row.get("median_s")
        rate = flops / seconds if seconds else 0.0
        plan = row.get("plan")
        yield Line(
            key=entry["key"], loss=case["loss"], size=_title(case), scale=scale, provider=name,
            seconds=seconds, forward_s=None if is_step else row.get("forward_s"),
            backward_s=None if is_step else row.get("backward_s"),
            spread=_spread(row.get("seconds", ())), live_bytes=row.get("live_bytes"), flops=flops,
            ceiling=row.get("gemm_fraction") or (rate / best if rate and best else None),
            same_width=rate / same if rate and same else None, target=case.get("target"),
            worst_error=_worst_error(judged, case["loss"], scale, name), is_step=is_step,
            note=_note(plan), error=row.get("error", ""),
        )  # fmt: skip


def _worst_error(judged: Sequence[Judged], loss: str, scale: float, provider: str) -> float | None:
    found = [
        value
        for j in judged
        if (j.loss, j.scale, j.provider) == (loss, scale, provider)
        for name, value in j.errors.items()
        if name in GRADIENTS and value is not None
    ]
    # NaN compares false with everything, and is the worst of all.
    return max((float("inf") if v != v else v for v in found), default=None)


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
