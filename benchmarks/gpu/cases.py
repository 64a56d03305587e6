"""What is measured, most valuable first: ceilings, correctness, then speed and memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["LOSSES", "PROVIDERS", "SECTIONS", "UNITS", "Ceiling", "Contest", "Item",
           "is_provider", "items_of"]  # fmt: skip

SECTIONS = ("ceilings", "correctness", "speed", "kernels", "step")
LOSSES = ("clip", "siglip", "infonce", "nt_xent")

UNITS = {"clip": 4.0, "infonce": 3.0, "siglip": 3.0, "nt_xent": 2.0}
"""Least work of a forward and backward in 2·M·N·D FLOP where the matrix is not kept: one product
for S, again for a loss whose gradient needs column statistics, dX and dY; NT-Xent's S is
symmetric.  Effective FLOP/s of every provider count these units, whatever it multiplies."""

TARGETS = {512: 0.74, 768: 0.84, 1024: 0.86}
"""Fraction of the library's best product that CLIP at 65,536 pairs is to reach, by D."""

PANEL = 8448
"""Rows of a panel: 66 tiles of 128 rows, so that two panels fill 132 multiprocessors evenly."""


@dataclass(frozen=True)
class Ceiling:
    """One limit of the machine.

    Attributes:
        kind: "copy" (device memory), "link" (pinned host memory to the device), "launch" (one small
            operator), "gemm" (a product in ``dtype``) or "accumulate" (a 16-bit product added to
            fp32).
        shape: "square", or what the product is for: "S" (X·Yᵀ), "dX" (G·Y), "dY" (Gᵀ·X).
        M: rows of the result; for a copy its bytes, for a launch its elements.
        K: the contracted dimension.
    """

    kind: str
    dtype: str = "float32"
    shape: str = ""
    M: int = 0
    N: int = 0
    K: int = 0
    section: str = "ceilings"

    @property
    def key(self) -> str:
        """What identifies the entry in a results file."""
        size = f"{self.M}x{self.N}x{self.K}" if self.K else str(self.M)
        return " ".join(p for p in ("ceilings:", self.kind, self.dtype, self.shape, size) if p)

    @property
    def is_yardstick(self) -> bool:
        """What contests are fractions of: each run that times any measures it for itself."""
        return (self.kind, self.dtype, self.shape) == ("gemm", "bfloat16", "square")


@dataclass(frozen=True)
class Contest:
    """One loss at one size, with providers that take turns.

    Attributes:
        section: "correctness", "speed", "kernels" (where a loss's time goes) or "step" (a whole
            step of training, encoders included).
        scale: ``logit_scale``.
        providers: names of ``benchmarks.gpu.providers``.
        turns: of each provider, at most.
        seconds: that a provider's turns may take before it needs no further one.
    """

    section: str
    loss: str
    M: int
    N: int
    D: int
    providers: tuple[str, ...]
    scale: float = 1 / 0.07
    dtype: str = "bfloat16"
    turns: int = 10
    seconds: float = 1.0

    @property
    def key(self) -> str:
        """What identifies the entry in a results file."""
        return (
            f"{self.section}: {self.loss} M={self.M} N={self.N} D={self.D} {self.dtype} "
            f"scale={self.scale:.4g}"
        )

    @property
    def flops(self) -> float:
        """Of the least work; 0 of a whole step, whose encoders are no part of it."""
        if self.section == "step":
            return 0.0
        return UNITS[self.loss] * 2.0 * self.M * self.N * self.D

    @property
    def target(self) -> float | None:
        """Fraction of the best product's rate that is promised here; None where nothing is."""
        is_promised = (self.loss, self.M, self.N) == ("clip", 65536, 65536)
        return TARGETS.get(self.D) if is_promised and self.section == "speed" else None


Item = Ceiling | Contest

