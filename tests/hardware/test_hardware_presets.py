"""Every preset: each number has a source and is of a plausible size."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cl_compiler.hardware import HardwareSpec, load_hardware, preset_names
from cl_compiler.hardware.toml import PRESETS

REQUIRED = (
    "xeon-amx-2c rtx4090x1 rtx4090x2 a100x8 a100-4x8 a800x8 a800-4x8 h100x1 h100x8 h100-128x8 "
    "h200x1 h200x8 h200-128x8 b200x8 mi300x8"
)
EVERY = pytest.mark.parametrize("name", preset_names())


def test_the_promised_presets_exist() -> None:
    assert set(REQUIRED.split()) <= set(preset_names())


@EVERY
def test_a_preset_has_the_name_of_its_file(name: str) -> None:
    assert load_hardware(name).name == name


@EVERY
def test_every_number_has_a_source(name: str) -> None:
    spec = load_hardware(name)
    fields = [f"gemm_flops_per_s.{dtype}" for dtype, _ in spec.gemm_flops_per_s]
    fields += ["exp_per_s", "pass_per_s", "op_overhead_s"]
    if spec.gemm_efficiency:
        fields.append("gemm_efficiency")
    assert [field for field in fields if not spec.source_of(field)] == []
    sources = [level.source for level in spec.levels] + [link.source for link in spec.links]
    sources += [spec.host.source] if spec.host else []
    # Level, Link and Host refuse an empty source; a stand-in would pass that.
    assert [source for source in sources if len(source) < 8] == []
    unknown = {field.partition(".")[0] for field, _ in spec.sources} - set(vars(spec))
    assert unknown == set(), "sources of fields that do not exist"


@EVERY
def test_an_extension_that_changes_a_number_says_where_it_has_it_from(name: str) -> None:
    import tomllib

    content = tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))
    parts = [*content.get("levels", []), *content.get("links", [])]
    parts += [content["host"]] if "host" in content else []
    assert [part for part in parts if "source" not in part] == []


@EVERY
def test_numbers_are_of_a_plausible_size(name: str) -> None:
    spec = load_hardware(name)
    device = spec.device_level
    # A unit that is wrong by a factor of 1000 leaves every one of these ranges; a CPU without
    # matrix units is at the low end.
    ridge = spec.gemm_rate("bfloat16") / device.bandwidth_bytes_per_s
    assert 5 < ridge < 2000, "FLOP per byte of device memory"
    assert 4 << 30 <= device.memory_bytes <= 512 << 30
    assert 1e-7 < spec.op_overhead_s < 1e-4
    assert spec.exp_per_s < spec.pass_per_s < 40 * spec.exp_per_s
    # GPUs: matrix units against special-function units; the CPU's rates are measured ones.
    assert 20 < spec.gemm_rate("bfloat16") / spec.exp_per_s < 1000
    assert spec.gemm_rate("float64") <= spec.gemm_rate("float32") <= spec.gemm_rate("bfloat16")
    for outer, inner in zip(spec.levels, spec.levels[1:], strict=False):
        if outer.memory_bytes:
            together = inner.bandwidth_bytes_per_s * inner.count
            assert together > outer.bandwidth_bytes_per_s, f"{inner.name} is slower than outside"
    for link in spec.links:
        assert 1e9 < link.bandwidth_bytes_per_s < device.bandwidth_bytes_per_s
        assert 1e-7 < link.latency_s < 1e-3
    if spec.host is not None:
        assert spec.host.memory_bytes > spec.device_level.count * device.memory_bytes
        assert 1e9 < spec.host.link_bandwidth_bytes_per_s < device.bandwidth_bytes_per_s


def same_device(first: HardwareSpec, second: HardwareSpec) -> bool:
    def inner(spec: HardwareSpec) -> object:
        return [(level.name, level.memory_bytes) for level in spec.levels if level.count != 0][
            spec.levels.index(spec.device_level) :
        ]

    return (
        inner(first) == inner(second)
        and first.gemm_flops_per_s == second.gemm_flops_per_s
        and first.arch == second.arch
    )


@pytest.mark.parametrize("device", ["a100", "a800", "b200", "h100", "h200", "mi300", "rtx4090"])
def test_cluster_shapes_share_their_device(device: str) -> None:
    shapes = [load_hardware(name) for name in preset_names() if name.startswith(device)]
    assert len(shapes) > 1
    assert all(same_device(shapes[0], shape) for shape in shapes)
    assert len({shape.world_size for shape in shapes}) == len(shapes)


def test_the_a800_differs_from_the_a100_in_its_nvlink_alone() -> None:
    a100, a800 = load_hardware("a100-4x8"), load_hardware("a800-4x8")
    assert a100.levels == a800.levels and a100.gemm_flops_per_s == a800.gemm_flops_per_s
    fast, slow = a100.link("device"), a800.link("device")
    assert fast is not None and slow is not None
    assert slow.bandwidth_bytes_per_s == pytest.approx(fast.bandwidth_bytes_per_s * 400 / 600)
    assert a100.link("node") == a800.link("node")


def test_all_presets_load_quickly() -> None:
    load_hardware("h100x1")
    best = min(_load_all() for _ in range(3))
    assert best < 0.2


def _load_all() -> float:
    start = time.thread_time()
    for name in preset_names():
        load_hardware(name)
    return time.thread_time() - start


def test_reading_a_preset_imports_nothing_heavy() -> None:
    program = (
        "import sys; from cl_compiler.hardware import load_hardware; load_hardware('h100x8');"
        "heavy = {'torch', 'networkx', 'sympy', 'jinja2', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
