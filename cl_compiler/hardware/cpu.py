"""What the operating system says about this CPU: facts, no rates.

Everything is read from files below ``root``, so that tests can describe other machines.  Whatever
is missing has a fallback: a machine that says little still gets a plan.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cache", "CpuFacts", "cpu_facts", "free_memory_bytes", "thread_count"]

_ROOT = Path("/")
_DEFAULT_CLOCK_HZ = 2.5e9
_DEFAULT_MEMORY_BYTES = 8 << 30
# x86 and Arm flags that decide what code runs; the rest of the list is noise in a fingerprint.
_FEATURES = {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16"}
_FEATURES |= {"amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16"}


@dataclass(frozen=True)
class Cache:
    """One data cache.

    Attributes:
        level: 1, 2 or 3.
        size_bytes: of one instance.
        cores: usable cores that share one instance.
    """

    level: int
    size_bytes: int
    cores: int


@dataclass(frozen=True)
class CpuFacts:
    """One machine's CPU as this process may use it.

    Attributes:
        model: the vendor's name of the CPU.
        arch: "x86-amx", "x86-avx512", "x86-avx2", "x86-sse", "arm64-sve", "arm64-neon", ….
        features: flags that decide what code runs, sorted.
        cores: physical cores in this process's affinity, at most its CPU quota rounded up.
        clock_hz: nominal clock.
        caches: outermost first.
        memory_bytes: RAM, or the cgroup's limit where that is smaller.
        memory_source: where ``memory_bytes`` comes from.
    """

    model: str
    arch: str
    features: tuple[str, ...]
    cores: int
    clock_hz: float
    caches: tuple[Cache, ...]
    memory_bytes: int
    memory_source: str


def cpu_facts(root: Path = _ROOT) -> CpuFacts:
    """Read this machine's CPU; ``root`` is where its /proc and /sys are."""
    if root == _ROOT and sys.platform == "darwin":
        return mac_facts(_sysctl())
    info = _cpuinfo(root)
    machine = _text(root / "proc/sys/kernel/arch").strip() or platform.machine()
    flags = set(f"{info.get('flags', '')} {info.get('Features', '')}".split())
    cpus = _usable_cpus(root)
    siblings = _shared(root, cpus, "topology/thread_siblings_list", default=1)
    cores = max(1, math.ceil(len(cpus) / siblings))
    quota = _cpu_quota(root)
    total = _meminfo(root).get("MemTotal", 0)
    limit = _memory_limit(root)
    return CpuFacts(
        model=_model(info, machine),
        arch=_arch(machine, flags),
        features=tuple(sorted(flags & _FEATURES)),
        cores=cores if quota is None else max(1, min(cores, math.ceil(quota))),
        clock_hz=_clock_hz(root, info),
        caches=_caches(root, cpus, siblings),
        memory_bytes=min(total or _DEFAULT_MEMORY_BYTES, limit or sys.maxsize),
        memory_source="the cgroup's memory limit"
        if limit and limit < (total or sys.maxsize)
        else "/proc/meminfo"
        if total
        else "assumed: the system does not say how much memory it has",
    )


