"""The limits of a device, measured: copies, launches, and the library's matrix products.

Operands are random: zeros multiply and copy faster than data.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Ceiling
from benchmarks.gpu.devices import call_seconds, matmul_precision
from benchmarks.gpu.mixed import add_product

__all__ = ["measure_ceiling"]

TURNS = 7


@dataclass(frozen=True)
class _Work:
    """A call, how much it does, and in which unit."""

    call: Callable[[], object]
    amount: float
    unit: str


def measure_ceiling(item: Ceiling, device: torch.device, turns: int = TURNS) -> dict[str, Any]:
    """Time one limit.

    Returns:
        Seconds of every turn; ``rate`` is of the median, in ``unit`` per second.

    Raises:
        RuntimeError: the device or this PyTorch cannot do it.
    """
    with torch.no_grad(), _precision(item, device):
        work = _work(item, device)
        seconds = call_seconds(work.call, device, turns)
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "error": "",
        "median_s": median,
        "seconds": seconds,
        "rate": work.amount / median,
        "unit": work.unit,
    }


def _precision(item: Ceiling, device: torch.device) -> AbstractContextManager[None]:
    return matmul_precision(device, "tf32" if item.dtype == "tf32" else "ieee")


def _work(item: Ceiling, device: torch.device) -> _Work:
    match item.kind:
        case "copy":
            source = _random(device, torch.float32, item.M // 4)
            target = torch.empty_like(source)
            return _Work(lambda: target.copy_(source), 2.0 * item.M, "B/s")
        case "link":
            host = _random(torch.device("cpu"), torch.float32, item.M // 4)
            host = host.pin_memory() if device.type == "cuda" else host
            target = torch.empty_like(host, device=device)
            return _Work(lambda: target.copy_(host, non_blocking=True), float(item.M), "B/s")
        case "launch":
            few = _random(device, torch.float32, item.M)
            return _Work(lambda: few.add_(1.0), 1.0, "calls/s")
        case "gemm" | "accumulate":
            left, right = _operands(item, device)
            flops = 2.0 * item.M * item.N * item.K
            product = _product if item.kind == "gemm" else _accumulate
            return _Work(product(left, right), flops, "FLOP/s")
    raise ValueError(f"no ceiling {item.kind!r}")


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def _operands(item: Ceiling, device: torch.device) -> tuple[Tensor, Tensor]:
    """[M, K] and [K, N] with the strides that the product has in a loss."""
    dtype = torch.float32 if item.dtype == "tf32" else getattr(torch, item.dtype)
    match item.shape:
        case "dX":  # G [m, n] times Y [n, D]
            left, right = (item.M, item.K), (item.K, item.N)
            return _random(device, dtype, *left), _random(device, dtype, *right)
        case "dY":  # G [m, n] transposed times X [m, D]
            gradient = _random(device, dtype, item.K, item.M)
            return gradient.T, _random(device, dtype, item.K, item.N)
        case _:  # X [m, D] times Y [n, D] transposed
            return _random(device, dtype, item.M, item.K), _random(device, dtype, item.N, item.K).T


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    out = torch.empty(left.shape[0], right.shape[1], device=left.device, dtype=left.dtype)
    return lambda: torch.mm(left, right, out=out)


def _accumulate(left: Tensor, right: Tensor) -> Callable[[], object]:
    """A 16-bit product added to fp32 sums: what a gradient over panels needs."""
    if left.device.type == "cpu":
        raise RuntimeError("skipped: torch.addmm(out_dtype=) is for GPUs")
    sums = torch.zeros(left.shape[0], right.shape[1], device=left.device)
    return lambda: add_product(sums, left, right)
