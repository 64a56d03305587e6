"""Calibration: what was measured enters the spec, and no stored file can do harm."""

from __future__ import annotations

import json
import stat
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_compiler.errors import CacheError
from cl_compiler.hardware import detect as detect_module
from cl_compiler.hardware import load_hardware
from cl_compiler.hardware.calibration import (
    Calibration,
    apply,
    calibration_path,
    fingerprint,
    load,
    store,
)
from cl_compiler.hardware.spec import HardwareSpec

XEON = load_hardware("xeon-amx-2c")
VERSION = "2.13.0"
FOUND = Calibration(
    fingerprint=fingerprint(XEON, VERSION),
    gemm=(
        ("float32", 256, 300e9),
        ("float32", 512, 360e9),
        ("float32", 1024, 400e9),
        ("bfloat16", 512, 900e9),
    ),
    rates=(("exp_per_s", 5e9), ("pass_per_s", 9e9), ("op_overhead_s", 1e-6)),
    bandwidths=(("device", 30e9), ("l3", 60e9), ("l2", 99e9)),
    thread_gain=1.9,
    threads=2,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("CL_COMPILER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- into the spec --------------------------------------------------------------------------


def test_the_spec_then_predicts_what_was_measured() -> None:
    spec = apply(XEON, FOUND)
    for dtype, inner, rate in FOUND.gemm:
        assert spec.gemm_rate(dtype, inner) == pytest.approx(rate)
    assert (spec.exp_per_s, spec.pass_per_s, spec.op_overhead_s) == (5e9, 9e9, 1e-6)
    assert spec.level("l3").bandwidth_bytes_per_s == 60e9
    assert spec.level("l2").bandwidth_bytes_per_s == 99e9
    assert spec.device_level.bandwidth_bytes_per_s == 30e9


def test_what_was_not_measured_keeps_its_size_or_its_ratio() -> None:
    spec = apply(XEON, FOUND)
    assert spec.level("core") == XEON.level("core")
    assert [level.memory_bytes for level in spec.levels] == [
        level.memory_bytes for level in XEON.levels
    ]
    ratio = XEON.gemm_rate("float64") / XEON.gemm_rate("float32")
    assert spec.gemm_rate("float64") == pytest.approx(ratio * spec.gemm_rate("float32"))


def test_measured_fields_are_listed_and_say_so() -> None:
    spec = apply(XEON, FOUND)
    assert spec.measured == (
        "exp_per_s",
        "gemm_efficiency",
        "gemm_flops_per_s.bfloat16",
        "gemm_flops_per_s.float32",
        "levels.device.bandwidth_bytes_per_s",
        "levels.l2.bandwidth_bytes_per_s",
        "levels.l3.bandwidth_bytes_per_s",
        "op_overhead_s",
        "pass_per_s",
    )
    said = f"measured on this machine (calibration {FOUND.fingerprint})"
    assert spec.source_of("gemm_flops_per_s.float32") == spec.source_of("exp_per_s") == said
    assert "scaled like the measured rates" in str(spec.source_of("gemm_flops_per_s.float64"))
    assert said in spec.level("l3").source and said not in spec.level("core").source
    assert "; calibrated" in spec.summary()


def test_a_partial_calibration_leaves_the_rest_alone() -> None:
    few = replace(FOUND, rates=(("exp_per_s", 5e9),), bandwidths=(), gemm=FOUND.gemm[1:2])
    spec = apply(XEON, few)
    assert spec.pass_per_s == XEON.pass_per_s and spec.levels == XEON.levels
    assert spec.gemm_rate("float32") == 360e9 and "pass_per_s" not in spec.measured


def test_the_host_link_of_a_gpu_is_replaced() -> None:
    h100 = load_hardware("h100x1")
    spec = apply(h100, replace(FOUND, bandwidths=(("host_link", 41e9),)))
    assert spec.host is not None and spec.host.link_bandwidth_bytes_per_s == 41e9
    assert "host.link_bandwidth_bytes_per_s" in spec.measured


def test_threads_that_gain_little_betray_other_processes() -> None:
    assert not FOUND.disturbed
    assert replace(FOUND, thread_gain=1.1).disturbed
    assert not replace(FOUND, thread_gain=1.0, threads=1).disturbed


# ---- the fingerprint ------------------------------------------------------------------------


def test_the_fingerprint_changes_with_what_changes_the_rates() -> None:
    levels = XEON.levels
    others = [
        XEON,
        replace(XEON, name="other"),
        replace(XEON, arch="x86-avx512"),
        replace(XEON, levels=(*levels[:2], replace(levels[2], count=4), levels[3])),
        replace(XEON, levels=(levels[0], replace(levels[1], memory_bytes=64 << 20), *levels[2:])),
    ]
    names = {fingerprint(spec, VERSION) for spec in others} | {fingerprint(XEON, "2.14.0")}
    assert len(names) == len(others) + 1


def test_the_fingerprint_ignores_memory_limits_and_rates() -> None:
    levels = (replace(XEON.levels[0], memory_bytes=4 << 30), *XEON.levels[1:])
    same = replace(XEON, levels=levels, exp_per_s=1.0, sources=(), op_overhead_s=0.0)
    assert fingerprint(same, VERSION) == fingerprint(XEON, VERSION)
    assert fingerprint(apply(XEON, FOUND), VERSION) == FOUND.fingerprint


# ---- the file -------------------------------------------------------------------------------


def test_a_stored_calibration_is_read_back(cache: Path) -> None:
    assert load(XEON, VERSION) is None
    path = store(FOUND)
    assert path.parent == cache / "calibration" and path.stem == FOUND.fingerprint
    assert load(XEON, VERSION) == FOUND
    assert load(XEON, "2.14.0") is None
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store(replace(FOUND, thread_gain=1.5))
    again = load(XEON, VERSION)
    assert again is not None and again.thread_gain == 1.5
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


GOOD = json.loads(json.dumps({"format": 2, **vars(FOUND)}))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "\x00\x00",
        json.dumps(GOOD)[:-20],
        json.dumps(GOOD | {"format": GOOD["format"] - 1}),
        json.dumps(GOOD | {"gemm": []}),
        json.dumps(GOOD | {"gemm": [["float32", 512, -1.0]]}),
        json.dumps(GOOD | {"gemm": [["float32", 0, 1e9]]}),
        json.dumps(GOOD | {"gemm": [["int7", 512, 1e9]]}),
        json.dumps(GOOD | {"gemm": [["float32", 512]]}),
        json.dumps(GOOD | {"gemm": "float32"}),
        json.dumps(GOOD | {"rates": [["exp_per_s", "fast"]]}),
        json.dumps(GOOD | {"rates": [["exp_per_s", 0]]}),
        json.dumps(GOOD | {"rates": [["name", 1.0]]}),
        json.dumps(GOOD | {"bandwidths": [["l3", float("nan")]]}),
        json.dumps(GOOD | {"bandwidths": [["l3", float("inf")]]}),
        json.dumps(GOOD | {"fingerprint": "another-machine"}),
        json.dumps({key: value for key, value in GOOD.items() if key != "threads"}),
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(text: str) -> None:
    path = store(FOUND)
    path.write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"ignoring the calibration in .*cl-compiler calibrate"):
        assert load(XEON, VERSION) is None
    store(FOUND)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(XEON, VERSION) == FOUND


def test_a_file_that_cannot_be_read_is_ignored_with_a_warning() -> None:
    path = calibration_path(FOUND.fingerprint)
    path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="ignoring the calibration"):
        assert load(XEON, VERSION) is None
    path.rmdir()
    path.write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="ignoring the calibration"):
        assert load(XEON, VERSION) is None


