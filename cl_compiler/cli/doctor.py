"""``cl-compiler doctor``: what was found, what is missing, and what would be faster."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import typer

from cl_compiler.cli import options as opt
from cl_compiler.cli.output import Table, working, write, write_json, write_table
from cl_compiler.units import counted

if TYPE_CHECKING:
    from cl_compiler.hardware.spec import HardwareSpec

__all__ = ["Finding", "doctor"]

_LIBRARIES = ("torch", "sympy", "networkx", "jinja2", "triton")
_OPTIONAL = ("triton",)
_ISA = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")
_WORTH = 1.2
"""A precision that is so much faster deserves to be mentioned."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    ``advice`` says what to do about a ``broken`` thing, or what a ``slow`` one costs.
    """

    what: str
    value: str
    status: Literal["ok", "slow", "broken"] = "ok"
    advice: str = ""


def doctor(json: opt.Json = False) -> None:
    """Say what was detected, what is missing, and what would be faster.

    Exit code 1 if something is broken, 0 otherwise: advice on speed is no error.
    """
    parts = {
        "software": _software, "machine": _machine, "calibration": _calibration, "cache": _cache,
    }  # fmt: skip
    findings: list[Finding] = []
    with working("examining", tuple(parts)) as step:
        for examine in parts.values():
            step()
            findings += examine()
    if json:
        write_json({"findings": [asdict(finding) for finding in findings]})
    else:
        rows = tuple((f.what, f.value, "" if f.status == "ok" else f.status) for f in findings)
        write_table(Table("", ("what", "found", ""), rows))
        for status, title in (("broken", "to repair"), ("slow", "would be faster")):
            advice = [f"- {f.what}: {f.advice}" for f in findings if f.status == status]
            if advice:
                write("\n".join([title, *advice, ""]))
        write(f"presets: {', '.join(_presets())}")
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


def _presets() -> tuple[str, ...]:
    from cl_compiler.hardware import preset_names

    return tuple(preset_names())


def _is_busy() -> bool:
    """Whether more wants to run on this machine than it has cores, over the last minute."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return False


# ---- software ----------------------------------------------------------------------------------


def _software() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    for name in _LIBRARIES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name in _OPTIONAL:
                yield Finding(name, "not installed; only GPU code would need it")
            else:
                yield Finding(name, "not installed", "broken", f"pip install {name}")
    yield from _torch()


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding(
            "PyTorch", f"cannot be imported: {error}", "broken",
            "`pip install torch` (again): without it losses can be planned, not run",
        )  # fmt: skip
        return
    onednn: Any = torch.backends.mkldnn  # without types
    if onednn.is_available():
        yield Finding("oneDNN", f"available; kernels for {torch.backends.cpu.get_cpu_capability()}")
    else:
        yield Finding(
            "oneDNN", "missing", "slow",
            "this build of PyTorch multiplies bfloat16 slowly; use one with oneDNN",
        )  # fmt: skip
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if torch.get_num_threads() > 1 and policy.upper() != "PASSIVE" and _is_busy():
        yield Finding(
            "threads", f"{torch.get_num_threads()}, on cores that other work uses, too", "slow",
            "OMP_WAIT_POLICY=PASSIVE before Python starts: threads then wait without spinning",
        )  # fmt: skip
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        yield Finding("GPU", ", ".join(names))
    else:
        yield Finding("GPU", "none")


# ---- machine -----------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    from cl_compiler.hardware.cpu import cpu_facts, free_memory_bytes
    from cl_compiler.units import format_bytes

    facts = cpu_facts()
    present = [name for name in _ISA if name in facts.features]
    yield Finding("CPU", f"{facts.model}, {facts.clock_hz / 1e9:.2f} GHz")
    yield Finding("instructions", f"{facts.arch}: {', '.join(present) or 'none of interest'}")
    yield _cores(facts.cores)
    yield _threads(facts.cores)
    yield Finding("memory", f"{format_bytes(facts.memory_bytes)} ({facts.memory_source})")
    yield Finding("free memory", format_bytes(free_memory_bytes()))


def _cores(cores: int) -> Finding:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Finding("cores", f"{cores} for this process, which may use {allowed} hardware threads")


def _threads(cores: int) -> Finding:
    try:
        import torch
    except (ImportError, OSError):  # a finding of its own
        return Finding("threads", "unknown without PyTorch")
    threads = torch.get_num_threads()
    value = f"{threads} per operator"
    if threads >= cores:
        return Finding("threads", value)
    setting = os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS")
    cause = f"OMP_NUM_THREADS or MKL_NUM_THREADS is {setting}" if setting else "PyTorch's choice"
    return Finding(
        "threads", value, "slow", f"{cores - threads} cores are idle ({cause}); "
        f"set OMP_NUM_THREADS={cores}",
    )  # fmt: skip


def _calibration() -> Iterator[Finding]:
    from cl_compiler.hardware.calibration import apply, calibration_path, fingerprint, load
    from cl_compiler.hardware.detect import detect_nominal, torch_version

    nominal = detect_nominal()
    result = load(nominal, torch_version())
    path = calibration_path(fingerprint(nominal, torch_version()))
    if result is None:
        yield Finding(
            "calibration", "none, rates are nominal", "slow",
            "plans rest on guesses; run `cl-compiler calibrate`, which takes seconds",
        )  # fmt: skip
        spec = nominal
    elif result.disturbed:
        yield Finding(
            "calibration", f"{path}, made while the machine was busy", "slow",
            "its rates are too low; run `cl-compiler calibrate` again when nothing else runs",
        )  # fmt: skip
        spec = apply(nominal, result)
    else:
        yield Finding("calibration", str(path))
        spec = apply(nominal, result)
    yield _bfloat16(spec)


def _bfloat16(spec: HardwareSpec) -> Finding:
    rates = dict(spec.gemm_flops_per_s)
    gain = rates.get("bfloat16", 0.0) / rates["float32"]
    value = f"products run at {gain:.1f} times float32's rate"
    if gain < _WORTH:
        return Finding("bfloat16", f"{value}: it saves memory, no time")
    return Finding(
        "bfloat16", value, "slow",
        "float32 inputs could be multiplied faster with precision bf16, or passed as bfloat16",
    )  # fmt: skip


# ---- cache -------------------------------------------------------------------------------------


def _cache() -> Iterator[Finding]:
    from cl_compiler.cache import cache_root, is_switched_off, list_entries, verify
    from cl_compiler.units import format_bytes

    if is_switched_off():
        yield Finding(
            "cache", "switched off by CL_COMPILER_NO_CACHE", "slow",
            "every process plans and renders again; unset CL_COMPILER_NO_CACHE",
        )  # fmt: skip
        return
    root, entries, problems = cache_root(), list_entries(), verify()
    total = format_bytes(sum(entry.file_bytes for entry in entries))
    value = f"{root}: {counted(len(entries), 'variant')}, {total}"
    beside = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(beside, os.W_OK):
        yield Finding(
            "cache", f"{root} cannot be written", "broken",
            "make it writable, or point CL_COMPILER_CACHE_DIR to a folder of your own",
        )  # fmt: skip
    elif problems:
        yield Finding(
            "cache", f"{value}, {counted(len(problems), 'problem')}", "broken",
            "`cl-compiler cache verify` names them; `cl-compiler cache clear` starts afresh",
        )  # fmt: skip
    else:
        yield Finding("cache", value)