def thread_count(cores: int, environment: Mapping[str, str] | None = None) -> int:
    """Threads that PyTorch will use for one operator if nobody tells it otherwise."""
    environment = os.environ if environment is None else environment
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        # OpenMP allows a list, one entry per nesting level.
        first = environment.get(variable, "").partition(",")[0].strip()
        if first.isdigit() and int(first) > 0:
            return int(first)
    return cores


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Bytes of RAM that this process can still take without swapping or being killed."""
    facts_limit = _memory_limit(root)
    meminfo = _meminfo(root)
    free = meminfo.get("MemAvailable", meminfo.get("MemTotal", _DEFAULT_MEMORY_BYTES) // 2)
    if facts_limit is None:
        return free
    return max(0, min(free, facts_limit - _memory_used(root)))


# ---- Linux: /proc and /sys ------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() else None


def _cpuinfo(root: Path) -> dict[str, str]:
    """Fields of the first processor."""
    first = _text(root / "proc/cpuinfo").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _meminfo(root: Path) -> dict[str, int]:
    """Fields of /proc/meminfo in bytes."""
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), flags=re.MULTILINE)
    return {key: int(value) * 1024 for key, value in found}


def _usable_cpus(root: Path) -> frozenset[int]:
    allowed = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status"), re.M)
    cpus = _cpu_list(allowed[1]) if allowed else frozenset()
    online = _cpu_list(_text(root / "sys/devices/system/cpu/online"))
    return (cpus & online) or cpus or online or frozenset(range(os.cpu_count() or 1))


def _cpu_list(text: str) -> frozenset[int]:
    """``"0-3,8"`` to {0, 1, 2, 3, 8}."""
    cpus: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def _shared(root: Path, cpus: frozenset[int], name: str, *, default: int) -> int:
    """How many usable CPUs share something with the first usable one."""
    text = _text(root / f"sys/devices/system/cpu/cpu{min(cpus)}" / name)
    return len(_cpu_list(text) & cpus) or default


def _model(info: Mapping[str, str], machine: str) -> str:
    for field in ("model name", "Model", "cpu model", "Hardware"):
        if info.get(field):
            return info[field]
    if info.get("CPU part"):
        return f"{machine} {info.get('CPU implementer', '')} {info['CPU part']}"
    return platform.processor() or machine


def _arch(machine: str, flags: Iterable[str]) -> str:
    flags = set(flags)
    machine = machine.lower()
    if machine in ("x86_64", "amd64", "i686", "x86"):
        if {"amx_tile", "amx_bf16"} <= flags:
            return "x86-amx"
        if "avx512f" in flags:
            return "x86-avx512"
        return "x86-avx2" if {"avx2", "fma"} <= flags else "x86-sse"
    if machine in ("aarch64", "arm64"):
        return "arm64-sve" if "sve" in flags else "arm64-neon"
    return f"{machine or 'unknown'}-generic"


def _clock_hz(root: Path, info: Mapping[str, str]) -> float:
    """Nominal clock: the base frequency where it is known, never a momentary one if avoidable."""
    named = re.search(r"@\s*([\d.]+)\s*GHz", info.get("model name", ""))
    if named:
        return float(named[1]) * 1e9
    cpufreq = root / "sys/devices/system/cpu/cpu0/cpufreq"
    for name in ("base_frequency", "cpuinfo_max_freq"):
        if kilohertz := _integer(_text(cpufreq / name)):
            return kilohertz * 1e3
    # The time stamp counter of x86 runs at the base clock, and BogoMIPS is twice that.
    for field, factor in (("bogomips", 0.5e6), ("cpu MHz", 1e6)):
        try:
            value = float(info.get(field, "")) * factor
        except ValueError:
            continue
        # Arm's BogoMIPS is a timer's frequency, far below any clock.
        if value > 0.8e9:
            return value
    return _DEFAULT_CLOCK_HZ


def _caches(root: Path, cpus: frozenset[int], siblings: int) -> tuple[Cache, ...]:
    folder = root / f"sys/devices/system/cpu/cpu{min(cpus)}/cache"
    found: dict[int, Cache] = {}
    for index in sorted(folder.glob("index*")) if folder.is_dir() else ():
        level = _integer(_text(index / "level"))
        size = re.fullmatch(r"(\d+)([KMG]?)", _text(index / "size").strip())
        if level is None or size is None or _text(index / "type").strip() == "Instruction":
            continue
        count = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
        sharing = len(_cpu_list(_text(index / "shared_cpu_list")) & cpus) or 1
        if count > 0:
            found[level] = Cache(level, count, max(1, sharing // siblings))
    # Virtual machines often hide their caches; these sizes are on the small side of current CPUs.
    found.setdefault(1, Cache(1, 32 << 10, 1))
    found.setdefault(2, Cache(2, 512 << 10, 1))
    return tuple(found[level] for level in sorted(found, reverse=True))


# ---- cgroups, version 1 and 2 ---------------------------------------------------------------


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and those around it, for both versions."""
    base = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            tops = [base, base / "unified"]
        elif controller in controllers.split(","):
            tops = [base / controllers, base / controller]
        else:
            continue
        # Without a cgroup namespace the path may not exist here; the mount's top always does.
        for top in tops:
            current = top / path.strip("/")
            while current != top:
                folders.append(current)
                current = current.parent
            folders.append(top)
    return folders


