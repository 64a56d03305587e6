"""What ranks do in ``test_conventions.py``: gradients through DDP, FSDP2 and by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cl_compiler import compile_loss

FEATURES, WIDTH = 6, 10


class Towers(nn.Module):
    """Two encoders and a learned scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, WIDTH))
        self.b = nn.Linear(FEATURES, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = nn.functional.normalize(self.a(a), dim=1), nn.functional.normalize(self.b(b), dim=1)
        return x, y, self.log_scale.exp()


def batch(sizes: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Inputs of every rank."""
    generator = torch.Generator().manual_seed(7)
    pairs = [torch.randn(2, n, FEATURES, generator=generator, dtype=torch.float64) for n in sizes]
    return [(p[0].to(dtype), p[1].to(dtype)) for p in pairs]


def truth(model: Towers, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Gradients of one process that has the whole batch, in float64."""
    whole = copy.deepcopy(model).double()
    x, y, scale = whole(*(torch.cat([p[k] for p in parts]).double() for k in (0, 1)))
    logits, labels = scale * x @ y.T, torch.arange(len(x))
    loss = nn.functional.cross_entropy(logits, labels)
    ((loss + nn.functional.cross_entropy(logits.T, labels)) / 2).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def added(state, bucket):  # PyTorch reads annotations, and not as text
    """A hook that sums over ranks without dividing."""
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda done: done.value()[0])


def gradients(
    rank: int, wrapper: str, convention: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> dict[str, float]:
    """Relative errors of every parameter's gradient, after what the wrapper does to it."""
    model = Towers().to(dtype)
    parts = batch(sizes, dtype)
    want = truth(model, parts)
    runs: nn.Module = model
    if wrapper == "ddp":
        runs = DistributedDataParallel(model)
        if convention == "sum":
            runs.register_comm_hook(None, added)
    elif wrapper == "fsdp":
        fully_shard(model.a)
        fully_shard(model)
    loss_fn = compile_loss(
        "xeon-amx-2c",
        "16MiB",
        group=dist.group.WORLD,
        grad_convention=convention,  # type: ignore[arg-type]
        timeout_s=20,
    )
    for _ in range(2):  # the second step differentiates with rebuilt buckets
        model.zero_grad(set_to_none=True)
        x, y, scale = runs(*parts[rank])
        loss_fn(x, y, logit_scale=scale).backward()
    errors = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        got = parameter.grad
        got = got.full_tensor() if isinstance(got, DTensor) else got
        if wrapper == "none" and name != "log_scale":
            dist.all_reduce(got)
        errors[name] = float((got.double() - want[name]).norm() / want[name].norm())
    return errors


def several(rank: int, jobs: list[tuple[Any, ...]]) -> list[dict[str, float]]:
    """One after the other, in the same processes."""
    return [gradients(rank, *job) for job in jobs]
