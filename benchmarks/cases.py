"""What is measured: groups of cases, each a loss at a size with alternatives that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["GROUPS", "Case", "cases_of"]

GROUPS = ("headline", "providers", "sizes", "losses", "retain", "small", "bf16")


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        providers: names of ``benchmarks.providers``; "gemm" takes its tiles from the first
            compiled provider.
        budget: memory budget of compiled providers.
        repeats: repetitions of each provider.
    """

    group: str
    loss: str
    M: int
    N: int
    D: int
    threads: int
    providers: tuple[str, ...]
    budget: str
    repeats: int
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """What identifies the case in a results file."""
        return (
            f"{self.group}: {self.loss} M={self.M} N={self.N} D={self.D} {self.dtype}, "
            f"{self.budget}, {self.threads} threads"
        )

    @property
    def clock(self) -> str:
        """CPU time for one thread, which others cannot lengthen by waiting; wall for several."""
        return "cpu" if self.threads == 1 else "wall"


def cases_of(
    threads: Sequence[int],
    *,
    only: Sequence[str] = GROUPS,
    repeats: int | None = None,
    quick: bool = False,
    long: bool = False,
) -> list[Case]:
    """The cases of some groups.

    Args:
        threads: numbers of threads; groups that need one take the first or the last.
        only: groups.
        repeats: instead of each group's own number.
        quick: tiny sizes and no torch.compile: seconds instead of minutes.
        long: the one-thread headline and ``retain`` at full size, and N = 32768.
    """
    few, many = threads[0], threads[-1]
    trio = ("compiled", "dense", "gemm")
    found = []
    for count in threads:
        n = 16384 if count > 1 or long else 8192
        budget = "136MiB" if n == 16384 else "48MiB"  # tiles that take a fortieth of dense's bytes
        found.append(Case("headline", "clip", n, n, 512, count, trio, budget, 7))
    everybody = (*trio, "open_clip", "chunked", "torch_compile")
    found.append(Case("providers", "clip", 8192, 8192, 512, many, everybody, "48MiB", 3))
    sizes = [(4096, 512), (8192, 256), (8192, 1024), (16384, 256)]
    sizes += [(16384, 1024), (32768, 512)] if long else []
    for n, width in sizes:
        budget = f"{2 * n * width * 4 // 2**20 + 16}MiB"
        found.append(Case("sizes", "clip", n, n, width, many, trio, budget, 1 if n > 16384 else 3))
    pairs = {
        "clip": ("compiled:spill", "gemm"),
        "infonce": ("compiled:panel", "dense", "gemm"),
        "siglip": ("compiled", "dense", "gemm"),
        "nt_xent": ("compiled", "compiled:spill", "dense", "gemm"),
    }
    for loss, providers in pairs.items():
        found.append(Case("losses", loss, 4096, 4096, 512, few, providers, "48MiB", 7))
    rivals = ("compiled:retain", "compiled:spill", "gemm")
    n, budget = (16384, "512MiB") if long else (8192, "146MiB")  # a third of the tiles fit in both
    found.append(Case("retain", "clip", n, n, 512, few, rivals, budget, 5))
    for n in (64, 128, 256, 512, 1024):
        found += [
            Case("small", "clip", n, n, 512, t, ("compiled", "dense"), "64MiB", 101)
            for t in threads
        ]
    halves = ("compiled:bf16", "compiled", "dense", "gemm")
    found.append(Case("bf16", "clip", 8192, 8192, 512, few, halves, "48MiB", 5))
    found = [case for case in found if case.group in only]
    if quick:
        found = [_tiny(case) for case in found]
        found = list({case.key: case for case in found}.values())
    return [case if repeats is None else replace(case, repeats=repeats) for case in found]


def _tiny(case: Case) -> Case:
    """The same comparison in a fraction of a second; its figures mean nothing."""
    n = 64 if case.group == "small" else 256
    providers = tuple(p for p in case.providers if p != "torch_compile")
    return replace(
        case, M=n, N=n, D=32, repeats=min(case.repeats, 2), providers=providers, budget="2MiB"
    )