def test_a_directory_that_cannot_be_written_is_an_error_with_a_fix(cache: Path) -> None:
    cache.write_text("a file where the directory should be")
    with pytest.raises(CacheError, match=r"cannot store .*CL_COMPILER_CACHE_DIR"):
        store(FOUND)


def test_auto_uses_a_stored_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_module, "detect_nominal", lambda: XEON)
    monkeypatch.setattr(detect_module, "torch_version", lambda: VERSION)
    assert load_hardware("auto") == XEON
    path = store(FOUND)
    assert load_hardware("auto") == apply(XEON, FOUND)
    path.write_text("damaged")
    with pytest.warns(UserWarning):
        assert load_hardware("auto") == XEON


# ---- the measurement ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[HardwareSpec, HardwareSpec, float]:
    """(nominal, calibrated, seconds) of this machine's CPU, with one thread."""
    import torch

    from cl_compiler.hardware.calibrate import measure
    from cl_compiler.hardware.detect import detect_cpu

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        nominal = detect_cpu()
        start = time.thread_time()
        result = measure(nominal=nominal)
        seconds = time.thread_time() - start
    finally:
        torch.set_num_threads(threads)
    return nominal, apply(nominal, result), seconds


def test_measuring_takes_a_few_seconds(
    measured: tuple[HardwareSpec, HardwareSpec, float],
) -> None:
    assert measured[2] < 4.0


