"""A device as the benchmark sees it: what it is, its clocks, times, memory, and tidying up.

Every function takes a ``torch.device`` of type "cuda" or "cpu"; the latter is for dry runs.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cl_compiler.runtime.live_bytes import LiveBytes

__all__ = [
    "Step",
    "Times",
    "Usage",
    "call_seconds",
    "clocks",
    "describe_device",
    "device_of",
    "is_alive",
    "kernel_times",
    "matmul_precision",
    "memory_of",
    "release",
    "step_times",
    "synchronize",
]

SHORTEST_S = 0.02
"""A turn repeats its call until it has lasted about this long."""
MOST_CALLS = 50
SLOW_S = 0.25
"""A call that takes longer is timed cold: what a warm-up would change is lost in it."""


@dataclass(frozen=True)
class Step:
    """A loss to be differentiated: ``forward`` gives a scalar, ``leaves`` receive gradients."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]

    def clear(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> Tensor:
        """A forward and a backward; fresh gradients are in the leaves afterwards."""
        self.clear()
        value = self.forward()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()


@dataclass(frozen=True)
class Times:
    """Seconds of one call."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Usage:
    """Bytes beyond what existed before a call, the inputs among it.

    Attributes:
        forward_bytes: peak during the forward; None on a CPU.
        kept_bytes: what the forward leaves for the backward; None on a CPU.
        peak_bytes: over forward and backward, returned gradients included.
    """

    forward_bytes: int | None
    kept_bytes: int | None
    peak_bytes: int


def device_of(name: str) -> torch.device:
    """The device called "cpu" or "cuda".

    Raises:
        RuntimeError: PyTorch sees no GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch sees no GPU; --device cpu is a dry run")
    return torch.device("cuda", torch.cuda.current_device())


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, size and software of a device; only what can be found out."""
    if device.type == "cpu":
        from cl_compiler.hardware.cpu import cpu_facts

        return {"name": cpu_facts().model, "kind": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    fields = ("multi_processor_count", "total_memory", "L2_cache_size", "major", "minor")
    found = {name: getattr(properties, name, None) for name in fields}
    return {
        "name": properties.name,
        "kind": "hip" if torch.version.hip else "cuda",
        **found,
        "cuda": torch.version.cuda,
        "driver": _smi(device, ("driver_version",)).get("driver_version", ""),
        "cublas_precision": str(getattr(torch.backends.cuda.matmul, "fp32_precision", "")),
    }


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, temperature, power and reasons for throttling, as the driver's tool reports them.

    Empty where it cannot say.
    """
    if device.type == "cpu":
        return {}
    return _smi(device, _known_fields(device))


@cache
def _known_fields(device: torch.device) -> tuple[str, ...]:
    """The names that this driver knows: of one field they changed."""
    common = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    for name in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):
        if _smi(device, (*common, name)):
            return (*common, name)
    return common


def _smi(device: torch.device, fields: tuple[str, ...]) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    identity = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if identity is not None:
        command.append(f"--id=GPU-{str(identity).removeprefix('GPU-')}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    values = [cell.strip() for cell in lines[0].split(",")] if lines else []
    return dict(zip(fields, values, strict=False)) if len(values) == len(fields) else {}


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched; an asynchronous error surfaces here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_alive(device: torch.device) -> bool:
    """Whether the device still works: an illegal address breaks a process's context for good."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize(device)
        probe = torch.ones(8, device=device)
        return float(probe.sum()) == 8.0
    except RuntimeError as error:
        return isinstance(error, torch.cuda.OutOfMemoryError)


def release(device: torch.device) -> None:
    """Give freed memory back, so that one provider's leftovers are not the next one's trouble."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # a broken context is found by is_alive
            torch.cuda.empty_cache()


# ---- time -----------------------------------------------------------------------------------


def step_times(step: Step, device: torch.device, expected_s: float) -> list[Times]:
    """One turn: every call's time.

    Args:
        step: a loss.
        device: on which it runs.
        expected_s: of one call, from an earlier one; says how often a turn calls.
    """
    count = _calls(expected_s)
    gc.collect(1)  # what the last turn left: all generations take 0.2 s where compilers are loaded
    gc.disable()
    try:
        if expected_s < SLOW_S:
            step()
        return _event_times(step, count) if device.type == "cuda" else _wall_times(step, count)
    finally:
        gc.enable()
        step.clear()


def _calls(expected_s: float) -> int:
    return max(1, min(MOST_CALLS, round(SHORTEST_S / max(expected_s, 1e-6))))


def _event_times(step: Step, count: int) -> list[Times]:
    events = [[_event() for _ in range(3)] for _ in range(count)]
    for start, between, end in events:
        step.clear()
        start.record()
        value = step.forward()
        between.record()
        value.backward()  # type: ignore[no-untyped-call]
        end.record()
        del value
    torch.cuda.synchronize()
    return [Times(a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3) for a, b, c in events]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _wall_times(step: Step, count: int) -> list[Times]:
    found = []
    for _ in range(count):
        step.clear()
        start = time.perf_counter()
        value = step.forward()
        between = time.perf_counter()
        value.backward()  # type: ignore[no-untyped-call]
        found.append(Times(between - start, time.perf_counter() - between))
        del value
    return found


def call_seconds(call: Callable[[], object], device: torch.device, turns: int) -> list[float]:
    """Seconds per call of something without a backward, one number for each turn."""
    call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    count = max(1, min(1000, round(SHORTEST_S / max(time.perf_counter() - start, 1e-7))))
    return [_per_call(call, device, count) for _ in range(turns)]


def _per_call(call: Callable[[], object], device: torch.device, count: int) -> float:
    if device.type == "cuda":
        start, end = _event(), _event()
        call()  # the first timed one is then launched behind another
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    began = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - began) / count


# ---- memory ---------------------------------------------------------------------------------


def memory_of(step: Step, device: torch.device) -> Usage:
    """What one forward and backward take beyond what exists.

    The step has run before, so that neither compiling nor a library's workspace is counted.
    """
    step.clear()
    gc.collect()
    if device.type == "cpu":
        with LiveBytes() as live:
            step()
        step.clear()
        return Usage(None, None, live.peak_bytes)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    value = step.forward()
    torch.cuda.synchronize(device)
    forward = torch.cuda.max_memory_allocated(device) - before
    kept = torch.cuda.memory_allocated(device) - before
    value.backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del value
    step.clear()
    return Usage(forward, kept, peak)


# ---- kernels --------------------------------------------------------------------------------


def kernel_times(step: Step, device: torch.device) -> list[tuple[str, int, float]]:
    """(kernel, how often, seconds in all) of one forward and backward, the longest first.

    On a CPU these are operators.
    """
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    step()
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as seen:
        step()
        synchronize(device)
    step.clear()
    names = ("self_device_time_total", "self_cuda_time_total") if gpu else ("self_cpu_time_total",)
    found = []
    for event in seen.key_averages():
        taken = next((getattr(event, n) for n in names if hasattr(event, n)), 0.0)
        if taken:
            found.append((str(event.key), int(event.count), float(taken) / 1e6))
    return sorted(found, key=lambda item: -item[2])


# ---- settings -------------------------------------------------------------------------------


@contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """How fp32 operands are multiplied: "ieee" or "tf32"; does nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    settings: Any = torch.backends.cuda.matmul
    name, value = ("fp32_precision", precision)
    if not hasattr(settings, name):  # PyTorch before 2.9
        name, value = "allow_tf32", precision == "tf32"  # type: ignore[assignment]
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)
