"""What a hardware spec must satisfy; every refusal names the spec, the obstacle and the fix."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from cl_compiler.errors import HardwareError, instead_of
from cl_compiler.units import format_bytes

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec, Level, Link

LevelKind = Literal["cluster", "node", "device", "cache", "core"]
LEVEL_KINDS: tuple[LevelKind, ...] = ("cluster", "node", "device", "cache", "core")
DEVICE_KINDS = ("cpu", "cuda", "hip")
GPU_ARCH = re.compile(r"sm_\d{2,3}[af]?|gfx[0-9a-f]{3,4}")
"""How compilers write what they compile for."""
# How a multiplication is done; the accumulator is float32, for float64 operands float64.  "float32"
# is BLAS's, "onednn" the same by oneDNN.
DTYPES = ("float64", "float32", "onednn", "tf32", "bfloat16", "float16", "fp8")


def check_arch(where: str, kind: str, arch: str) -> None:
    """That a kind of device is known, and a GPU named as compilers name it."""
    if kind not in DEVICE_KINDS:
        raise HardwareError(f"{where} has kind {kind!r}; use one of {', '.join(DEVICE_KINDS)}")
    if kind != "cpu" and not GPU_ARCH.fullmatch(arch):
        raise HardwareError(
            f"{where} has arch {arch!r}, and kernels are compiled for it; write it as compilers "
            "do, such as 'sm_90' or 'gfx942'"
        )


def check_levels(where: str, levels: tuple[Level, ...]) -> None:
    names = [level.name for level in levels]
    shown = " > ".join(f"{level.name} ({level.kind})" for level in levels) or "none"
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise HardwareError(f"{where} names levels twice: {', '.join(twice)}; rename one of each")
    if "host" in names:
        raise HardwareError(f"{where} has a level named 'host'; describe it in [host] instead")
    for kind, most in (("cluster", 1), ("node", 1), ("device", 1), ("core", 1)):
        found = sum(level.kind == kind for level in levels)
        if found > most or (kind == "device" and found == 0):
            raise HardwareError(
                f"{where} has {found} levels of kind {kind!r} (levels: {shown}); "
                f"give {'exactly' if kind == 'device' else 'at most'} one"
            )
    ranks = [LEVEL_KINDS.index(level.kind) for level in levels]
    if ranks != sorted(ranks):
        raise HardwareError(
            f"{where} has its levels in the order {shown}; "
            f"list them outermost first: {' > '.join(LEVEL_KINDS)}"
        )
    if levels[0].count != 1:
        raise HardwareError(
            f"{where} has {levels[0].count} instances of its outermost level {names[0]!r}; "
            "set its count to 1 and put a level around it, such as a node"
        )
    # A cache that exceeds what encloses it is a swapped pair of levels or a wrong unit.
    inner = [level for level in levels if level.memory_bytes > 0]
    for outer, nested in pairwise(inner):
        if nested.memory_bytes > outer.memory_bytes:
            raise HardwareError(
                f"{where}: level {nested.name!r} ({format_bytes(nested.memory_bytes)}) is larger "
                f"than {outer.name!r} around it ({format_bytes(outer.memory_bytes)}); "
                "list levels outermost first and give bytes of one instance"
            )
    device = next(level for level in levels if level.kind == "device")
    if device.memory_bytes == 0:
        raise HardwareError(f"{where}: the device has no memory; set memory_bytes of its level")


def check_links(where: str, levels: tuple[Level, ...], links: tuple[Link, ...]) -> None:
    counts = {level.name: level.count for level in levels}
    joined = [link.level for link in links]
    for name in joined:
        if name not in counts:
            raise HardwareError(
                f"{where} has a link between {name!r} instances, but no such level; "
                + instead_of(name, counts, "levels:")
            )
        if joined.count(name) > 1:
            raise HardwareError(f"{where} has two links between {name!r} instances; keep one")
    for level in levels:
        if level.kind in ("node", "device") and level.count > 1 and level.name not in joined:
            raise HardwareError(
                f"{where} has {level.count} {level.name}s and no link between them; "
                f'add [[links]] with level = "{level.name}"'
            )


def check_rates(where: str, spec: HardwareSpec) -> None:
    if not spec.gemm_flops_per_s:
        raise HardwareError(f"{where} has no gemm_flops_per_s; give at least float32")
    for table in ("gemm_flops_per_s", "gemm_efficiency", "sources"):
        keys = [key for key, _ in getattr(spec, table)]
        if len(set(keys)) != len(keys):
            raise HardwareError(f"{where} gives an entry of {table} twice; keep one")
    for dtype, rate in spec.gemm_flops_per_s:
        if dtype not in DTYPES:
            raise HardwareError(
                f"{where} has a GEMM rate for {dtype!r}; use {', '.join(DTYPES)} only"
            )
        check_number(where, f"gemm_flops_per_s.{dtype}", rate)
    for field, text in spec.sources:
        check_text(where, f"sources.{field}", text)
    for inner, value in spec.gemm_efficiency:
        check_integer(where, "an inner dimension of gemm_efficiency", inner, least=1)
        check_number(where, f"gemm_efficiency.{inner}", value)
        if value > 1:
            raise HardwareError(
                f"{where}: gemm_efficiency.{inner} is {value}; it is a fraction of "
                "gemm_flops_per_s, at most 1"
            )
    required = ("exp_per_s", "pass_per_s")
    for field in (*required, "op_overhead_s", "exp2_per_s"):
        check_number(where, field, getattr(spec, field), zero_allowed=field not in required)


def check_number(where: str, field: str, value: object, *, zero_allowed: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise HardwareError(f"{where}: {field} is {value!r}; give a number")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
        bound = "at least 0" if zero_allowed else "above 0"
        raise HardwareError(f"{where}: {field} is {value}; give a finite number {bound}")


def check_integer(where: str, field: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise HardwareError(f"{where}: {field} is {value!r}; give an integer")
    if value < least:
        raise HardwareError(f"{where}: {field} is {value}; give an integer of at least {least}")


def check_text(where: str, field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise HardwareError(f"{where}: {field} is {value!r}; give a text that is not empty")
