"""HardwareSpec as a value: rates, refusals, text forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_compiler.errors import HardwareError
from cl_compiler.hardware import HardwareSpec, Host, Level, Link, load_hardware

DEVICE = Level("device", "device", 1, 16 << 30, 1e12, "a datasheet")
L2 = Level("l2", "cache", 1, 4 << 20, 4e12, "a datasheet")
CORE = Level("sm", "core", 10, 128 << 10, 1e11, "a datasheet")
SPEC = HardwareSpec(
    name="toy",
    kind="cuda",
    arch="sm_80",
    levels=(DEVICE, L2, CORE),
    links=(),
    host=Host(64 << 30, 5e10, 2e10, "a datasheet"),
    gemm_flops_per_s=(("float32", 1e13), ("bfloat16", 1e14)),
    exp_per_s=1e12,
    pass_per_s=1e13,
    op_overhead_s=4e-6,
    gemm_efficiency=((8192, 0.8), (512, 0.4)),
    sources=(("exp_per_s", "a guess"), ("gemm_flops_per_s", "a datasheet")),
)


def changed(level: Level, **fields: Any) -> Level:
    """``replace`` without its types: what a file may hold."""
    return replace(level, **fields)


def test_gemm_rate_interpolates_its_efficiency_in_log2_of_the_inner_dimension() -> None:
    assert SPEC.gemm_rate("bfloat16") == 1e14
    assert SPEC.gemm_rate("bfloat16", 512) == pytest.approx(0.4e14)
    assert SPEC.gemm_rate("bfloat16", 2048) == pytest.approx(0.6e14)  # half way from 2^9 to 2^13
    assert SPEC.gemm_rate("bfloat16", 8192) == pytest.approx(0.8e14)
    assert SPEC.gemm_rate("bfloat16", 1) == pytest.approx(0.4e14)
    assert SPEC.gemm_rate("bfloat16", 1 << 20) == pytest.approx(0.8e14)
    assert replace(SPEC, gemm_efficiency=()).gemm_rate("float32", 64) == 1e13


def test_a_missing_gemm_rate_names_those_that_exist() -> None:
    with pytest.raises(HardwareError, match=r"'toy' has no GEMM rate for 'fp8'.*bfloat16, float32"):
        SPEC.gemm_rate("fp8")


def test_world_size_multiplies_the_levels_down_to_the_device() -> None:
    spec = load_hardware("h100-128x8")
    assert (spec.world_size, spec.nodes, spec.device_level.count) == (1024, 128, 8)
    assert (SPEC.world_size, SPEC.nodes, SPEC.device_level.count, SPEC.cores) == (1, 1, 1, 10)
    mi300 = load_hardware("mi300x8")
    assert (mi300.world_size, mi300.cores) == (8, 304)


def test_a_source_is_found_for_one_entry_or_for_its_table() -> None:
    assert SPEC.source_of("gemm_flops_per_s.float32") == "a datasheet"
    assert SPEC.source_of("op_overhead_s") is None
    xeon = load_hardware("xeon-amx-2c")
    assert xeon.source_of("gemm_flops_per_s.float64") != xeon.source_of("gemm_flops_per_s.float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "tpu"}, "kind 'tpu'; use one of cpu, cuda, hip"),
        ({"kind": "cuda", "arch": "sm90"}, "arch 'sm90', and kernels .* such as 'sm_90'"),
        ({"kind": "hip", "arch": "mi300"}, "arch 'mi300', and kernels .* such as .* 'gfx942'"),
        ({"name": " "}, "name is ' '"),
        ({"levels": (L2, DEVICE, CORE)}, "order l2 .*outermost first: cluster > node > device"),
        ({"levels": (L2, CORE)}, "0 levels of kind 'device'"),
        ({"levels": ()}, "0 levels of kind 'device'"),
        ({"levels": (DEVICE, replace(DEVICE, name="other"))}, "2 levels of kind 'device'"),
        ({"levels": (DEVICE, L2, L2, CORE)}, "names levels twice: l2"),
        ({"levels": (replace(DEVICE, count=2), CORE)}, "count to 1 and put a level around"),
        (
            {"levels": (replace(DEVICE, memory_bytes=0, bandwidth_bytes_per_s=0), CORE)},
            "device has no memory",
        ),
        (
            {"levels": (DEVICE, replace(L2, memory_bytes=32 << 30), CORE)},
            r"'l2' \(32.0 GiB\) is larger than 'device'",
        ),
        (
            {"levels": (Level("node", "node", 1, 0, 0, "x"), replace(DEVICE, count=2), L2)},
            r'2 devices and no link between them; add \[\[links\]\] with level = "device"',
        ),
        (
            {"links": (Link("devise", "pcie", 1e9, 0, True, "x"),)},
            "no such level; did you mean 'device'",
        ),
        ({"links": (Link("device", "pcie", 1e9, 0, True, "x"),) * 2}, "two links"),
        ({"gemm_flops_per_s": ()}, "no gemm_flops_per_s; give at least float32"),
        ({"gemm_flops_per_s": (("int8", 1.0),)}, "rate for 'int8'; use float64"),
        ({"gemm_flops_per_s": (("float32", -1.0),)}, "float32 is -1.0; give a finite number"),
        ({"gemm_efficiency": ((512, 1.5),)}, "512 is 1.5; it is a fraction"),
        ({"exp_per_s": 0.0}, "exp_per_s is 0.0"),
        ({"pass_per_s": float("nan")}, "pass_per_s is nan"),
        ({"op_overhead_s": -1e-6}, "op_overhead_s is -1e-06; .*at least 0"),
        ({"pass_per_s": "fast"}, "pass_per_s is 'fast'; give a number"),
        ({"sources": (("exp_per_s", ""),)}, r"sources\.exp_per_s is ''"),
    ],
)
def test_an_inconsistent_spec_is_refused_with_obstacle_and_fix(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(HardwareError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(L2, count=0), "'l2': count is 0; give an integer of at least 1"),
        (lambda: changed(L2, memory_bytes=1.5), "memory_bytes is 1.5; give an integer"),
        (lambda: replace(L2, memory_bytes=-1), "memory_bytes is -1"),
        (lambda: replace(L2, bandwidth_bytes_per_s=0), "4.0 MiB but no bandwidth_bytes_per_s"),
        (lambda: changed(L2, kind="l2"), "kind 'l2'; use one of cluster, node, device"),
        (lambda: replace(L2, source=""), "source is ''"),
        (lambda: Link("node", "pcie", 0, 0, True, "x"), "bandwidth_bytes_per_s is 0"),
        (lambda: Link("node", "pcie", 1e9, -1, True, "x"), "latency_s is -1"),
        (lambda: Link("node", "pcie", 1e9, 0, "yes", "x"), "full_duplex = 'yes'"),  # type: ignore[arg-type]
        (lambda: Host(0, 1e9, 1e9, "x"), "the host: memory_bytes is 0"),
    ],
)
def test_an_impossible_part_is_refused(make: Any, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        make()


def test_canonical_json_is_one_text_per_value() -> None:
    shuffled = replace(
        SPEC,
        gemm_flops_per_s=SPEC.gemm_flops_per_s[::-1],
        gemm_efficiency=SPEC.gemm_efficiency[::-1],
        levels=(replace(DEVICE, bandwidth_bytes_per_s=10**12), L2, CORE),
    )
    assert shuffled == SPEC and hash(shuffled) == hash(SPEC)
    assert shuffled.canonical_json() == SPEC.canonical_json()


def test_canonical_json_differs_wherever_the_value_differs() -> None:
    assert SPEC.host is not None
    changed = [
        SPEC,
        replace(SPEC, name="toy2"),
        replace(SPEC, kind="hip"),
        replace(SPEC, arch="sm_90"),
        replace(SPEC, levels=(replace(DEVICE, memory_bytes=8 << 30), L2, CORE)),
        replace(SPEC, levels=(DEVICE, L2, replace(CORE, count=11))),
        replace(SPEC, levels=(DEVICE, CORE)),
        replace(SPEC, links=(Link("sm", "mesh", 1e9, 0.0, True, "x"),)),
        replace(SPEC, host=None),
        replace(SPEC, host=replace(SPEC.host, link_bandwidth_bytes_per_s=1.0)),
        replace(SPEC, gemm_flops_per_s=(("float32", 1e13),)),
        replace(SPEC, exp_per_s=1e12 + 1),
        replace(SPEC, pass_per_s=2e13),
        replace(SPEC, op_overhead_s=5e-6),
        replace(SPEC, gemm_efficiency=()),
        replace(SPEC, sources=()),
        replace(SPEC, measured=("exp_per_s",)),
    ]
    assert len({spec.canonical_json() for spec in changed}) == len(changed)


def test_toml_and_dict_read_back_to_the_same_value(tmp_path: Path) -> None:
    awkward = replace(
        SPEC,
        name='a "quoted" name, µ and \\',
        sources=(("gemm_flops_per_s.float32", "line one\nline two\x7f"),),
        measured=("exp_per_s", "levels.l2.bandwidth_bytes_per_s"),
        exp_per_s=1.2345678901234567e-5,
    )
    for spec in (SPEC, awkward, replace(SPEC, host=None), load_hardware("a800-4x8")):
        path = tmp_path / "machine.toml"
        path.write_text(spec.to_toml(), encoding="utf-8")
        assert HardwareSpec.from_toml(path) == spec
        assert HardwareSpec.from_dict(spec.to_dict()) == spec


def test_summary_is_one_line_with_what_decides_a_plan() -> None:
    line = load_hardware("h100-128x8").summary()
    assert line == (
        "h100-128x8: 1024 x cuda sm_90, 132 cores; 79.6 GiB at 3.4 TB/s; float32 66.9 TFLOP/s / "
        "bfloat16 989.4 TFLOP/s; nvlink 370.0 GB/s; infiniband 50.0 GB/s"
    )
    assert replace(SPEC, measured=("exp_per_s",)).summary().endswith("; calibrated")


def test_description_has_a_row_for_every_number_and_its_source() -> None:
    rows = {what: (value, source) for what, value, source in load_hardware("a100x8").describe()}
    assert rows["device"][0] == "x 8, 80.0 GiB at 2.0 TB/s"
    assert "8 GPUs" in rows["device"][1] and "2039 GB/s" in rows["device"][1]
    assert rows["link device"][0] == "nvlink 240.0 GB/s, 3.4 µs per hop"
    assert rows["gemm tf32"] == ("156.0 TFLOP/s", rows["gemm float32"][1])
    assert rows["gemm efficiency at D"][0] == "512: 0.63, 1024: 0.63, 8192: 0.85"
    assert rows["host"][0].startswith("2.0 TiB at 409.6 GB/s, 24.0 GB/s to each device")
    assert rows["exponentials"][0] == "2440.00 G/s"
    assert all(source for what, (_, source) in rows.items() if what not in ("kind", "devices"))
