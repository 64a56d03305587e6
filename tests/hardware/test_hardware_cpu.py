"""Facts about a CPU, read from the files of machines that are described here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_compiler.hardware.cpu import (
    Cache,
    cpu_facts,
    free_memory_bytes,
    mac_facts,
    thread_count,
)

INTEL = "model name : Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\nbogomips : 5400.00\n"
AMX = "flags : fpu avx2 fma avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"


def machine(
    root: Path,
    *,
    cpuinfo: str = INTEL + AMX,
    arch: str = "x86_64",
    allowed: str = "0-3",
    siblings: str = "0-1",
    caches: tuple[tuple[int, str, str, str], ...] = (
        (1, "Data", "48K", "0-1"),
        (1, "Instruction", "32K", "0-1"),
        (2, "Unified", "2048K", "0-1"),
        (3, "Unified", "105M", "0-95"),
    ),
    cgroup: str = "0::/\n",
    files: dict[str, str] | None = None,
) -> Path:
    """Write the files that Linux would show; every CPU looks like CPU 0."""
    texts = {
        "proc/cpuinfo": f"processor : 0\n{cpuinfo}\nprocessor : 1\nmodel name : other\n",
        "proc/meminfo": "MemTotal:  33554432 kB\nMemAvailable:  16777216 kB\n",
        "proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{allowed}\n",
        "proc/self/cgroup": cgroup,
        "proc/sys/kernel/arch": arch,
        "sys/devices/system/cpu/online": "0-95",
    }
    first = int(allowed.replace("-", ",").split(",")[0])
    cpu = f"sys/devices/system/cpu/cpu{first}"
    texts[f"{cpu}/topology/thread_siblings_list"] = siblings
    for index, (level, kind, size, shared) in enumerate(caches):
        folder = f"{cpu}/cache/index{index}"
        texts |= {f"{folder}/level": str(level), f"{folder}/type": kind}
        texts |= {f"{folder}/size": size, f"{folder}/shared_cpu_list": shared}
    for name, text in (texts | (files or {})).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_linux_machine_is_read(tmp_path: Path) -> None:
    facts = cpu_facts(machine(tmp_path))
    assert facts.model == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert facts.arch == "x86-amx" and "amx_bf16" in facts.features and "fpu" not in facts.features
    assert facts.clock_hz == 2.7e9
    assert facts.memory_bytes == 32 << 30 and facts.memory_source == "/proc/meminfo"
    # Four usable logical CPUs, two threads per core; the L3 has more users than this process.
    assert facts.cores == 2
    assert facts.caches == (Cache(3, 105 << 20, 2), Cache(2, 2 << 20, 1), Cache(1, 48 << 10, 1))


@pytest.mark.parametrize(
    ("allowed", "siblings", "cores"),
    [("0-3", "0", 4), ("0-3", "0,48", 4), ("0-3", "0-1", 2), ("5", "5,53", 1), ("2,4-7", "2", 5)],
)
def test_cores_are_counted_within_the_affinity(
    tmp_path: Path, allowed: str, siblings: str, cores: int
) -> None:
    assert cpu_facts(machine(tmp_path, allowed=allowed, siblings=siblings)).cores == cores


@pytest.mark.parametrize(
    ("flags", "arch", "expected"),
    [
        ("fpu avx2 fma avx512f amx_tile amx_bf16", "x86_64", "x86-amx"),
        ("fpu avx2 fma avx512f amx_tile", "x86_64", "x86-avx512"),
        ("fpu avx2 fma", "x86_64", "x86-avx2"),
        ("fpu avx2", "x86_64", "x86-sse"),
        ("fp asimd sve bf16", "aarch64", "arm64-sve"),
        ("fp asimd", "aarch64", "arm64-neon"),
        ("", "riscv64", "riscv64-generic"),
    ],
)
def test_the_architecture_follows_from_the_flags(
    tmp_path: Path, flags: str, arch: str, expected: str
) -> None:
    name = "Features" if arch == "aarch64" else "flags"
    facts = cpu_facts(machine(tmp_path, cpuinfo=f"{name} : {flags}\n", arch=arch))
    assert facts.arch == expected


@pytest.mark.parametrize(
    ("cpuinfo", "cpufreq", "clock"),
    [
        ("model name : X @ 3.10GHz\nbogomips : 4000\n", None, 3.1e9),
        ("bogomips : 4890.85\ncpu MHz : 3600\n", None, 2.445425e9),
        ("bogomips : 4890.85\n", "2600000", 2.6e9),
        ("BogoMIPS : 50.00\n", None, 2.5e9),
        ("bogomips : 50.00\ncpu MHz : 1200.5\n", None, 1.2005e9),
        ("bogomips : many\n", None, 2.5e9),
    ],
)
def test_the_nominal_clock_is_preferred_to_a_momentary_one(
    tmp_path: Path, cpuinfo: str, cpufreq: str | None, clock: float
) -> None:
    files = {"sys/devices/system/cpu/cpu0/cpufreq/base_frequency": cpufreq} if cpufreq else {}
    assert cpu_facts(machine(tmp_path, cpuinfo=cpuinfo, files=files)).clock_hz == clock


@pytest.mark.parametrize(
    ("cgroup", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "8589934592"}, 8 << 30),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "4294967296"}, 4 << 30),
        ("0::/a/b\n", {"memory.max": "2147483648", "a/memory.max": "4294967296"}, 2 << 30),
        ("0::/gone\n", {"memory.max": "1073741824"}, 1 << 30),
        ("4:memory:/j\n0::/\n", {"memory/j/memory.limit_in_bytes": "1073741824"}, 1 << 30),
        ("4:memory:/j\n", {"memory/memory.limit_in_bytes": "1073741824"}, 1 << 30),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu,cpuacct:/\n", {"memory/memory.limit_in_bytes": "1073741824"}, None),
        ("0::/\n", {"memory.max": "17179869184000"}, None),  # above the RAM
        ("", {}, None),
        ("nonsense\n", {"memory.max": "x"}, None),
    ],
)
def test_a_memory_limit_of_either_cgroup_version_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], limit: int | None
) -> None:
    below = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    facts = cpu_facts(machine(tmp_path, cgroup=cgroup, files=below))
    assert facts.memory_bytes == (limit or 32 << 30)
    assert ("cgroup" in facts.memory_source) == (limit is not None)


def test_free_memory_is_what_the_cgroup_leaves_without_its_page_cache(tmp_path: Path) -> None:
    assert free_memory_bytes(machine(tmp_path / "free")) == 16 << 30
    version2 = {
        "sys/fs/cgroup/memory.max": str(4 << 30),
        "sys/fs/cgroup/memory.current": str(3 << 30),
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {1 << 30}\n",
    }
    assert free_memory_bytes(machine(tmp_path / "v2", files=version2)) == 2 << 30
    version1 = {
        "sys/fs/cgroup/memory/j/memory.limit_in_bytes": str(4 << 30),
        "sys/fs/cgroup/memory/j/memory.usage_in_bytes": str(5 << 30),
    }
    full = machine(tmp_path / "v1", cgroup="4:memory:/j\n", files=version1)
    assert free_memory_bytes(full) == 0


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 4),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("2:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "300000"}, 4),
        (
            "2:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_a_cpu_quota_limits_the_cores(
    tmp_path: Path, cgroup: str, files: dict[str, str], cores: int
) -> None:
    below = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert cpu_facts(machine(tmp_path, siblings="0", cgroup=cgroup, files=below)).cores == cores


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 6),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"OMP_NUM_THREADS": "12"}, 12),
        ({"OMP_NUM_THREADS": "0"}, 6),
        ({"OMP_NUM_THREADS": "all"}, 6),
        ({"MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "5"}, 1),
    ],
)
def test_the_thread_count_is_the_one_that_pytorch_will_use(
    environment: dict[str, str], threads: int
) -> None:
    assert thread_count(6, environment) == threads


def test_a_machine_that_says_nothing_still_has_facts(tmp_path: Path) -> None:
    facts = cpu_facts(tmp_path)
    assert facts.cores >= 1 and facts.clock_hz > 0 and facts.memory_bytes > 0
    assert "assumed" in facts.memory_source
    assert [cache.level for cache in facts.caches] == [2, 1]


def test_apple_silicon_is_read_from_sysctl() -> None:
    facts = mac_facts(
        {
            "machdep.cpu.brand_string": "Apple M2 Pro",
            "hw.optional.arm64": "1",
            "hw.optional.arm.FEAT_BF16": "1",
            "hw.physicalcpu": "10",
            "hw.perflevel0.physicalcpu": "6",
            "hw.perflevel0.l1dcachesize": "131072",
            "hw.perflevel0.l2cachesize": "16777216",
            "hw.perflevel0.cpusperl2": "3",
            "hw.memsize": "17179869184",
        }
    )
    assert (facts.model, facts.arch, facts.cores) == ("Apple M2 Pro", "arm64-neon", 6)
    assert facts.caches == (Cache(2, 16 << 20, 3), Cache(1, 128 << 10, 1))
    assert facts.memory_bytes == 16 << 30 and "bf16" in facts.features


def test_an_intel_mac_and_an_empty_sysctl_are_read_too() -> None:
    intel = {
        "machdep.cpu.brand_string": "Intel(R) Core(TM) i9",
        "machdep.cpu.features": "FPU FMA",
        "machdep.cpu.leaf7_features": "AVX2",
        "hw.physicalcpu": "8",
        "hw.l3cachesize": "16777216",
        "hw.cpufrequency": "2400000000",
        "hw.optional.arm64": "0",
    }
    facts = mac_facts(intel)
    assert facts.arch in ("x86-avx2", "arm64-neon")  # the latter where this test runs on Arm
    assert facts.clock_hz == 2.4e9 and facts.caches[0] == Cache(3, 16 << 20, 8)
    assert mac_facts({}).cores >= 1
