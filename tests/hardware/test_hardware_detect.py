"""What "auto" makes of this machine, of machines described here, and of GPUs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cl_compiler.hardware import detect as detect_module
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.cpu import Cache, CpuFacts
from cl_compiler.hardware.detect import cpu_spec, detect_cpu, detect_nominal, gpu_spec

FACTS = CpuFacts(
    model="AMD EPYC 7B13 64-Core Processor",
    arch="x86-avx2",
    features=("avx2", "fma"),
    cores=16,
    clock_hz=2.45e9,
    caches=(Cache(3, 32 << 20, 8), Cache(2, 512 << 10, 1), Cache(1, 32 << 10, 1)),
    memory_bytes=64 << 30,
    memory_source="/proc/meminfo",
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path / "cache"))


def python(program: str, **environment: str) -> str:
    """Run ``program`` in a fresh interpreter and return what it prints."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_describes_this_machine() -> None:
    spec = load_hardware("auto")
    assert spec.world_size == 1 and spec.measured == ()
    if spec.kind == "cpu":
        assert spec.host is None and 1 <= spec.cores <= (os.cpu_count() or 1)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < spec.device_memory_bytes <= pages
    assert 1e9 < spec.gemm_rate("float32") < 1e15
    assert all(spec.source_of(f"gemm_flops_per_s.{dtype}") for dtype, _ in spec.gemm_flops_per_s)


def test_detection_is_quick_and_imports_no_torch() -> None:
    program = (
        "import sys, time\n"
        "import cl_compiler.hardware.detect as d\n"
        "d._torch_if_gpu = lambda: None\n"
        "d.detect()\n"
        "best = 1.0\n"
        "for _ in range(5):\n"
        "    start = time.thread_time(); d.detect(); best = min(best, time.thread_time() - start)\n"
        "assert best < 0.05, best\n"
        "assert not {'torch', 'networkx', 'sympy', 'numpy'} & set(sys.modules)\n"
    )
    python(program)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_threads_are_those_that_pytorch_uses(threads: str) -> None:
    program = (
        "from cl_compiler.hardware.detect import detect_cpu\n"
        "before = detect_cpu().cores\n"
        "import torch\n"
        "print(before, detect_cpu().cores, torch.get_num_threads())\n"
    )
    before, after, truth = map(int, python(program, OMP_NUM_THREADS=threads).split())
    assert before == after == min(truth, detect_cores())


def detect_cores() -> int:
    from cl_compiler.hardware.cpu import cpu_facts

    return cpu_facts().cores


def test_a_thread_count_set_in_this_process_is_followed() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert detect_cpu().cores == 1
    finally:
        torch.set_num_threads(before)


def test_nominal_rates_follow_from_instruction_set_clock_and_cores() -> None:
    spec = cpu_spec(FACTS, threads=16)
    assert spec.gemm_rate("float32") == pytest.approx(32 * 2.45e9 * 16 * 0.9)
    assert spec.gemm_rate("float64") == pytest.approx(spec.gemm_rate("float32") / 2)
    assert spec.gemm_rate("bfloat16") == spec.gemm_rate("float32"), "no instructions for it"
    assert "32 FLOP per clock (x86-avx2) x 2.45 GHz x 16 cores x 0.9" in str(
        spec.source_of("gemm_flops_per_s.float32")
    )
    half = cpu_spec(FACTS, threads=8)
    for field in ("exp_per_s", "pass_per_s"):
        assert getattr(spec, field) == pytest.approx(2 * getattr(half, field))
    amx = cpu_spec(replace(FACTS, arch="x86-amx", features=("amx_bf16", "avx512_bf16")), 16)
    assert amx.gemm_rate("float32") == pytest.approx(2 * spec.gemm_rate("float32"))
    assert amx.gemm_rate("bfloat16") == pytest.approx(2.9 * amx.gemm_rate("float32"))
    zen4 = cpu_spec(replace(FACTS, arch="x86-avx512", features=("avx512_bf16",)), 16)
    assert zen4.gemm_rate("float32") == pytest.approx(spec.gemm_rate("float32"))
    assert cpu_spec(replace(FACTS, arch="riscv64-generic"), 1).gemm_rate("float32") > 0


