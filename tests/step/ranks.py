"""What each of two or four processes does in test_ranks.py: cached steps, and their reductions.

    python -m tests.step.ranks RANK RENDEZVOUS_FILE PROCESSES

It compares with plain steps itself and prints a line per case; it fails if one is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cl_compiler import GradientCache
from tests.step.encoders import assert_same, batch, chunked, contrast, gradients, tower


class Towers(nn.Module):
    """Both encoders and the scale in one module, as CLIP models are written."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.a = tower(0)
        self.b = self.a if shared else tower(1)
        self.log_scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, value: Tensor, side: str) -> Tensor:
        return (self.a if side == "a" else self.b)(value)


def counted(module: nn.Module, **options: Any) -> tuple[DistributedDataParallel, list[int]]:
    """The module reduced across ranks, and a list that grows with each bucket that is."""
    wrapped, buckets = DistributedDataParallel(module, **options), []

    def hook(state, bucket):  # PyTorch reads annotations, and not as text
        buckets.append(bucket.index())
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, hook)
    return wrapped, buckets


def averaged(found: list[Tensor | None]) -> list[Tensor | None]:
    """The mean over ranks: what a reduction has to give."""
    for gradient in found:
        if gradient is not None:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


def local(*modules: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor | None]:
    loss().backward()
    return averaged(gradients(*modules))


def separate_towers(x: Tensor, y: Tensor, chunk: int) -> None:
    """One wrapper per tower: one reduction each; none inside no_sync, then the sum of both."""
    a, b = tower(0), tower(1)
    want = local(a, b, loss=lambda: contrast(a(x), b(y)))
    (wrapped_a, in_a), (wrapped_b, in_b) = counted(a), counted(b)
    step = GradientCache([wrapped_a, wrapped_b], contrast, chunk_sizes=[chunk, 2])
    for _ in range(2):
        step(x, y)
        assert_same(gradients(a, b), want)
    assert (len(in_a), len(in_b)) == (2, 2), (in_a, in_b)
    with wrapped_a.no_sync(), wrapped_b.no_sync():
        step(x, y)
    assert (len(in_a), len(in_b)) == (2, 2)
    step(x, y)
    assert (len(in_a), len(in_b)) == (3, 3)
    assert_same(gradients(a, b), [2 * w for w in want])


def one_wrapper(x: Tensor, y: Tensor, chunk: int, *, shared: bool, unused: bool) -> None:
    """Both towers and the learned scale behind one wrapper: one reduction of all of it."""
    model = Towers(shared=shared)
    want = local(model, loss=lambda: contrast(model(x, "a"), model(y, "b"), model.log_scale.exp()))
    wrapped, buckets = counted(model, find_unused_parameters=unused)
    step = GradientCache(
        [lambda value: wrapped(value, "a"), lambda value: wrapped(value, "b")],
        contrast,
        chunk_sizes=[chunk, 5],
    )
    for steps in (1, 2):
        step(x, y, logit_scale=model.log_scale.exp())
        assert_same(gradients(model), want)
        # The first step's buckets are rebuilt in the order of readiness: there may be two.
        assert len(buckets) <= 2 * steps, buckets


def sharded_and_checkpointed(x: Tensor, y: Tensor, chunk: int) -> None:
    """``fully_shard`` reduces with the last chunk too; checkpoints beside it draw the same."""

    class Checkpointed(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(6, 6).double(), tower(seed, nn.Dropout(0.4))
            nn.init.eye_(self.first.weight)
            nn.init.zeros_(self.first.bias)

        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(value), use_reentrant=False)

    plain, a, b = Checkpointed(0), Checkpointed(0), Checkpointed(1)
    wrapped, reduced = counted(b)
    torch.manual_seed(5)
    want = local(plain, b, loss=lambda: contrast(chunked(plain, x, chunk), chunked(b, y, 2)))
    fully_shard(a.inner)
    fully_shard(a)
    step = GradientCache([a, wrapped], contrast, chunk_sizes=[chunk, 2])
    for reduces in (True, False):
        a.set_requires_gradient_sync(reduces)
        torch.manual_seed(5)
        if reduces:
            step(x, y)
            got = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients(a, b)]
            assert_same(got, want)
            continue
        with wrapped.no_sync():
            step(x, y)
        assert gradients(a) == [None] * 6  # kept unsharded until the next step that reduces
    a.set_requires_gradient_sync(True)
    torch.manual_seed(5)
    step(x, y)
    got = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients(a, b)]
    assert_same(got, [2 * w for w in want])
    assert len(reduced) <= 4


def main(rank: int, rendezvous: str, processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes
    )
    x, y = batch(10 + rank), batch(20 + rank)
    chunk = (4, 3, 2, 13)[rank]  # the ranks need not have the same number of chunks
    separate_towers(x, y, chunk)
    print("separate towers")
    for shared, unused in ((True, False), (True, True), (False, True)):
        one_wrapper(x, y, chunk, shared=shared, unused=unused)
        print(f"one wrapper, shared={shared}, unused={unused}")
    sharded_and_checkpointed(x, y, 4)  # weights are gathered chunk by chunk: as many on each rank
    print("sharded")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
