"""What the project promises about CPUs, and what a results file says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Claim", "check_claims"]


MEMORY_ROWS = 16384
"""The dense formula's memory grows with N squared, gradients with N: promised from here on."""


@dataclass(frozen=True)
class Claim:
    """One promise.  ``measured`` is None where no case measured it."""

    text: str
    bound: float
    measured: float | None
    at_least: bool
    where: str

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "met" if met else "MISSED"


Entry = Mapping[str, Any]


def check_claims(cases: Sequence[Entry]) -> list[Claim]:
    """Every promise, one line per case that bears on it.

    The time ratios were promised for CPUs with AVX-512: where a product takes longer relative to an
    exponential, a formula that needs fewer products gains.
    """
    found = []
    for case in _of(cases, "headline"):
        threads = case["case"]["threads"]
        where = f"N={case['case']['N']}, {threads} thread{'s' * (threads > 1)}"
        ratio = _ratio(case, "dense", "compiled")
        bound = 1.7 if threads == 1 else 2.9
        found.append(Claim("clip: dense time / compiled time", bound, ratio, True, where))
        fraction = case["rows"].get("compiled", {}).get("gemm_fraction")
        found.append(Claim("clip: fraction of the bare GEMM loop", 0.88, fraction, True, where))
        if case["case"]["N"] >= MEMORY_ROWS:
            memory = _ratio(case, "compiled", "dense", "live_bytes")
            found.append(Claim("clip: memory / dense memory", 1 / 40, memory, False, where))
    losses = {case["case"]["loss"]: case for case in _of(cases, "losses")}
    if {"clip", "infonce"} <= losses.keys():
        panel = losses["infonce"]["rows"]["compiled:panel"].get("median_s")
        spill = losses["clip"]["rows"]["compiled:spill"].get("median_s")
        ratio = panel / spill if panel and spill else None
        found.append(Claim("infonce by panel / clip", 0.80, ratio, False, _where(losses["clip"])))
    for loss, bound in (("siglip", 1.7), ("nt_xent", 2.0)):
        if loss in losses:
            ratio = _ratio(losses[loss], "dense", "compiled")
            text = f"{loss}: dense time / compiled time"
            found.append(Claim(text, bound, ratio, True, _where(losses[loss])))
    for case in _of(cases, "retain"):
        ratio = _ratio(case, "compiled:spill", "compiled:retain")
        text = f"spill time / retain time, {case['case']['budget']}"
        found.append(Claim(text, 1.03, ratio, True, _where(case)))
    for case in _of(cases, "small"):
        ratio = _ratio(case, "dense", "compiled")
        found.append(Claim("small batch: dense time / compiled", 1.0, ratio, True, _where(case)))
    return found


def _of(cases: Sequence[Entry], group: str) -> list[Entry]:
    return [case for case in cases if case["case"]["group"] == group]


def _ratio(case: Entry, over: str, under: str, field: str = "median_s") -> float | None:
    rows = case["rows"]
    above, below = rows.get(over, {}).get(field), rows.get(under, {}).get(field)
    return above / below if above and below else None


def _where(case: Entry) -> str:
    of, threads = case["case"], case["case"]["threads"]
    return f"N={of['N']}, {threads} thread{'s' * (threads > 1)}"