def test_nominal_rates_of_the_measured_xeon_are_near_its_measured_ones() -> None:
    preset = load_hardware("xeon-amx-2c")
    facts = replace(
        FACTS, arch="x86-amx", features=("amx_bf16", "amx_tile"), cores=2, clock_hz=2.6e9
    )
    nominal = cpu_spec(facts, 2)
    for dtype in ("float32", "float64", "bfloat16"):
        assert nominal.gemm_rate(dtype) == pytest.approx(preset.gemm_rate(dtype), rel=0.25)
    assert nominal.exp_per_s == pytest.approx(preset.exp_per_s, rel=0.25)
    assert nominal.pass_per_s == pytest.approx(preset.pass_per_s, rel=0.25)


@pytest.mark.parametrize(
    ("threads", "counts"),
    [(16, [1, 2, 8, 1]), (8, [1, 1, 8, 1]), (1, [1, 1, 1, 1]), (64, [1, 2, 8, 1])],
)
def test_levels_hold_the_cores_that_are_used(threads: int, counts: list[int]) -> None:
    spec = cpu_spec(FACTS, threads)
    assert [level.name for level in spec.levels] == ["device", "l3", "l2", "core"]
    assert [level.count for level in spec.levels] == counts
    assert spec.cores == min(threads, 16)


@pytest.mark.parametrize("cores", range(1, 30))
@pytest.mark.parametrize("shares", [(8, 1), (4, 2), (3, 2), (64, 1), (1, 1)])
def test_counts_always_multiply_to_the_cores(cores: int, shares: tuple[int, int]) -> None:
    caches = (Cache(3, 32 << 20, shares[0]), Cache(2, 1 << 20, shares[1]), Cache(1, 32 << 10, 1))
    spec = cpu_spec(replace(FACTS, cores=cores, caches=caches), threads=cores)
    assert spec.cores == cores


def test_a_cache_that_is_larger_than_what_encloses_it_is_left_out() -> None:
    caches = (Cache(3, 1 << 20, 4), Cache(2, 2 << 20, 1), Cache(1, 32 << 10, 1))
    spec = cpu_spec(replace(FACTS, caches=caches), 16)
    assert [level.name for level in spec.levels] == ["device", "l3", "core"]
    assert spec.cores == 16


