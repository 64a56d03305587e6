"""The whole training step: what caching costs, and whether the planner's chunks are the best.

    python -m benchmarks.step                      # both questions, a few minutes on one thread
    python -m benchmarks.step --quick              # tiny sizes: does it run?
    python -m benchmarks.step --out step.json

*Cost.*  A cached step runs every encoder's forward once more, so that it should take at most
1 + forward / (forward + backward) of the uncached step.  ``cached`` is that ratio at the planner's
chunks, ``by hand`` that of a bare loop over the same chunks without random states, buffers or
checks: what lies between the two is this package's, what lies between ``by hand`` and the bound is
what small chunks cost in PyTorch.

*Chunks.*  The planned step beside steps at every chunk size by hand that holds the same budget.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import normalize

from benchmarks.record import environment, save
from cl_compiler import GradientCache, compile_loss, plan_step
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.measure import interleave, thread_limit
from cl_compiler.units import format_bytes, format_seconds, parse_bytes

ALLOWANCE = 0.05
"""Beside the extra forward."""
_SIZES = 7
"""Chunk sizes by hand: powers of two up to the batch."""
WITHIN = 1.1
"""Of the best chunk found by hand."""


@dataclass(frozen=True)
class Case:
    """A pair of equal encoders, and a batch for a budget.

    kind: "transformer" (two layers over 32 words, dropout) or "perceptron"; dim: of its layers;
    samples: of the batch; budget: of the step, which an uncached step exceeds.
    """

    kind: str
    dim: int
    samples: int
    budget: str
    repeats: int


CASES = (
    Case("transformer", 128, 256, "40MiB", 5),
    Case("perceptron", 512, 4096, "32MiB", 5),
)
QUICK = (Case("transformer", 16, 16, "4MiB", 1), Case("perceptron", 16, 64, "4MiB", 1))


class Transformer(nn.Module):
    """[n, 32] of token numbers → [n, dim] of length 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(4096, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return normalize(self.layers(self.words(tokens)).mean(1), dim=1)


class Perceptron(nn.Module):
    """[n, 128] → [n, 128] of length 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inside = (nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU())
        self.layers = nn.Sequential(nn.Linear(128, dim), *inside, nn.Linear(dim, 128))

    def forward(self, value: Tensor) -> Tensor:
        return normalize(self.layers(value), dim=1)


def made(case: Case) -> tuple[list[nn.Module], list[Tensor]]:
    """Two encoders whose gradients are in place, and their inputs."""
    torch.manual_seed(0)
    if case.kind == "transformer":
        encoders: list[nn.Module] = [Transformer(case.dim) for _ in "xy"]
        inputs = [torch.randint(4096, (case.samples, 32)) for _ in "xy"]
    else:
        encoders = [Perceptron(case.dim) for _ in "xy"]
        inputs = [torch.randn(case.samples, 128) for _ in "xy"]
    for encoder in encoders:
        for parameter in encoder.parameters():
            parameter.grad = torch.zeros_like(parameter)
    return encoders, inputs


def by_hand(
    encoders: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    loss_fn: Callable[..., Tensor],
    chunks: Sequence[int],
) -> None:
    """A cached step without anything that makes it exact: two loops and a loss."""
    embeddings = []
    with torch.no_grad():
        for encoder, value, size in zip(encoders, inputs, chunks, strict=True):
            embeddings.append(torch.cat([encoder(part) for part in value.split(size)]))
    for embedding in embeddings:
        embedding.requires_grad_()
    loss_fn(*embeddings, logit_scale=10.0).backward()
    for encoder, value, embedding, size in zip(encoders, inputs, embeddings, chunks, strict=True):
        assert embedding.grad is not None
        for part, gradient in zip(value.split(size), embedding.grad.split(size), strict=True):
            encoder(part).backward(gradient)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Of live tensors, once everything is compiled."""
    step()
    with LiveBytes() as live:
        step()
    return live.peak_bytes


def measure(case: Case) -> dict[str, Any]:
    """One case: seconds of every step, in turns, and what they say."""
    encoders, inputs = made(case)
    budget = parse_bytes(case.budget)
    loss_fn = compile_loss("auto", budget // 2)
    plan = plan_step(encoders, inputs, loss_fn, budget)

    def cached(sizes: Any) -> Callable[[], Any]:
        step = GradientCache(encoders, loss_fn, chunk_sizes=sizes)
        return lambda: step(*inputs, logit_scale=10.0)

    def forward() -> None:
        for encoder, value in zip(encoders, inputs, strict=True):
            encoder(value)

    def uncached() -> None:
        parts = [encoder(value) for encoder, value in zip(encoders, inputs, strict=True)]
        loss_fn(*parts, logit_scale=10.0).backward()

    planned = list(plan.chunk_sizes)
    sizes = [n for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if n <= case.samples]
    sizes = sizes[-_SIZES:]
    peaks = {size: peak_bytes(cached(size)) for size in sizes}
    calls = {
        "forward": forward,
        "uncached": uncached,
        "by hand": lambda: by_hand(encoders, inputs, loss_fn, planned),
        "planned": cached(planned),
        **{f"chunks of {n}": cached(n) for n in sizes if peaks[n] <= budget},
    }
    found = interleave(calls, case.repeats, clock="cpu")
    seconds = {name: [s.seconds for s in timing.samples] for name, timing in found.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    chunks = {name: s for name, s in medians.items() if name.startswith("chunks of")}
    best = min(chunks, key=lambda name: chunks[name])
    whole = medians["uncached"]
    return {
        "case": asdict(case),
        "chunk_sizes": planned,
        "planned_peak_bytes": peak_bytes(calls["planned"]),
        "uncached_peak_bytes": peak_bytes(uncached),
        "predicted_s": plan.seconds,
        "bound": 1 + medians["forward"] / whole + ALLOWANCE,
        "cached": medians["planned"] / whole,
        "by_hand": medians["by hand"] / whole,
        "best": best,
        "planned_over_best": medians["planned"] / chunks[best],
        "seconds": seconds,
        "medians": medians,
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """One case as text."""
    case = found["case"]
    console.print(
        f"\n{case['kind']}, dim {case['dim']}, {case['samples']:,} pairs within {case['budget']}: "
        f"chunks {found['chunk_sizes']}, peak {format_bytes(found['planned_peak_bytes'])} "
        f"(uncached {format_bytes(found['uncached_peak_bytes'])})"
    )
    table = Table("step", "median, CPU time", "of uncached", box=None)
    for name, seconds in found["medians"].items():
        table.add_row(
            name, format_seconds(seconds), f"{seconds / found['medians']['uncached']:.2f}"
        )
    console.print(table)
    holds = "holds" if found["cached"] <= found["bound"] else "EXCEEDED"
    console.print(
        f"cost of caching {found['cached']:.3f} (by hand {found['by_hand']:.3f}), "
        f"bound {found['bound']:.3f}: {holds}"
    )
    holds = "holds" if found["planned_over_best"] <= WITHIN else "EXCEEDED"
    console.print(
        f"planned takes {found['planned_over_best']:.3f} of the best by hand "
        f"({found['best']}), allowed {WITHIN}: {holds}"
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", choices=[case.kind for case in CASES])
    parser.add_argument("--out", type=Path, help="write every repetition as JSON")
    given = parser.parse_args(arguments)
    console = Console()
    cases = [c for c in (QUICK if given.quick else CASES) if given.only in (None, c.kind)]
    results = []
    with thread_limit(1):
        for case in cases:
            results.append(measure(case))
            show(console, results[-1])
    if given.out is not None:
        save(given.out, {"environment": environment(), "cases": results})
    return results


if __name__ == "__main__":
    main()
