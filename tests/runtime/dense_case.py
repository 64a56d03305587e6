"""What the tests of ``CompiledLoss`` compare with: textbook formulas of two losses, and inputs.

One loss recomputes in its backward (clip), the other makes gradients in its forward (siglip).  The
formulas are PyTorch's own, not the package's reference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler import compile_loss
from cl_compiler.runtime.function import CompiledLoss

LOSSES = {"clip": {"logit_scale": 5.0}, "siglip": {"logit_scale": 5.0, "logit_bias": -1.0}}
EXACT = 1e-11
"""Relative error of float64 results: a few thousand roundings of 1.1e-16."""


def compiled(name: str, **options: object) -> CompiledLoss:
    return compile_loss("auto", "64MiB", loss=name, **options)  # type: ignore[arg-type]


def dense(name: str, x: Tensor, y: Tensor, logit_scale: object, logit_bias: object = 0.0) -> Tensor:
    """The formula, in the precision of its inputs; x [M, D], y [N, D], M <= N."""
    logits = logit_scale * (x @ y.T) + logit_bias  # type: ignore[operator]
    target = torch.arange(len(x))
    if name == "clip":
        columns = F.cross_entropy(logits.T[: len(x)], target)
        return (F.cross_entropy(logits, target) + columns) / 2
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def embeddings(
    seed: int, m: int = 37, n: int = 53, d: int = 24, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """x [m, d] and y [n, d] of unit length; positives stand out, but are far from certain."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (m, n))
    y[:m] += 0.4 * x[:n]
    return tuple(F.normalize(t, dim=1).to(dtype).requires_grad_() for t in (x, y))  # type: ignore[return-value]


def scalars(
    name: str, *, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return {k: torch.full(shape, v, dtype=dtype).requires_grad_() for k, v in LOSSES[name].items()}


def expected(name: str, **tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of the formula in float64, whatever the inputs' dtypes."""
    doubles = {
        k: v.detach().double().reshape(() if v.numel() == 1 else v.shape).requires_grad_()
        for k, v in tensors.items()
    }
    value = dense(name, **doubles)
    found = torch.autograd.grad(value, list(doubles.values()))
    return value.detach(), dict(zip(doubles, found, strict=True))


def error(got: Tensor | None, want: Tensor) -> float:
    """Euclidean, relative to ``want``."""
    assert got is not None
    got, want = got.detach().double(), want.detach().double()
    return float((got - want.reshape(got.shape)).norm() / want.norm())


def errors(
    value: Tensor, tensors: Mapping[str, Tensor], want: tuple[Tensor, Mapping[str, Tensor]]
) -> dict[str, float]:
    """Of the value and of each ``.grad``."""
    of_gradients = {name: error(t.grad, want[1][name]) for name, t in tensors.items()}
    return {"value": error(value, want[0]), **of_gradients}
