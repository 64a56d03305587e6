"""Measure this machine's GEMM, elementwise and copy rates.

Calibration is explicit (``cl-compiler calibrate``): nothing measures behind a user's back, and
without one the nominal rates of ``detect`` are planned with.

One thread is timed by its own CPU time, which other processes hardly change; all threads by wall
time, which they spoil easily.  A rate is the better of the two medians, and a machine whose
threads gain little is reported as disturbed.  Data is random: zeros multiply and copy faster.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cl_compiler.hardware.calibration import Calibration, apply, fingerprint, load, store
from cl_compiler.hardware.cpu import cpu_facts
from cl_compiler.hardware.detect import detect_nominal, torch_version
from cl_compiler.hardware.spec import HardwareSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Calibration", "apply", "calibrate", "load", "measure", "store"]

Call = Callable[[], object]

_TILE = (512, 1024)
_INNER = (256, 512, 1024)
_GAIN_EXPECTED = 0.6
_ATTEMPTS = 3


def calibrate(*, quick: bool = True) -> tuple[HardwareSpec, Calibration]:
    """Measure this machine, store what was found, and return its spec with measured rates.

    Args:
        quick: two to three seconds; otherwise about four times as long.

    Raises:
        CacheError: the result cannot be stored.
    """
    # PyTorch's own thread count is part of the fingerprint, so it is loaded before detection.
    import torch  # noqa: F401

    nominal = detect_nominal()
    result = measure(quick=quick, nominal=nominal)
    store(result)
    if result.disturbed:
        warnings.warn(
            f"{result.threads} threads were only {result.thread_gain:.1f} times as fast as one, so "
            "other processes had the cores and the rates are too low; calibrate again when the "
            "machine is quiet",
            stacklevel=2,
        )
    return apply(nominal, result), result


def measure(*, quick: bool = True, nominal: HardwareSpec | None = None) -> Calibration:
    """Time products, elementwise passes and copies.

    Args:
        quick: five samples of each instead of twenty.
        nominal: the machine's spec; None detects it.  Its cache sizes say what to copy.
    """
    import torch

    nominal = detect_nominal() if nominal is None else nominal
    name = fingerprint(nominal, torch_version())
    samples = 5 if quick else 20
    if nominal.kind == "cpu":
        with torch.inference_mode():
            return _measure_cpu(torch, nominal, name, _Timer(torch, samples))
    with torch.inference_mode():
        return _measure_gpu(torch, nominal, name, samples)


class _Timer:
    """Calls per second with one thread and with all of them."""

    def __init__(self, module: Any, samples: int) -> None:
        self.torch, self.samples = module, samples
        self.threads: int = module.get_num_threads()
        self.gains: list[float] = []

    def rate(self, call: Call, *, scales: bool = True) -> float:
        """Calls per second, the better of one thread and all threads.

        Args:
            call: what is timed.
            scales: whether threads are expected to help, so that a poor gain is tried again.
        """
        with self.one_thread():
            alone = 1 / _median_seconds(call, time.thread_time, self.samples)
        if self.threads == 1:
            return alone
        together = 0.0
        for _ in range(_ATTEMPTS):
            seconds = _median_seconds(call, time.perf_counter, self.samples)
            together = max(together, 1 / seconds)
            if not scales or together >= _GAIN_EXPECTED * self.threads * alone:
                break
        if scales:
            self.gains.append(together / alone)
        return max(alone, together)

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        self.torch.set_num_threads(1)
        try:
            yield
        finally:
            self.torch.set_num_threads(self.threads)


def _median_seconds(
    call: Call, clock: Callable[[], float], samples: int, least_s: float = 2e-3
) -> float:
    """Median seconds per call; each sample repeats the call for at least ``least_s``."""
    call()
    start = clock()
    call()
    repeats = max(1, min(10_000, int(least_s / max(clock() - start, 1e-7))))
    found = []
    for _ in range(samples):
        start = clock()
        for _ in range(repeats):
            call()
        found.append(max(clock() - start, 1e-9) / repeats)
    return statistics.median(found)


# ---- CPU ------------------------------------------------------------------------------------


def _measure_cpu(module: Any, nominal: HardwareSpec, name: str, timer: _Timer) -> Calibration:
    generator = module.Generator().manual_seed(0)

    def random(*shape: int, dtype: Any = None) -> torch.Tensor:
        values: torch.Tensor = module.randn(*shape, generator=generator)
        return values if dtype is None else values.to(dtype)

    with timer.one_thread():
        left, right = random(8), random(8)
        overhead = _median_seconds(lambda: left.add_(right), time.thread_time, timer.samples)
    gemm = list(_cpu_gemm(module, timer, random))
    gain = timer.gains[1] if len(timer.gains) > 1 else 1.0
    return Calibration(
        fingerprint=name,
        gemm=tuple(gemm),
        rates=(*_cpu_elementwise(module, timer, random), ("op_overhead_s", overhead)),
        bandwidths=tuple(_cpu_copies(module, nominal, timer, overhead)),
        thread_gain=gain,
        threads=timer.threads,
    )


def _cpu_gemm(
    module: Any, timer: _Timer, random: Callable[..., Any]
) -> Iterator[tuple[str, int, float]]:
    """(dtype, D, FLOP/s) of [512, D] x [D, 1024]."""
    rows, cols = _TILE
    bf16 = {"amx_bf16", "avx512_bf16"} & set(cpu_facts().features)
    for dtype, storage, inners in (
        ("float32", module.float32, _INNER),
        ("float64", module.float64, (512,)),
        ("bfloat16", module.float32, _INNER if bf16 else ()),
    ):
        out = module.empty(rows, cols, dtype=storage)
        for inner in inners:
            x, y = random(rows, inner, dtype=storage), random(cols, inner, dtype=storage)
            with _cpu_precision(module, "bf16" if dtype == "bfloat16" else "ieee"):
                calls = timer.rate(_product(module, x, y, out))
            yield dtype, inner, 2.0 * rows * cols * inner * calls
    for inner in _INNER if _has_onednn(module) else ():
        out = module.empty(rows, cols)
        x, y = random(rows, inner), random(cols, inner)
        with _cpu_precision(module, "bf16"):
            calls = timer.rate(_product(module, x, y, out))
        yield "onednn", inner, 2.0 * rows * cols * inner * calls


def _has_onednn(module: Any) -> bool:
    """Whether the setting that lets oneDNN round its products leaves them exact, as emitted files
    find out, too: it rounds on matrix units only.
    """
    more = module.full((64, 64), 1 + 2.0**-20, dtype=module.float32, device="cpu")
    with _cpu_precision(module, "bf16"):
        product = module.mm(more, more, out=module.empty_like(more))
    return bool(module.backends.mkldnn.is_available() and product.amin() > 64)


@contextmanager
def _cpu_precision(module: Any, precision: str) -> Iterator[None]:
    """How oneDNN multiplies float32; the setting is global to the process."""
    settings = module.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def _cpu_elementwise(
    module: Any, timer: _Timer, random: Callable[..., Any]
) -> tuple[tuple[str, float], ...]:
    """Elements per second of exp and exp2, and of the mean of an addition and a multiplication."""
    tile, other, out = random(*_TILE), random(*_TILE), module.empty(*_TILE)
    row, column = random(_TILE[0], 1), random(1, _TILE[1])
    elements = tile.numel()
    exponential = timer.rate(lambda: module.exp(tile, out=out))
    binary = timer.rate(lambda: module.exp2(tile, out=out))
    # The two passes of a gradient tile: a broadcast sum, and a product in place of a fresh tile
    # (multiplying in place again and again would end in denormals).
    add = timer.rate(lambda: module.add(row, column, out=out))
    multiply = timer.rate(lambda: module.mul(tile, other, out=out))
    return (
        ("exp_per_s", elements * exponential),
        ("exp2_per_s", elements * binary),
        ("pass_per_s", elements * 2 / (1 / add + 1 / multiply)),
    )


def _cpu_copies(
    module: Any, nominal: HardwareSpec, timer: _Timer, overhead_s: float
) -> Iterator[tuple[str, float]]:
    """(level, bytes/s of one instance), reads plus writes, for DRAM and each shared cache."""
    caches = [level for level in nominal.levels if level.kind == "cache"]
    total, instances = {}, 1
    for level in nominal.levels:
        instances *= level.count
        total[level.name] = level.memory_bytes * instances
    largest = max((total[level.name] for level in caches), default=32 << 20)
    # Two buffers that together exceed every cache twice, within an eighth of the memory.
    dram = min(max(64 << 20, largest), 512 << 20, nominal.device_memory_bytes // 16)
    calls = timer.rate(_copy(module, dram), scales=False)
    if 2 * dram > largest:
        yield "device", 2.0 * dram * calls
    for level in caches:
        instances = total[level.name] // level.memory_bytes
        if instances == 1:
            size = level.memory_bytes // 4
            calls = timer.rate(_copy(module, size), scales=False)
        else:
            # One core's own cache: one thread, and the operator's overhead would show.
            size = level.memory_bytes // 4
            with timer.one_thread():
                seconds = _median_seconds(_copy(module, size), time.thread_time, timer.samples)
            calls = 1 / max(seconds - overhead_s, seconds / 2)
        yield level.name, 2.0 * size * calls


def _product(module: Any, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> Call:
    """x times y transposed into ``out``."""
    return lambda: module.mm(x, y.T, out=out)


def _copy(module: Any, count_bytes: int) -> Call:
    """A copy of so many bytes of random float32."""
    count = max(1, count_bytes // 4)
    block = module.randn(min(count, 1 << 18))
    source = block.repeat(-(-count // block.numel()))[:count].clone()
    target = module.empty_like(source)
    return lambda: target.copy_(source)


# ---- GPU ------------------------------------------------------------------------------------


def _measure_gpu(module: Any, nominal: HardwareSpec, name: str, samples: int) -> Calibration:
    """GEMM rates, HBM and host-link copies and the launch cost of the current GPU.

    Elementwise rates stay nominal: they are those of a tile in registers, which no PyTorch
    operator shows.
    """

    def seconds(call: Call, least_s: float = 2e-2) -> float:
        def synchronised() -> None:
            call()
            module.cuda.synchronize()

        def repeated() -> None:
            for _ in range(repeats):
                call()
            module.cuda.synchronize()

        # Once to load the kernel, once to see how long it takes.
        repeats = 1
        once = _median_seconds(synchronised, time.perf_counter, 1, 0.0)
        repeats = max(1, min(1000, int(least_s / once)))
        return _median_seconds(repeated, time.perf_counter, samples, 0.0) / repeats

    size = 4096
    gemm: list[tuple[str, int, float]] = []
    for dtype in ("float32", "tf32", "bfloat16", "float16"):
        storage = module.float32 if dtype == "tf32" else getattr(module, dtype)
        for inner in (512, 1024, 4096) if dtype == "bfloat16" else (512,):
            x = module.randn(size, inner, device="cuda").to(storage)
            y = module.randn(size, inner, device="cuda").to(storage)
            out = module.empty(size, size, device="cuda", dtype=storage)
            with _gpu_precision(module, "tf32" if dtype == "tf32" else "ieee"):
                taken = seconds(_product(module, x, y, out))
            gemm.append((dtype, inner, 2.0 * size * size * inner / taken))
    source = module.randn(1 << 26, device="cuda")
    target = module.empty_like(source)
    pinned = module.randn(1 << 24).pin_memory()
    few = module.randn(8, device="cuda")
    copy = seconds(lambda: target.copy_(source))
    link = seconds(lambda: target[: 1 << 24].copy_(pinned, non_blocking=True))
    return Calibration(
        fingerprint=name,
        gemm=tuple(gemm),
        rates=(("op_overhead_s", seconds(lambda: few.add_(1.0))),),
        bandwidths=(("device", 8.0 * source.numel() / copy), ("host_link", 4.0 * 2**24 / link)),
        thread_gain=1.0,
        threads=1,
    )


@contextmanager
def _gpu_precision(module: Any, precision: str) -> Iterator[None]:
    """How cuBLAS multiplies float32; the setting is global to the process."""
    settings = module.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before