def test_measured_rates_are_those_of_a_real_cpu(
    measured: tuple[HardwareSpec, HardwareSpec, float],
) -> None:
    nominal, spec, _ = measured
    # Nominal rates are guesses; ten times off would be a unit or a count, not a guess.
    for dtype in ("float32", "float64"):
        assert f"gemm_flops_per_s.{dtype}" in spec.measured
        assert 0.1 < spec.gemm_rate(dtype) / nominal.gemm_rate(dtype) < 10
    assert spec.gemm_rate("float64") < spec.gemm_rate("float32")
    assert [inner for inner, _ in spec.gemm_efficiency] == [256, 512, 1024]
    assert 0.1 < spec.exp_per_s / nominal.exp_per_s < 10
    assert 0.1 < spec.pass_per_s / nominal.pass_per_s < 10
    assert spec.exp_per_s < spec.pass_per_s
    assert 1e-7 < spec.op_overhead_s < 1e-4
    for level in spec.levels:
        if f"levels.{level.name}.bandwidth_bytes_per_s" in spec.measured:
            assert 1e9 < level.bandwidth_bytes_per_s < 1e13


def test_measuring_leaves_pytorch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cl_compiler.hardware import calibrate as module

    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    before = (settings.fp32_precision, torch.get_num_threads(), torch.get_rng_state().sum())
    inside: list[str] = []

    def stopping(*args: object) -> float:
        inside.append(settings.fp32_precision)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_median_seconds", stopping)
    timer = module._Timer(torch, 1)
    with pytest.raises(KeyboardInterrupt), module._cpu_precision(torch, "bf16"):
        timer.rate(lambda: None)
    assert inside == ["bf16"]
    after = (settings.fp32_precision, torch.get_num_threads(), torch.get_rng_state().sum())
    assert before == after


def test_a_rate_is_the_better_of_one_thread_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from cl_compiler.hardware import calibrate as module

    seconds = {time.thread_time: 1.0, time.perf_counter: 0.55}
    calls: list[object] = []

    def scripted(call: object, clock: object, samples: int) -> float:
        calls.append(clock)
        return seconds[clock]  # type: ignore[index]

    monkeypatch.setattr(module, "_median_seconds", scripted)
    timer = module._Timer(torch, 1)
    timer.threads = 2
    threads = torch.get_num_threads()
    try:
        assert timer.rate(lambda: None) == pytest.approx(1 / 0.55)
        assert len(calls) == 2 and timer.gains == [pytest.approx(1 / 0.55)]
        seconds[time.perf_counter] = 30.0  # another process holds a core
        assert timer.rate(lambda: None) == 1.0
        assert len(calls) == 2 + 1 + 3, "a poor gain is tried again"
        timer.rate(lambda: None, scales=False)
        assert len(calls) == 6 + 2 and len(timer.gains) == 2
    finally:
        torch.set_num_threads(threads)


def test_calibrate_stores_and_warns_when_disturbed(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from cl_compiler.hardware import calibrate as module

    monkeypatch.setattr(module, "detect_nominal", lambda: XEON)
    monkeypatch.setattr(module, "measure", lambda **_: replace(FOUND, thread_gain=0.3))
    with pytest.warns(UserWarning, match=r"2 threads were only 0.3 times as fast as one"):
        spec, result = module.calibrate()
    assert calibration_path(result.fingerprint).is_file() and spec.measured
    assert calibration_path(result.fingerprint).is_relative_to(cache)


def test_a_guess_of_onednn_goes_where_the_other_library_was_measured() -> None:
    """A calibration from before, or of a PyTorch without it."""
    zen4 = load_hardware("epyc-zen4-2c")
    assert "onednn" in dict(zen4.gemm_flops_per_s)
    told = replace(FOUND, gemm=(("float32", 512, 2e11),), rates=())
    assert "onednn" not in dict(apply(zen4, told).gemm_flops_per_s)
    both = replace(told, gemm=(*told.gemm, ("onednn", 512, 3e11)))
    measured = apply(zen4, both)
    assert measured.gemm_rate("onednn") == pytest.approx(3e11)
    assert "gemm_flops_per_s.onednn" in measured.measured
    assert HardwareSpec.from_dict(measured.to_dict()) == measured


def test_a_guess_of_exponentials_to_base_2_goes_where_those_to_base_e_were_measured() -> None:
    zen4 = load_hardware("epyc-zen4-2c")
    assert zen4.exp2_per_s > zen4.exp_per_s
    told = replace(FOUND, rates=(("exp_per_s", 1e9),))
    assert apply(zen4, told).exp2_per_s == 0
    both = apply(zen4, replace(told, rates=(*told.rates, ("exp2_per_s", 3e9))))
    assert (both.exp_per_s, both.exp2_per_s) == (1e9, 3e9)
    assert "exp2_per_s" in both.measured
