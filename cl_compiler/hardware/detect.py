"""What "auto" means: this machine as a ``HardwareSpec``.

Sizes are read, rates are nominal: derived from the instruction set and the clock, or taken from
the preset of a GPU that is known.  A stored calibration replaces them.  PyTorch is imported only
where there is sign of a GPU, so that planning on a laptop stays quick.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from cl_compiler.hardware.calibration import apply, load
from cl_compiler.hardware.cpu import CpuFacts, cpu_facts, thread_count
from cl_compiler.hardware.spec import HardwareSpec, Host, Level
from cl_compiler.hardware.toml import read_preset

__all__ = ["detect", "detect_cpu", "detect_nominal", "slug", "torch_version"]

# float32 FLOP per clock and core: lanes x 2 (fused multiply-add) x units.
_FLOPS_PER_CLOCK = {
    "x86-amx": 64,
    "x86-avx512": 64,
    "x86-avx2": 32,
    "x86-sse": 8,
    "arm64-sve": 32,
    "arm64-neon": 16,
}
_GEMM_FRACTION = 0.9
# Elements per clock and core, PyTorch 2.13: an AVX2 core at 2.4 GHz takes 0.84 G exponentials
# and 3.7 G additions per second, two AVX-512 cores at 2.6 GHz 3.6 G and 7.1 G.
_EXP_PER_CLOCK = {"x86-amx": 0.7, "x86-avx512": 0.7, "x86-avx2": 0.35, "arm64-sve": 0.35}
_PASS_PER_CLOCK = 1.4
_L1_BYTES_PER_CLOCK = {"x86-amx": 128, "x86-avx512": 128, "x86-avx2": 64}
_L2_BYTES_PER_CLOCK = 32
_L3_BYTES_PER_S_PER_CORE = 25e9
_DRAM_BYTES_PER_S_PER_CORE = 12e9
_DRAM_BYTES_PER_S_MOST = 200e9
_OP_OVERHEAD_S = 2e-6
# float32 GEMMs that may round to bfloat16 against those that may not; the first ratio was measured
# (preset xeon-amx-2c), and the second: without AMX, oneDNN makes them in float32 (on a Zen 4 1.07
# to 1.2 times as fast as BLAS).
_BF16_GAIN = {"amx_bf16": 2.9, "avx512_bf16": 1.1, "bf16": 1.5}

# oneDNN's float32 products against BLAS's, PyTorch 2.13: 1.07 to 1.33 on a Zen 4, 2.2 on a
# Zen 5.  Where no calibration has measured them, only AMD CPUs with bf16 products plan with them.
_ONEDNN_GAIN = 1.2

# Exponentials to base 2 against those to base e, PyTorch 2.13: 3.2 to 3.6 on a Zen 4, 4.0 to 4.5 on
# a Zen 5.
_EXP2_GAIN = 3.0

# (part of the device's name, SMs, preset): longer names first, as "A100" is in no other.
_KNOWN_GPUS = (
    ("H200", 132, "h200x1"),
    ("H100", 132, "h100x1"),
    ("A800", 108, "a800x1"),
    ("A100", 108, "a100x1"),
    ("B200", 148, "b200x1"),
    ("RTX 4090", 128, "rtx4090x1"),
    ("MI300X", 304, "mi300x1"),
)
# bfloat16 FLOP per clock and SM on tensor cores with float32 accumulation.
_TENSOR_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_TENSOR_FLOPS_OTHER = 512


def detect() -> HardwareSpec:
    """This machine, with measured rates where a calibration of it is stored."""
    nominal = detect_nominal()
    calibration = load(nominal, torch_version())
    return nominal if calibration is None else apply(nominal, calibration)


def detect_nominal() -> HardwareSpec:
    """This machine as found, without its calibration: its current GPU, else its CPU."""
    torch = _torch_if_gpu()
    host = detect_cpu()
    if torch is None:
        return host
    return gpu_spec(torch.cuda.get_device_properties(torch.cuda.current_device()), host)


def detect_cpu() -> HardwareSpec:
    """This machine's CPU, whatever else is in it."""
    facts = cpu_facts()
    torch = sys.modules.get("torch")
    # Half-imported modules have no functions yet.
    ask = getattr(torch, "get_num_threads", None)
    return cpu_spec(facts, int(ask()) if ask is not None else thread_count(facts.cores))


