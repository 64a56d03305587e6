"""A limit on live tensors that is kept by force, and a figure of them over time."""

from __future__ import annotations

import time
from pathlib import Path

from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.units import format_bytes


class OverLimit(MemoryError):
    """More than the limit is live."""


class MemoryLimit(LiveBytes):
    """A block in which live tensors beyond ``limit_bytes`` are an error, as on a full device.

    What existed before the block (parameters, batch) does not count; gradients and optimiser state
    that are made inside do.  ``trace``: (seconds, live bytes) at each change.
    """

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self.limit_bytes = limit_bytes
        self.started = time.perf_counter()
        self.trace: list[tuple[float, int]] = []

    def _add(self, change_bytes: int) -> None:
        super()._add(change_bytes)
        self.trace.append((time.perf_counter() - self.started, self.live_bytes))
        if change_bytes > 0 and self.live_bytes > self.limit_bytes:
            raise OverLimit(
                f"{format_bytes(self.live_bytes)} live, limit {format_bytes(self.limit_bytes)}"
            )


def draw(runs: dict[str, MemoryLimit], limit_bytes: int, path: Path) -> None:
    """Live bytes of each run over time, and the limit, as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for name, run in runs.items():
        seconds, live = zip(*run.trace, strict=True)
        axes.plot(seconds, [count / 2**20 for count in live], linewidth=0.8, label=name)
    axes.axhline(limit_bytes / 2**20, color="black", linestyle=":", label="limit")
    axes.set(xlabel="seconds", ylabel="live tensors, MiB", ylim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path)
    pyplot.close(figure)