def test_names_are_readable_and_safe_in_paths() -> None:
    assert cpu_spec(FACTS, 16).name == "amd-epyc-7b13-64-core-16c"
    intel = replace(FACTS, model="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    assert cpu_spec(intel, 2).name == "intel-xeon-platinum-8481c-2c"
    assert cpu_spec(replace(FACTS, model="../..\n"), 1).name == "unknown-1c"


# ---- GPUs, as PyTorch describes them --------------------------------------------------------


def properties(**changes: Any) -> SimpleNamespace:
    content = {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "minor": 0,
        "total_memory": 85017624576,
        "multi_processor_count": 132,
        "L2_cache_size": 50 << 20,
        "shared_memory_per_multiprocessor": 228 << 10,
        "regs_per_multiprocessor": 65536,
        "clock_rate": 1980000,
        "memory_clock_rate": 2619000,
        "memory_bus_width": 5120,
    }
    return SimpleNamespace(**(content | changes))


def test_a_known_gpu_takes_its_preset_and_its_own_memory() -> None:
    host = cpu_spec(FACTS, 16)
    spec = gpu_spec(properties(), host)
    preset = load_hardware("h100x1")
    assert spec.name == "nvidia-h100-80gb-hbm3" and spec.kind == "cuda" and spec.arch == "sm_90"
    assert spec.gemm_flops_per_s == preset.gemm_flops_per_s
    assert spec.device_memory_bytes == 85017624576 != preset.device_memory_bytes
    assert spec.host is not None and spec.host.memory_bytes == host.device_memory_bytes
    amd = gpu_spec(properties(name="AMD Instinct MI300X", multi_processor_count=304), host)
    assert (amd.kind, amd.arch, amd.cores) == ("hip", "gfx942", 304)


def test_an_unknown_gpu_is_derived_from_its_counts_and_clocks() -> None:
    host = cpu_spec(FACTS, 16)
    # The H100 PCIe is no SXM: fewer SMs, other clocks.
    pcie = gpu_spec(
        properties(
            name="NVIDIA H100 PCIe",
            multi_processor_count=114,
            clock_rate=1755000,
            memory_clock_rate=1593000,
        ),
        host,
    )
    assert pcie.arch == "sm_90" and pcie.cores == 114
    assert pcie.gemm_rate("bfloat16") == pytest.approx(756e12 * 1.08, rel=0.05)
    assert pcie.gemm_rate("float32") == pytest.approx(51e12, rel=0.02)
    assert pcie.device_level.bandwidth_bytes_per_s == pytest.approx(2.04e12, rel=0.01)
    old = properties(name="Tesla V100", major=7, minor=0, multi_processor_count=80)
    assert gpu_spec(old, host).arch == "sm_70"
    assert "tf32" in dict(pcie.gemm_flops_per_s)
    assert "tf32" not in dict(gpu_spec(old, host).gemm_flops_per_s)
    amd = properties(name="AMD Radeon PRO", gcnArchName="gfx1100:sramecc-", clock_rate=2500000)
    found = gpu_spec(amd, host)
    assert (found.kind, found.arch) == ("hip", "gfx1100")
    assert "tf32" not in dict(found.gemm_flops_per_s)  # gfx942 alone has it


def test_properties_that_an_older_pytorch_lacks_have_defaults() -> None:
    bare = SimpleNamespace(
        name="GPU", major=8, minor=6, total_memory=8 << 30, multi_processor_count=20
    )
    spec = gpu_spec(bare, cpu_spec(FACTS, 16))
    assert spec.arch == "sm_86" and spec.gemm_rate("bfloat16") > 0


@pytest.mark.parametrize("name", ["a100x1", "h100x1", "b200x1", "rtx4090x1"])
def test_the_derivation_of_unknown_gpus_reproduces_the_presets(name: str) -> None:
    preset = load_hardware(name)
    clock = {"a100x1": 1.41e6, "h100x1": 1.83e6, "b200x1": 1.85e6, "rtx4090x1": 2.52e6}[name]
    major, minor = {"sm_100": (10, 0)}.get(preset.arch, (int(preset.arch[3]), int(preset.arch[4])))
    derived = gpu_spec(
        properties(
            name="unknown",
            major=major,
            minor=minor,
            multi_processor_count=preset.cores,
            clock_rate=clock,
        ),
        cpu_spec(FACTS, 16),
    )
    assert derived.arch == preset.arch
    for dtype in ("bfloat16", "float16", "tf32", "float32"):
        assert derived.gemm_rate(dtype) == pytest.approx(preset.gemm_rate(dtype), rel=0.15)
    assert derived.exp_per_s == pytest.approx(preset.exp_per_s, rel=0.02)


def test_torch_is_asked_only_where_there_is_sign_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake(name: str) -> SimpleNamespace:
        asked.append(name)
        return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib, "import_module", fake)
    assert detect_module._torch_if_gpu(tmp_path, {}) is None and asked == []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert detect_module._torch_if_gpu(tmp_path, {}) is None and asked == []
    (tmp_path / "dev/nvidia0").touch()
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert detect_module._torch_if_gpu(tmp_path, hidden) is None and asked == []
    assert detect_module._torch_if_gpu(tmp_path, {"CUDA_VISIBLE_DEVICES": "0"}) is not None
    assert asked == ["torch"]


def test_a_gpu_that_pytorch_sees_is_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        current_device=lambda: 0, get_device_properties=lambda index: properties()
    )
    monkeypatch.setattr(detect_module, "_torch_if_gpu", lambda: SimpleNamespace(cuda=fake))
    assert detect_nominal().name == "nvidia-h100-80gb-hbm3"


def test_a_torch_that_cannot_be_imported_leaves_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so not found")

    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(importlib, "import_module", broken)
    assert detect_module._torch_if_gpu(tmp_path, {}) is None