def torch_version() -> str:
    """PyTorch's version without importing it; "none" where it is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none"


def cpu_spec(facts: CpuFacts, threads: int) -> HardwareSpec:
    """Nominal spec of a CPU that runs ``threads`` threads per operator."""
    cores = min(facts.cores, threads)
    clock, arch = facts.clock_hz, facts.arch
    per_clock = _FLOPS_PER_CLOCK.get(arch, 8)
    is_zen = arch == "x86-avx512" and "AMD" in facts.model and "avx512_bf16" in facts.features
    if is_zen:
        per_clock = 32  # a Zen 4 runs 512-bit instructions in two halves
    exponentials = _EXP_PER_CLOCK.get(arch, 0.15) * clock * cores
    float32 = per_clock * clock * cores * _GEMM_FRACTION
    ghz = f"{clock / 1e9:.2f} GHz x {cores} cores"
    feature = next((name for name in _BF16_GAIN if name in facts.features), None)
    gain = 1.0 if feature is None else _BF16_GAIN[feature]
    nominal = f"nominal: {per_clock} FLOP per clock ({arch}) x {ghz} x {_GEMM_FRACTION}"
    return HardwareSpec(
        name=f"{slug(facts.model)}-{cores}c",
        kind="cpu",
        arch=arch,
        levels=_cpu_levels(facts, cores),
        links=(),
        host=None,
        gemm_flops_per_s=(
            ("float64", float32 / 2),
            ("float32", float32),
            ("bfloat16", float32 * gain),
            ("float16", float32),
            *([("onednn", float32 * _ONEDNN_GAIN)] if is_zen else []),
        ),
        exp_per_s=exponentials,
        pass_per_s=_PASS_PER_CLOCK * clock * cores,
        op_overhead_s=_OP_OVERHEAD_S,
        exp2_per_s=_EXP2_GAIN * exponentials if is_zen else 0.0,
        sources=(
            ("gemm_flops_per_s", nominal),
            ("gemm_flops_per_s.float64", f"{nominal}, half as many lanes"),
            (
                "gemm_flops_per_s.bfloat16",
                "nominal: float32's, operands are widened"
                if feature is None
                else f"nominal: {gain} x float32's ({feature})",
            ),
            ("gemm_flops_per_s.float16", "nominal: float32's, operands are widened"),
            *(
                [
                    ("gemm_flops_per_s.onednn", f"nominal: {_ONEDNN_GAIN} x float32's (Zen 4, 5)"),
                    ("exp2_per_s", f"nominal: {_EXP2_GAIN} x base e (Zen 4, 5)"),
                ]
                if is_zen
                else []
            ),
            ("exp_per_s", f"nominal: PyTorch's vectorised exponential, {ghz}"),
            ("pass_per_s", f"nominal: {_PASS_PER_CLOCK} elements per clock x {ghz}"),
            ("op_overhead_s", "nominal: a PyTorch operator on 8 elements takes 1.8 us"),
        ),
    )


def _cpu_levels(facts: CpuFacts, cores: int) -> tuple[Level, ...]:
    read = "size from /sys/devices/system/cpu or sysctl"
    dram = min(_DRAM_BYTES_PER_S_PER_CORE * cores, _DRAM_BYTES_PER_S_MOST)
    levels = [
        Level(
            "device",
            "device",
            1,
            facts.memory_bytes,
            dram,
            f"size: {facts.memory_source}; bandwidth nominal: 12 GB/s per core, at most 200",
        )
    ]
    instances = 1  # of the level before, in the whole device
    for cache in facts.caches:
        # A cache that is larger than what encloses it is a misreport; the level is left out.
        if cache.size_bytes > levels[-1].memory_bytes:
            continue
        wanted = cores if cache.level == 1 else -(-cores // cache.cores)
        # Counts must multiply to the cores; where they do not, say fewer caches, never more.
        total = wanted if wanted % instances == 0 and cores % wanted == 0 else instances
        sharing = max(1, cores // total)
        if cache.level == 1:
            name, kind = "core", "core"
            bandwidth = _L1_BYTES_PER_CLOCK.get(facts.arch, 32) * facts.clock_hz
        elif cache.level == 2:
            name, kind = "l2", "cache"
            bandwidth = _L2_BYTES_PER_CLOCK * facts.clock_hz * sharing
        else:
            name, kind = f"l{cache.level}", "cache"
            bandwidth = _L3_BYTES_PER_S_PER_CORE * sharing
        levels.append(
            Level(
                name,
                kind,  # type: ignore[arg-type]
                total // instances,
                cache.size_bytes,
                bandwidth,
                f"{read}; bandwidth nominal",
            )
        )
        instances = total
    return tuple(levels)


# ---- GPUs -----------------------------------------------------------------------------------


def _torch_if_gpu(
    root: Path = Path("/"), environment: Mapping[str, str] | None = None
) -> Any | None:
    """The torch module if it can use a GPU; it is imported only where there is sign of one."""
    environment = os.environ if environment is None else environment
    if "torch" not in sys.modules:
        hidden = [environment.get(f"{maker}_VISIBLE_DEVICES") for maker in ("CUDA", "HIP")]
        signs = (*root.glob("dev/nvidia[0-9]*"), *root.glob("dev/kfd"), *root.glob("dev/dxg"))
        if not signs or any(value in ("", "-1") for value in hidden):
            return None
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):
        return None
    return torch if torch.cuda.is_available() else None


def gpu_spec(properties: Any, host: HardwareSpec) -> HardwareSpec:
    """Nominal spec of one GPU.

    Args:
        properties: what ``torch.cuda.get_device_properties`` returns.
        host: the CPU beside it.
    """
    for part, count, preset in _KNOWN_GPUS:
        if part in properties.name and properties.multi_processor_count == count:
            known = read_preset(preset)
            break
    else:
        known = _unknown_gpu(properties)
    device = known.device_level
    found = replace(
        device,
        memory_bytes=int(properties.total_memory),
        source=f"{device.source}; size as PyTorch reports it",
    )
    beside = known.host.link_bandwidth_bytes_per_s if known.host is not None else 24e9
    return replace(
        known,
        name=slug(properties.name),
        levels=tuple(found if level is device else level for level in known.levels),
        host=Host(
            memory_bytes=host.device_memory_bytes,
            bandwidth_bytes_per_s=host.device_level.bandwidth_bytes_per_s,
            link_bandwidth_bytes_per_s=beside,
            source=f"{host.device_level.source}; link: PCIe, nominal",
        ),
    )


def _unknown_gpu(properties: Any) -> HardwareSpec:
    """Rates from clocks and unit counts, for a GPU without a preset."""
    hip = bool(getattr(properties, "gcnArchName", ""))
    capability = (int(properties.major), int(properties.minor))
    sms = int(properties.multi_processor_count)
    arch = f"sm_{capability[0]}{capability[1]}"
    arch = str(properties.gcnArchName).partition(":")[0] if hip else arch
    multiplies_tf32 = arch == "gfx942" if hip else capability >= (8, 0)
    clock = float(getattr(properties, "clock_rate", 0) or 1.5e6) * 1e3
    lanes = 64 if hip or capability in ((7, 0), (7, 5), (8, 0)) else 128
    tensor = _TENSOR_FLOPS_PER_CLOCK.get(capability, _TENSOR_FLOPS_OTHER) * sms * clock
    if hip:
        tensor = 1024 * sms * clock
    plain = 2.0 * lanes * sms * clock
    bus_bits = int(getattr(properties, "memory_bus_width", 0))
    memory_clock = float(getattr(properties, "memory_clock_rate", 0)) * 1e3
    dram = 2.0 * memory_clock * bus_bits / 8 or 400e9
    shared = int(getattr(properties, "shared_memory_per_multiprocessor", 0) or 64 << 10)
    registers = int(getattr(properties, "regs_per_multiprocessor", 0) or 65536) * 4
    l2_bytes = int(getattr(properties, "L2_cache_size", 0) or 4 << 20)
    counts = f"nominal: {sms} units at {clock / 1e9:.2f} GHz, as PyTorch reports them"
    return HardwareSpec(
        name=slug(properties.name),
        kind="hip" if hip else "cuda",
        arch=arch,
        levels=(
            Level(
                "device", "device", 1, int(properties.total_memory), dram, "PyTorch's properties"
            ),
            Level("l2", "cache", 1, l2_bytes, max(dram, 32.0 * sms * clock), counts),
            Level("sm", "core", sms, shared + registers, 128 * clock, counts),
        ),
        links=(),
        host=None,
        gemm_flops_per_s=(
            ("float64", plain / 64),
            ("float32", plain),
            *([("tf32", max(plain, tensor / 2))] if multiplies_tf32 else []),
            ("bfloat16", max(plain, tensor)),
            ("float16", max(plain, tensor)),
        ),
        exp_per_s=16.0 * sms * clock,
        pass_per_s=float(lanes) * sms * clock,
        op_overhead_s=4e-6,
        gemm_efficiency=((512, 0.59), (8192, 0.80)),
        sources=(
            ("gemm_flops_per_s", counts),
            ("gemm_efficiency", "assumed: the fractions of an H100"),
            ("exp_per_s", counts),
            ("pass_per_s", counts),
            ("op_overhead_s", "assumed: one eager PyTorch operator, launched behind others"),
        ),
    )


def slug(name: str) -> str:
    """``"AMD EPYC 7B13"`` to ``"amd-epyc-7b13"``: a name for reports and files."""
    plain = re.sub(r"\((R|TM|tm|r)\)|CPU|Processor|@.*", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-") or "unknown"
