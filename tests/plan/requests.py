"""Requests that the planner's tests share."""

from __future__ import annotations

from dataclasses import replace

from cl_compiler.hardware import HardwareSpec, Level, load_hardware
from cl_compiler.lang.ir import LossIR
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.plan import MemoryBudget, Problem, Request

XEON = "xeon-amx-2c"

EPYC = HardwareSpec(
    name="one core of an AMD EPYC 7003 under KVM, with the rates that detection assumes",
    kind="cpu",
    arch="x86-avx2",
    levels=(
        Level("device", "device", 1, 24 << 30, 12.0e9, "nominal"),
        Level("l3", "cache", 1, 32 << 20, 25.0e9, "nominal"),
        Level("l2", "cache", 1, 512 << 10, 78.3e9, "nominal"),
        Level("core", "core", 1, 32 << 10, 156.5e9, "nominal"),
    ),
    links=(),
    host=None,
    gemm_flops_per_s=(("float32", 70.4e9),),
    exp_per_s=0.86e9,
    pass_per_s=3.42e9,
    op_overhead_s=2e-6,
)


def request(
    loss: LossIR = clip,
    hardware: str | HardwareSpec = XEON,
    rows: int = 16384,
    cols: int | None = None,
    width: int = 512,
    dtype: str = "float32",
    budget: int | str = "256MiB",
    needs: frozenset[str] | None = None,
    **more: object,
) -> Request:
    """All gradients of ``loss`` on a square problem, unless told otherwise."""
    if needs is None:
        needs = frozenset(op.name for op in loss.operands if not op.stop)
        needs |= frozenset(loss.parameters)
    problem = Problem(rows, rows if cols is None else cols, width, dtype)  # type: ignore[arg-type]
    more.setdefault("precision", "bf16" if dtype == "bfloat16" else "ieee")
    more.setdefault("positives", "views" if loss.is_single_set else "diagonal")
    return Request(
        loss,
        load_hardware(hardware),
        MemoryBudget.parse(budget),
        problem,
        needs=needs,
        **more,  # type: ignore[arg-type]
    )


def with_level(spec: HardwareSpec, level: Level, before: str) -> HardwareSpec:
    """``spec`` with one more level, directly around the level called ``before``."""
    at = [known.name for known in spec.levels].index(before)
    return replace(spec, levels=(*spec.levels[:at], level, *spec.levels[at:]))


def with_caches(spec: HardwareSpec, factor: float) -> HardwareSpec:
    """``spec`` with every memory inside the device so many times as large."""
    levels = tuple(
        replace(level, memory_bytes=int(level.memory_bytes * factor))
        if level.kind in ("cache", "core")
        else level
        for level in spec.levels
    )
    return replace(spec, levels=levels)


def with_gemm(spec: HardwareSpec, factor: float) -> HardwareSpec:
    """``spec`` with matrix products so many times as fast."""
    rates = tuple((dtype, rate * factor) for dtype, rate in spec.gemm_flops_per_s)
    return replace(spec, gemm_flops_per_s=rates)


def with_links(spec: HardwareSpec, factor: float) -> HardwareSpec:
    """``spec`` with links of so many times the bandwidth."""
    links = tuple(
        replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor)
        for link in spec.links
    )
    return replace(spec, links=links)