def _memory_limit(root: Path) -> int | None:
    """The smallest memory limit around this process in bytes, or None."""
    limits = [
        limit
        for folder in _cgroup_folders(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        # "max" is no limit in version 2, about 2**63 in version 1.
        if (limit := _integer(_text(folder / name))) is not None and 0 < limit < 1 << 60
    ]
    return min(limits, default=None)


def _memory_used(root: Path) -> int:
    """Bytes that count against the cgroup's limit and cannot be reclaimed."""
    for folder in _cgroup_folders(root, "memory"):
        for name, cached in (
            ("memory.current", "inactive_file"),
            ("memory.usage_in_bytes", "total_inactive_file"),
        ):
            used = _integer(_text(folder / name))
            if used is not None:
                stat = re.search(rf"^{cached} (\d+)", _text(folder / "memory.stat"), re.M)
                return max(0, used - (int(stat[1]) if stat else 0))
    return 0


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota around this process, in CPUs, or None."""
    quotas: list[float] = []
    for folder in _cgroup_folders(root, "cpu"):
        # Version 2 writes "quota period" into one file, version 1 uses two.
        quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        most = _integer(quota or _text(folder / "cpu.cfs_quota_us"))
        span = _integer(period or _text(folder / "cpu.cfs_period_us"))
        if most and span:
            quotas.append(most / span)
    return min(quotas, default=None)


# ---- macOS ----------------------------------------------------------------------------------


def _sysctl() -> dict[str, str]:
    try:
        printed = subprocess.run(
            ["sysctl", "hw", "machdep.cpu"], capture_output=True, text=True, timeout=5, check=False
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.partition(":") for line in printed.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def mac_facts(values: Mapping[str, str]) -> CpuFacts:
    """Facts from ``sysctl hw machdep.cpu``; performance cores only where there are two kinds."""

    def number(*names: str) -> int | None:
        return next((n for name in names if (n := _integer(values.get(name, "")))), None)

    cores = number("hw.perflevel0.physicalcpu", "hw.physicalcpu", "hw.ncpu") or os.cpu_count() or 1
    arm = values.get("hw.optional.arm64") == "1" or platform.machine() == "arm64"
    flags = {"asimd"} if arm else set(values.get("machdep.cpu.leaf7_features", "").lower().split())
    flags |= set(values.get("machdep.cpu.features", "").lower().split())
    if values.get("hw.optional.arm.FEAT_BF16") == "1":
        flags.add("bf16")
    per_l2 = number("hw.perflevel0.cpusperl2") or 1
    caches = [
        Cache(1, number("hw.perflevel0.l1dcachesize", "hw.l1dcachesize") or 32 << 10, 1),
        Cache(2, number("hw.perflevel0.l2cachesize", "hw.l2cachesize") or 512 << 10, per_l2),
    ]
    if l3 := number("hw.l3cachesize"):
        caches.append(Cache(3, l3, cores))
    memory = number("hw.memsize")
    return CpuFacts(
        model=values.get("machdep.cpu.brand_string") or "Apple",
        arch=_arch("arm64" if arm else "x86_64", flags),
        features=tuple(sorted(flags & _FEATURES)),
        cores=cores,
        clock_hz=float(number("hw.cpufrequency") or (3.2e9 if arm else _DEFAULT_CLOCK_HZ)),
        caches=tuple(reversed(caches)),
        memory_bytes=memory or _DEFAULT_MEMORY_BYTES,
        memory_source="sysctl hw.memsize" if memory else "assumed: sysctl gives no hw.memsize",
    )
