"""A results file of the GPU benchmark becomes measured rates, and plans rest on them and say so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cl_compiler.cli.main import app
from cl_compiler.errors import HardwareError
from cl_compiler.hardware import detect as detect_module
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.benchmarked import read_benchmark, with_measured_rates
from cl_compiler.hardware.spec import HardwareSpec
from cl_compiler.losses.cross_entropy import clip
from cl_compiler.plan.machine import rates_in_words
from cl_compiler.plan.report import explain
from cl_compiler.plan.search import choose_plan
from tests.plan.requests import request

RATES = {("bfloat16", 256): 400e12, ("bfloat16", 512): 560e12, ("bfloat16", 8192): 780e12,
         ("tf32", 512): 300e12, ("float32", 512): 50e12}  # fmt: skip


def entry(rate: float, **case: Any) -> dict[str, Any]:
    case = {"kind": "gemm", "dtype": "float32", "shape": "", "K": 0, **case, "group": "ceilings"}
    rows = {"library": {"error": "", "rate": rate}}
    return {"key": str(case), "run": "r", "case": case, "rows": rows}


def content() -> dict[str, Any]:
    cases = [entry(rate, dtype=d, K=k, shape="square") for (d, k), rate in RATES.items()]
    cases += [entry(1.0, dtype="bfloat16", K=65536, shape="dX")]  # of another shape: no curve
    cases += [entry(2.9e12, kind="copy"), entry(50e9, kind="link"), entry(250e3, kind="launch")]
    cases += [{"key": "k", "case": {"group": "speed"}, "rows": {}}]
    failed = entry(0.0, dtype="float16", K=512, shape="square")
    failed["rows"]["library"] = {"error": "RuntimeError: no"}
    device = {"name": "NVIDIA H100 80GB HBM3", "kind": "cuda", "multi_processor_count": 132,
              "total_memory": 85_017_493_504}  # fmt: skip
    run = {"device": device, "is_quick": False, "versions": {"torch": "2.11.0"}}
    return {"format": 1, "runs": {"r": run}, "cases": [*cases, failed]}


def written(tmp_path: Path, what: Any) -> Path:
    path = tmp_path / "nvidia-h100-2026-11-21.json"
    path.write_text(json.dumps(what))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return written(tmp_path, content())


@pytest.fixture
def measured(results: Path) -> HardwareSpec:
    return with_measured_rates(load_hardware("h100x1"), read_benchmark(results))


def test_the_spec_then_predicts_what_was_measured(measured: HardwareSpec) -> None:
    for (dtype, inner), rate in RATES.items():
        assert measured.gemm_rate(dtype, inner) == pytest.approx(rate)
    assert measured.device_level.bandwidth_bytes_per_s == 2.9e12
    assert measured.host is not None and measured.host.link_bandwidth_bytes_per_s == 50e9
    assert measured.op_overhead_s == pytest.approx(4e-6)


def test_what_no_operator_shows_stays_nominal(measured: HardwareSpec) -> None:
    nominal = load_hardware("h100x1")
    assert (measured.exp_per_s, measured.pass_per_s) == (nominal.exp_per_s, nominal.pass_per_s)
    assert measured.device_memory_bytes == nominal.device_memory_bytes
    assert "gemm_flops_per_s.float16" not in measured.measured


def test_each_number_says_where_it_comes_from(measured: HardwareSpec) -> None:
    said = "measured on NVIDIA H100 80GB HBM3, PyTorch 2.11.0 (nvidia-h100-2026-11-21.json)"
    assert measured.source_of("gemm_flops_per_s.bfloat16") == said
    assert said in measured.device_level.source
    assert said not in (measured.source_of("exp_per_s") or "")


def test_plans_rest_on_measured_rates_and_say_which(measured: HardwareSpec) -> None:
    sizes = {"rows": 1 << 15, "width": 512, "dtype": "bfloat16", "budget": "2GiB"}
    asked = replace(request(clip, "h100x1", **sizes), precision="bf16")
    before = choose_plan(asked)
    slow = replace(
        measured, gemm_flops_per_s=tuple((d, r / 64) for d, r in measured.gemm_flops_per_s)
    )
    found = choose_plan(replace(asked, hardware=measured))
    assert found.seconds != before.seconds
    assert choose_plan(replace(asked, hardware=slow)).seconds > 8 * found.seconds
    assert "  rates      nominal\n" in explain(before)
    assert (
        "rates      measured: bfloat16 products, device memory, launches; "
        "nominal: exponentials, elementwise passes\n"
    ) in explain(found)


def test_words_for_everything_measured() -> None:
    spec = load_hardware("xeon-amx-2c")
    fields = ("gemm_flops_per_s.float32", "levels.device.bandwidth_bytes_per_s", "exp_per_s",
              "pass_per_s", "op_overhead_s")  # fmt: skip
    assert rates_in_words(replace(spec, measured=fields), "float32", "ieee") == "measured"
    assert rates_in_words(replace(spec, measured=fields[:1]), "float64", "ieee") == "nominal"


def test_a_preset_with_measured_rates_is_a_file_to_name(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.toml"
    found = CliRunner().invoke(
        app, ["calibrate", "--results", str(results), "-w", "h100x8", "--out", str(out)]
    )
    assert found.exit_code == 0, found.output
    spec = load_hardware(str(out))
    expected = with_measured_rates(load_hardware("h100x8"), read_benchmark(results))
    assert spec == expected and spec.world_size == 8
    plan = CliRunner().invoke(
        app, ["plan", "-w", str(out), "-p", "65536x512", "--dtype", "bfloat16", "-b", "4GiB"]
    )
    assert plan.exit_code == 0 and "measured: bfloat16 products" in plan.output


def test_auto_uses_results_of_this_very_machine(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path / "cache"))
    here = replace(load_hardware("h100x1"), name="nvidia-h100-80gb-hbm3")
    monkeypatch.setattr(detect_module, "detect_nominal", lambda: here)
    found = CliRunner().invoke(app, ["calibrate", "--results", str(results)])
    assert found.exit_code == 0, found.output
    assert load_hardware("auto").gemm_rate("bfloat16", 512) == pytest.approx(560e12)
    other = replace(here, name="nvidia-a100-sxm4-80gb")
    monkeypatch.setattr(detect_module, "detect_nominal", lambda: other)
    found = CliRunner().invoke(app, ["calibrate", "--results", str(results)])
    assert found.exit_code == 1 and "this machine is nvidia-a100-sxm4-80gb" in found.output


def test_a_dry_run_is_refused(tmp_path: Path) -> None:
    what = content()
    what["runs"]["r"]["is_quick"] = True
    with pytest.raises(HardwareError, match="dry run"):
        read_benchmark(written(tmp_path, what))


def test_a_dry_run_in_the_same_file_does_no_harm(tmp_path: Path) -> None:
    what = content()
    what["runs"]["dry"] = {**what["runs"]["r"], "is_quick": True, "versions": {"torch": "9"}}
    tiny = entry(1e6, dtype="bfloat16", K=256, shape="square")
    what["cases"].append({**tiny, "run": "dry"})
    found = read_benchmark(written(tmp_path, what))
    assert ("bfloat16", 256, 400e12) in found.result.gemm and "PyTorch 2.11.0" in found.said
    assert all(rate > 1e6 for _, _, rate in found.result.gemm)


@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), "fast"])
def test_a_rate_that_is_none_is_refused(tmp_path: Path, rate: Any) -> None:
    what = content()
    what["cases"][0]["rows"]["library"]["rate"] = rate
    with pytest.raises(HardwareError, match="no results file"):
        read_benchmark(written(tmp_path, what))


@pytest.mark.parametrize(
    ("preset", "device"),
    [
        ("h100x1", {"name": "NVIDIA A100-SXM4-80GB", "multi_processor_count": 108}),
        ("h100x1", {"name": "NVIDIA H200", "total_memory": 150_000_000_000}),
        ("h200x8", {}),
        ("h100x8", {"name": "NVIDIA H100 PCIe", "multi_processor_count": 114}),
        ("h100x1", {"multi_processor_count": None}),
    ],
)
def test_rates_of_another_gpu_are_refused(tmp_path: Path, preset: str, device: dict) -> None:
    what = content()
    what["runs"]["r"]["device"] |= device
    found = read_benchmark(written(tmp_path, what))
    with pytest.raises(HardwareError, match=rf"{preset} has 132 units .* of {found.device} "):
        with_measured_rates(load_hardware(preset), found)


def test_results_without_limits_are_refused(tmp_path: Path) -> None:
    what = content()
    what["cases"] = [c for c in what["cases"] if c["case"]["group"] == "speed"]
    with pytest.raises(HardwareError, match="no rates of square products"):
        read_benchmark(written(tmp_path, what))


@pytest.mark.parametrize("what", [[], {"cases": []}, {"runs": {}, "cases": []}, "text"])
def test_something_else_is_refused(tmp_path: Path, what: Any) -> None:
    with pytest.raises(HardwareError, match="no results file"):
        read_benchmark(written(tmp_path, what))


def test_results_of_another_kind_of_device_are_refused(results: Path) -> None:
    with pytest.raises(HardwareError, match=r"of kind cpu.*NVIDIA H100"):
        with_measured_rates(load_hardware("xeon-amx-2c"), read_benchmark(results))


def test_a_preset_that_cannot_be_written_is_said(results: Path, tmp_path: Path) -> None:
    options = ["--results", str(results), "-w", "h100x1", "--out", str(tmp_path)]
    found = CliRunner().invoke(app, ["calibrate", *options])
    assert found.exit_code == 1 and f"cannot write {tmp_path}" in found.output


def test_options_that_need_results_say_so() -> None:
    found = CliRunner().invoke(app, ["calibrate", "--hardware", "h100x1"])
    assert found.exit_code == 2 and "--results" in found.output