OURS = {
    "clip": ("ours", "ours:spill", "ours:retain", "ours:recompute", "ours:fp8"),
    "infonce": ("ours", "ours:panel", "ours:spill"),
    "siglip": ("ours", "ours:panel", "ours:spill"),
    "nt_xent": ("ours", "ours:spill"),
}
KERNELS = ("triton", f"triton:{PANEL}x65536")
PEERS = {
    "clip": ("memeff", "inf_cl"),
    "infonce": ("cce", "cce:filtered", "liger", "memeff", "inf_cl"),
    "siglip": ("siglip_kernel",),
    "nt_xent": (),
}
STEPS = ("ours", "ours:uncached", "open_clip")
PROVIDERS = {
    "ours": "uncached|fp8|recompute|spill|panel|retain|dense",
    "triton": r"[1-9]\d*x[1-9]\d*",
    "chunked": "compiled",
    "open_clip": "compiled",
    "dense": "compiled",
    **{name: "" for names in PEERS.values() for name in names if ":" not in name},
    "cce": "filtered",
    "broken": "raise|memory|exit|hang",
}
"""What may follow a name's colon: schedules of ours or a precision, rows and columns of Triton's
panels."""
FORMULA = {"clip": "open_clip", "siglip": "open_clip", "infonce": "dense", "nt_xent": "dense"}


def items_of(
    *,
    only: Sequence[str] = SECTIONS,
    losses: Sequence[str] = LOSSES,
    providers: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Item]:
    """Everything to measure, in the order in which to measure it.

    Args:
        only: sections.
        losses: of contests.
        providers: instead of every case's own ones, as far as they apply to its section and loss.
        quick: tiny sizes without torch.compile: shows that it runs, no more.
    """
    found: list[Item] = [*_ceilings(quick), *_correctness(), *_speed(), *_steps()]
    found = [i for i in found if isinstance(i, Ceiling) or i.loss in losses]
    if quick:
        found = [_tiny(item) for item in found]
        found = list({item.key: item for item in reversed(found)}.values())[::-1]
    if providers is not None:
        found = [_instead(item, providers) for item in found]
        found = [i for i in found if not isinstance(i, Contest) or i.providers]
    return [item for item in found if item.section in only]


def _ceilings(quick: bool) -> Iterable[Ceiling]:
    if quick:
        yield from (Ceiling("copy", M=1 << 20), Ceiling("link", M=1 << 20), Ceiling("launch", M=64))
        for dtype in ("bfloat16", "float32"):
            yield Ceiling("gemm", dtype, "square", 256, 256, 256)
            yield Ceiling("gemm", dtype, "square", 256, 256, 32)
        yield Ceiling("gemm", "bfloat16", "S", 128, 256, 32)
        yield Ceiling("gemm", "bfloat16", "dX", 128, 32, 256)
        yield Ceiling("accumulate", "bfloat16", "dY", 256, 32, 128)
        return
    yield from (Ceiling("copy", M=1 << 30), Ceiling("gemm", "bfloat16", "square", 8192, 8192, 8192))
    for inner in (256, 512, 768, 1024, 2048):
        yield Ceiling("gemm", "bfloat16", "square", 8192, 8192, inner)
    for width in (256, 512, 768, 1024):
        yield Ceiling("gemm", "bfloat16", "S", PANEL, 65536, width)
        yield Ceiling("gemm", "bfloat16", "dX", PANEL, width, 65536)
        yield Ceiling("accumulate", "bfloat16", "dY", 65536, width, PANEL)
    for dtype in ("float16", "tf32", "float32"):
        for inner in (256, 512, 1024, 2048):
            yield Ceiling("gemm", dtype, "square", 8192, 8192, inner)
    yield from (Ceiling("link", M=1 << 28), Ceiling("launch", M=64))


def _correctness() -> Iterable[Contest]:
    """At sizes that are timed too, so that nothing compiles twice; both ends of training."""
    for loss, width in (("clip", 512), ("siglip", 768), ("infonce", 768), ("nt_xent", 768)):
        scales = (1 / 0.07, 100.0) if loss != "siglip" else (10.0, 100.0)
        for scale in scales:
            names = _everybody(loss)
            yield Contest("correctness", loss, 16384, 16384, width, names, scale)


