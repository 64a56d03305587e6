"""Small encoders, batches and plain steps to compare a cached step with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_compiler.step.modules import modules_of

SAMPLES, WIDTH, DIM = 13, 6, 5
"""A prime number of samples: no chunk size divides it."""


def tower(seed: int, *inside: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """[n, WIDTH] → [n, DIM], with ``inside`` between two layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, 8), nn.Tanh(), *inside, nn.Linear(8, DIM)]
    return nn.Sequential(*layers).to(dtype)


def batch(seed: int, samples: int = SAMPLES, dtype: torch.dtype = torch.float64) -> Tensor:
    """[samples, WIDTH]"""
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def contrast(x: Tensor, y: Tensor, logit_scale: Tensor | float = 1.0) -> Tensor:
    """CLIP's loss, dense, of features that are not normalised."""
    logits = logit_scale * x @ y.T
    target = torch.arange(len(x))
    cross_entropy = nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def gradients(*modules: object) -> list[Tensor | None]:
    """Copies of all gradients, and back to none."""
    parameters = [p for m in modules_of(*modules) for p in m.parameters()]
    found = [None if p.grad is None else p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    """Equal up to the order of float64 additions, relative to each gradient's largest element."""
    assert [g is None for g in got] == [w is None for w in want]
    for a, b in zip(got, want, strict=True):
        if a is not None and b is not None:
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


def chunked(encoder: nn.Module, value: Tensor, size: int) -> Tensor:
    """The reference where chunks matter: they run as in a cached step, and keep their graphs."""
    return torch.cat([encoder(part) for part in value.split(size)])


class WatchesBackward(nn.Module):
    """Keeps whether autocast was on in each of its backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast: list[bool] = []

    def forward(self, value: Tensor) -> Tensor:
        if value.requires_grad:
            value.register_hook(lambda _: self.autocast.append(torch.is_autocast_enabled("cpu")))
        return value
