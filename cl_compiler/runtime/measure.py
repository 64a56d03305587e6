"""Measure calls on a machine that others may use too: time, live tensor bytes, process growth.

Alternatives are interleaved, one repetition of each per round, so that a slow minute slows all of
them.  One thread is timed in CPU time of the process, which waiting does not lengthen; several
threads in wall time, where a repetition during which other processes ran is marked ``dirty`` and
left out of the median as long as clean ones remain.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.busy import CpuTimes, foreign_cores
from cl_compiler.runtime.live_bytes import LiveBytes

__all__ = [
    "Call",
    "Memory",
    "Sample",
    "Timing",
    "describe",
    "interleave",
    "measure_memory",
    "planted_pairs",
    "quiet_shares",
    "relative_error",
    "thread_limit",
]

Call = Callable[[], object]

FOREIGN_LIMIT = 0.08
"""CPU seconds of other processes per second of wall time above which a repetition is dirty."""
SHORTEST_S = 0.2
"""A repetition repeats its call until it has lasted this long: /proc/stat counts 10 ms ticks."""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Sample:
    """One repetition.

    Attributes:
        seconds: per call, of the clock that was asked for.
        wall_s: per call.
        foreign: cores that other processes kept busy meanwhile; None where nobody knows.
    """

    seconds: float
    wall_s: float
    foreign: float | None

    @property
    def dirty(self) -> bool:
        return self.foreign is not None and self.foreign > FOREIGN_LIMIT


@dataclass(frozen=True)
class Timing:
    """Every repetition of one alternative, or the error that stopped it."""

    samples: tuple[Sample, ...] = ()
    error: str = ""

    @property
    def clean(self) -> tuple[Sample, ...]:
        """The repetitions that count: the undisturbed ones, or all if fewer than half are."""
        undisturbed = tuple(s for s in self.samples if not s.dirty)
        return undisturbed if 2 * len(undisturbed) >= len(self.samples) else self.samples

    @property
    def median_s(self) -> float | None:
        """Median seconds per call; None if nothing was measured."""
        return statistics.median(s.seconds for s in self.clean) if self.samples else None

    @property
    def dirty_count(self) -> int:
        return sum(s.dirty for s in self.samples)


@dataclass(frozen=True)
class Memory:
    """What one call took beyond what existed before it.

    Attributes:
        seconds: wall time of the call.
        live_bytes: peak of live tensor storages; None if the call hides its tensors from PyTorch's
            dispatcher (compiled graphs do) or failed.
        process_bytes: growth of the process's resident high-water mark, which includes scratch
            memory of libraries; None where the system cannot reset that mark.
    """

    seconds: float
    live_bytes: int | None
    process_bytes: int | None


def interleave(
    calls: Mapping[str, Call],
    repeats: int,
    *,
    clock: str,
    known_s: Mapping[str, float] | None = None,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Time alternatives in turns.

    Args:
        calls: name → what to time.
        repeats: repetitions of each.
        clock: "cpu" (process CPU time: for one thread) or "wall".
        known_s: wall seconds per call where an earlier call has told them; the others are called
            once before anything is timed.
        advance: told the name after every repetition and warm-up.

    Returns:
        name → its repetitions; a call that raises has an ``error`` and takes no further part.

    Raises:
        ArgumentError: no such clock, or ``repeats`` below 1.
    """
    if clock not in ("cpu", "wall"):
        raise ArgumentError(f"clock={clock!r}: use 'cpu' or 'wall'.")
    if repeats < 1:
        raise ArgumentError(f"repeats={repeats}: measure at least once.")
    timings = {name: Timing() for name in calls}
    counts = {name: _count(seconds) for name, seconds in (known_s or {}).items()}
    for name, call in calls.items():
        if name not in counts:
            timings[name], counts[name] = _first(call)
            advance(name)
    for _ in range(repeats):
        for name, call in calls.items():
            before = timings[name]
            if before.error:
                continue
            try:
                sample = _repetition(call, counts[name], clock)
            except Exception as error:
                timings[name] = replace(before, error=describe(error))
            else:
                timings[name] = replace(before, samples=(*before.samples, sample))
            advance(name)
    return timings


def _first(call: Call) -> tuple[Timing, int]:
    """(what went wrong if anything, calls per repetition)."""
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return Timing(error=describe(error)), 1
    seconds = time.perf_counter() - start
    if seconds < SHORTEST_S:  # the first call also loads and compiles; the second says more
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return Timing(), _count(seconds)


def _count(seconds: float) -> int:
    return max(1, math.ceil(SHORTEST_S / max(seconds, 1e-6)))


def describe(error: BaseException) -> str:
    """An error as one line of a table."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def _repetition(call: Call, count: int, clock: str) -> Sample:
    gc.collect()
    before = CpuTimes.now()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        call()
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    foreign = foreign_cores(before, CpuTimes.now(), wall)
    return Sample((cpu if clock == "cpu" else wall) / count, wall / count, foreign)


def quiet_shares(timings: Mapping[str, Timing]) -> str:
    """How much of a measurement was disturbed, in words."""
    samples = [s for t in timings.values() for s in t.samples]
    dirty = sum(s.dirty for s in samples)
    if not dirty:
        return f"{len(samples)} repetitions, none disturbed"
    return f"{dirty} of {len(samples)} repetitions ran beside other processes"


def measure_memory(call: Call, *, visible: bool = True) -> Memory:
    """See how much memory a call takes: run it once for the process and once for its tensors.

    Args:
        call: allocates its results itself; what it returns is dropped afterwards.
        visible: its tensors pass PyTorch's dispatcher, so that they can be counted.
    """
    gc.collect()
    before = _reset_high_water()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    after = _status_bytes("VmHWM")
    grown = None if before is None or after is None else max(0, after - before)
    if not visible:
        return Memory(seconds, None, grown)
    with LiveBytes() as live:  # not above: counting takes memory itself
        call()
    return Memory(seconds, live.peak_bytes, grown)


def _reset_high_water() -> int | None:
    """Return freed memory to the system and set the high-water mark to what is resident, bytes."""
    with suppress(AttributeError, OSError):  # not glibc: freed memory may hide some growth
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    return found[0] if found else None


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def planted_pairs(
    rows: int,
    cols: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    cosine: float = 0.5**0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length features as in training: each row resembles the column with its number.

    The cosine of a positive pair is about ``cosine``, that of any other pair about 0 ± 1/√width.

    Returns:
        x [rows, width] and y [cols, width].
    """
    source = torch.Generator(device).manual_seed(seed)
    x = torch.randn(rows, width, generator=source, device=device)
    y = torch.randn(cols, width, generator=source, device=device)
    shared = min(rows, cols)
    y[:shared].add_(x[:shared], alpha=cosine / (1 - cosine**2) ** 0.5)
    for features in (x, y):
        features.div_(torch.linalg.vector_norm(features, dim=1, keepdim=True))
    return x.to(dtype), y.to(dtype)


def relative_error(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """The largest difference of any tensor from its reference, relative to the latter's largest."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        scale = b.abs().max().item() or 1.0
        worst = max(worst, (a.to(b.dtype) - b).abs().max().item() / scale)
    return worst
