"""The two losses that are compared, and the largest batch of each under the same memory budget.

``compiled`` is what ``compile_loss`` makes; ``dense`` is the CLIP loss as one writes it in PyTorch.
Bytes are measured with ``LiveBytes`` around forward and backward: results, saved tensors, returned
gradients and workspaces, not the inputs.  Scratch memory inside an operator is not seen, which
favours the dense loss, whose operators are larger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.units import format_bytes

__all__ = [
    "Arm",
    "MemoryPoint",
    "PlannedLoss",
    "compiled_arm",
    "dense_arm",
    "dense_loss",
    "measure_bytes",
    "memory_points",
    "plan_loss",
]

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, D], y [B, D], logit scale []) -> []; differentiable."""


@dataclass(frozen=True)
class PlannedLoss:
    """A loss for one batch size; ``predicted_bytes`` is what its planner promises."""

    function: LossFunction
    predicted_bytes: int
    explanation: str
    source_path: str


PlanLoss = Callable[[int, int, int], PlannedLoss]
"""(batch, dim, budget in bytes) -> the loss planned for them."""


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.  ``compile_s`` is what it took to make the loss, once."""

    name: str
    batch: int
    function: LossFunction
    measured_bytes: int
    predicted_bytes: int | None = None
    explanation: str = ""
    source_path: str = ""
    compile_s: float = 0.0


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes at one batch size.  ``dense_bytes`` is counted on the meta device: nothing is
    allocated, so it is known for batches that would not fit.
    """

    batch: int
    dense_bytes: int
    compiled_predicted_bytes: int
    compiled_measured_bytes: int


def plan_loss(batch: int, dim: int, budget_bytes: int) -> PlannedLoss:
    """Compile the CLIP loss for this machine's CPU, ahead of time.

    Raises:
        BudgetError: no plan fits; the message names the largest batch that would.
    """
    from cl_compiler import Problem, compile_loss
    from cl_compiler.hardware.detect import detect_cpu

    loss_fn = compile_loss(detect_cpu(), budget_bytes, problem=Problem(batch, batch, dim))

    def function(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        value: Tensor = loss_fn(x, y, logit_scale=scale)
        return value

    return PlannedLoss(
        function,
        loss_fn.plan.peak_bytes,
        loss_fn.explain(),
        loss_fn.source_path or "",
    )


def dense_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The CLIP loss in plain PyTorch: the whole similarity matrix, two cross entropies."""
    sim = scale * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target)) / 2


def measure_bytes(function: LossFunction, batch: int, dim: int, device: str = "cpu") -> int:
    """Peak bytes that one forward and backward of ``function`` allocates beside its inputs."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    x, y = (
        F.normalize(torch.randn(batch, dim, device=device, generator=generator)).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(14.0, device=device, requires_grad=True)
    with LiveBytes() as live:
        function(x, y, scale).backward()  # type: ignore[no-untyped-call]
    peak_bytes: int = live.peak_bytes
    return peak_bytes


def compiled_arm(batch: int, dim: int, budget_bytes: int, plan: PlanLoss) -> Arm:
    """The compiled loss at ``batch``, measured at its first call."""
    started = time.perf_counter()
    planned = plan(batch, dim, budget_bytes)
    compile_s = time.perf_counter() - started
    return Arm(
        "compiled",
        batch,
        planned.function,
        measure_bytes(planned.function, batch, dim),
        planned.predicted_bytes,
        planned.explanation,
        planned.source_path,
        compile_s,
    )


def dense_arm(dim: int, budget_bytes: int, max_batch: int) -> Arm:
    """The dense loss at the largest batch, a multiple of 8, that is measured to fit the budget.

    Raises:
        ArgumentError: not even a batch of 8 fits.
    """

    def seems_to_fit(eights: int) -> bool:  # counted, so that nothing large is allocated
        return measure_bytes(dense_loss, 8 * eights, dim, "meta") <= budget_bytes

    good, bad = 0, max_batch // 8 + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if seems_to_fit(middle) else (good, middle)
    while good > 0:
        measured_bytes = measure_bytes(dense_loss, 8 * good, dim)
        if measured_bytes <= budget_bytes:
            return Arm("dense", 8 * good, dense_loss, measured_bytes)
        good -= 1
    raise ArgumentError(
        f"the dense loss at width {dim} does not fit {format_bytes(budget_bytes)} even at a "
        "batch of 8; give a larger --budget"
    )


def memory_points(
    batches: Sequence[int], dim: int, budget_bytes: int, plan: PlanLoss
) -> tuple[MemoryPoint, ...]:
    """Predicted and measured bytes of the compiled loss, and the dense loss's, at ``batches``."""
    points = []
    for batch in batches:
        planned = plan(batch, dim, budget_bytes)
        points.append(
            MemoryPoint(
                batch,
                measure_bytes(dense_loss, batch, dim, "meta"),
                planned.predicted_bytes,
                measure_bytes(planned.function, batch, dim),
            )
        )
    return tuple(points)