def _speed() -> Iterable[Contest]:
    def case(loss: str, n: int, width: int, *names: str) -> Contest:
        return Contest("speed", loss, n, n, width, names, 10.0 if loss == "siglip" else 1 / 0.07)

    for n in (32768, 65536):
        yield case("clip", n, 512, *_everybody("clip"))
    for n in (65536, 32768):
        yield case("siglip", n, 768, *_everybody("siglip"))
    for loss in ("infonce", "nt_xent"):
        yield case(loss, 32768, 768, *_everybody(loss))
    yield from _kernels()
    few = ("ours", "triton", "chunked", "chunked:compiled", "memeff", "inf_cl", "open_clip")
    for width in (768, 1024, 256):
        yield case("clip", 65536, width, *few)
    yield replace(
        case("clip", 262144, 512, "ours", "triton", "memeff", "chunked:compiled"), turns=3
    )
    for n in (32768, 16384):
        for width in (768, 1024, 256, 512):
            if (n, width) != (32768, 512):
                yield case("clip", n, width, *few)
    for loss in ("infonce", "nt_xent"):
        yield case(loss, 65536, 768, *_everybody(loss, compiled=False))
    yield replace(case("siglip", 262144, 768, "ours", "triton", "siglip_kernel"), turns=3)
    yield replace(case("clip", 1 << 20, 256, "ours", "triton", "memeff"), turns=1)


def _steps() -> Iterable[Contest]:
    """Activations of both towers take 9 GiB at 32,768 rows, 36 GiB at 131,072."""
    yield Contest("step", "clip", 32768, 32768, 1024, STEPS, turns=5)
    yield Contest("step", "clip", 131072, 131072, 1024, STEPS, turns=2)


def _kernels() -> Iterable[Contest]:
    names = ("ours", "triton", "chunked:compiled")
    for loss, n, width in (("clip", 65536, 512), ("siglip", 65536, 768), ("nt_xent", 32768, 768)):
        scale = 10.0 if loss == "siglip" else 1 / 0.07
        yield Contest("kernels", loss, n, n, width, names, scale)


def _everybody(loss: str, *, compiled: bool = True) -> tuple[str, ...]:
    """Ours, what PyTorch offers, and the packages that do the same work."""
    formula = FORMULA[loss]
    names = (*OURS[loss], *KERNELS, "chunked", "chunked:compiled", formula, f"{formula}:compiled")
    found = (*names, *PEERS[loss])
    return found if compiled else tuple(n for n in found if n != f"{formula}:compiled")


def _tiny(item: Item) -> Item:
    if isinstance(item, Ceiling):
        return item
    names = [n for n in item.providers if not n.endswith(":compiled")]
    ours = [n for n in names if n.startswith("ours")]
    names = [n for n in names if n not in ours[2:]]
    width = 32 if item.D < 768 else 48
    return replace(item, M=256, N=256, D=width, providers=tuple(names), turns=2, seconds=0.05)


def _instead(item: Item, wanted: Sequence[str]) -> Item:
    if isinstance(item, Ceiling):
        return item
    return replace(item, providers=tuple(n for n in dict.fromkeys(wanted) if _applies(n, item)))


def is_provider(name: str) -> bool:
    """Whether there is a provider of that name."""
    family, colon, variant = name.partition(":")
    if not colon:
        return family in PROVIDERS and family != "broken"
    return bool(variant) and re.fullmatch(PROVIDERS.get(family, ""), variant) is not None


def _applies(name: str, contest: Contest) -> bool:
    family = name.partition(":")[0]
    if family == "broken":
        return True
    if contest.section == "step" or name == "ours:uncached":
        return contest.section == "step" and name in STEPS
    if family == "open_clip":
        return FORMULA[contest.loss] == family
    return family in ("ours", "triton", "chunked", "dense") or family in PEERS[contest.loss]
