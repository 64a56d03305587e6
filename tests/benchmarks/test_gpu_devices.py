"""What only a GPU does, against a PyTorch whose CUDA functions are stand-ins: order and sums."""

from __future__ import annotations

import stat
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import devices
from benchmarks.gpu.cases import Ceiling
from benchmarks.gpu.ceilings import measure_ceiling
from benchmarks.gpu.devices import Step

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


class Clock:
    """Counts milliseconds that pass when something runs; what was recorded is readable only after
    a synchronisation."""

    def __init__(self) -> None:
        self.now, self.synchronised = 0.0, -1.0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        found = SimpleNamespace(at=None)
        found.record = lambda: setattr(found, "at", self.now)

        def elapsed(other):
            assert other.at <= self.synchronised
            return other.at - found.at

        found.elapsed_time = elapsed
        return found

    def synchronize(self, device=None) -> None:
        self.synchronised = self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    return found


def step_taking(clock: Clock, forward_ms: float, backward_ms: float) -> Step:
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.now += forward_ms
            return x.sum()

        @staticmethod
        def backward(ctx, outer):
            clock.now += backward_ms
            return outer.expand(3)

    x = torch.ones(3, requires_grad=True)
    return Step(lambda: Loss.apply(x), (x,))


def test_forward_and_backward_are_told_apart(clock):
    times = devices.step_times(step_taking(clock, 2.0, 5.0), GPU, expected_s=0.007)
    assert len(times) == 3  # 20 ms of calls of 7 ms
    assert {(round(t.forward_s, 9), round(t.backward_s, 9)) for t in times} == {(0.002, 0.005)}


def test_a_short_call_is_warmed_up_and_a_long_one_is_not(clock):
    devices.step_times(step_taking(clock, 1.0, 1.0), GPU, expected_s=0.02)
    assert clock.now == 4.0
    devices.step_times(step_taking(clock, 1.0, 1.0), GPU, expected_s=0.3)
    assert clock.now == 6.0


def test_no_gradient_is_left_behind(clock):
    step = step_taking(clock, 1.0, 1.0)
    devices.step_times(step, GPU, expected_s=1.0)
    assert step.leaves[0].grad is None
    step()
    torch.testing.assert_close(step.leaves[0].grad, torch.ones(3))


def test_a_call_is_timed_behind_another(clock):
    def call() -> None:
        clock.now += 4.0

    assert devices._per_call(call, GPU, 5) == pytest.approx(0.004)
    assert clock.now == 24.0


def test_memory_is_what_comes_on_top(clock, monkeypatch):
    """1000 bytes of inputs; the forward peaks at 300 and keeps 40, the backward at 500."""
    state = SimpleNamespace(now=1000, peak=9999)

    def use(peak: int, kept: int) -> None:
        state.peak = max(state.peak, state.now + peak)
        state.now += kept

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            use(300, 40)
            return x.sum()

        @staticmethod
        def backward(ctx, outer):
            use(460, -20)
            return outer.expand(3)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats",
                        lambda device: setattr(state, "peak", state.now))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.peak)
    x = torch.ones(3, requires_grad=True)
    usage = devices.memory_of(Step(lambda: Loss.apply(x), (x,)), GPU)
    assert usage == devices.Usage(forward_bytes=300, kept_bytes=40, peak_bytes=500)


def test_a_broken_context_is_told_from_a_full_memory(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not devices.is_alive(GPU)

    def full(device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "synchronize", full)
    assert devices.is_alive(GPU) and devices.is_alive(CPU)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """An nvidia-smi that does not know one of two names of the same field."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*clocks_event_reasons*) echo unknown field >&2; exit 2;;\n"
        "*driver_version*GPU-abc*) echo 580.159.04;;\n"
        "*clocks_throttle_reasons*GPU-abc*) echo '1980, 2619, 1980, 41, 120.50, 0x4';;\n"
        "esac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", uuid="abc", multi_processor_count=132, total_memory=80 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    devices._known_fields.cache_clear()
    yield
    devices._known_fields.cache_clear()


@pytest.mark.usefixtures("driver")
def test_clocks_and_driver_are_read():
    found = devices.clocks(GPU)
    assert found["clocks.sm"] == "1980" and found["power.draw"] == "120.50"
    assert found["clocks_throttle_reasons.active"] == "0x4"
    described = devices.describe_device(GPU)
    assert described["driver"] == "580.159.04" and described["total_memory"] == 80 << 30
    assert described["major"] is None  # what this PyTorch does not tell


def test_without_the_drivers_tool_nothing_is_said(monkeypatch, tmp_path):
    devices._known_fields.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.clocks(GPU) == {} and devices.clocks(CPU) == {}


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_setting_of_fp32_products_is_put_back(precision):
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with pytest.raises(KeyError), devices.matmul_precision(GPU, precision):
        assert settings.fp32_precision == precision
        raise KeyError
    assert settings.fp32_precision == before


def test_an_older_pytorch_has_another_name_for_it(monkeypatch):
    settings = SimpleNamespace(allow_tf32=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    with devices.matmul_precision(GPU, "tf32"):
        assert settings.allow_tf32 is True
    assert settings.allow_tf32 is False


def test_what_needs_a_gpu_is_skipped_in_words(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"^skipped: "):
        measure_ceiling(Ceiling("accumulate", "bfloat16", "dY", 8, 8, 8), CPU)
    with pytest.raises(RuntimeError, match="PyTorch sees no GPU"):
        devices.device_of("cuda")
