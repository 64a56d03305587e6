"""What each of two processes does in test_ranks.py: drop-ins over shards of one batch.

    python -m tests.integrations.ranks RANK RENDEZVOUS_FILE

Parameters that all ranks share make this rank's embeddings; the mean of their gradients over ranks,
which DistributedDataParallel takes, has to be that of the whole batch's dense loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from cl_compiler.integrations.gradcache import GradCache
from cl_compiler.integrations.inf_cl import cal_inf_loss
from cl_compiler.integrations.lightly import DCLLoss, NTXentLoss
from cl_compiler.integrations.open_clip import ClipLoss, SigLipLoss
from cl_compiler.integrations.ranks import shards_of
from cl_compiler.integrations.sentence_transformers import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from cl_compiler.losses.retrieval import DIRECTIONS
from tests.integrations.compare import TextModel, texts
from tests.step.encoders import assert_same, batch, contrast, gradients, tower
from tests.step.ranks import counted, local

WORLD, DIM = 2, 6
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Both(nn.Module):
    """A layer for each side, and a scale; equal on all ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(DIM, DIM, dtype=torch.float64) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def gradients(self, loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = loss(normalize(self.a(x), dim=1), normalize(self.b(y), dim=1), self.scale)
        found = torch.autograd.grad(value, list(self.parameters()), allow_unused=True)
        pairs = zip(found, self.parameters(), strict=True)
        return value.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]


def mean_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    for tensor in tensors:
        dist.all_reduce(tensor)
    return [tensor / WORLD for tensor in tensors]


def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    s, target = scale * x @ y.T, torch.arange(len(x))
    return (cross_entropy(s, target) + cross_entropy(s.T, target)) / 2


def siglip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    sign = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -logsigmoid(sign * (scale * x @ y.T - 2)).sum() / len(x)


def infonce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def views(x: Tensor, y: Tensor, _: Tensor, *, decoupled: bool) -> Tensor:
    z, target = torch.cat([x, y]), torch.arange(2 * len(x)).roll(len(x))
    s = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    if not decoupled:
        return cross_entropy(s, target)
    rows = torch.arange(len(z))
    own = s[rows, target]
    return (torch.logsumexp(s.index_put((rows, target), own.new_tensor(-1e9)), 1) - own).mean()


def ranking(x: Tensor, y: Tensor, _: Tensor, *, gathers: bool) -> Tensor:
    """All directions, with hard negatives of each query."""
    loss = MultipleNegativesRankingLoss(
        nn.Identity(),
        scale=7.0,
        gather_across_devices=gathers,
        directions=DIRECTIONS,
        hardness_mode="hard_negatives",
        hardness_strength=0.5,
    )
    return loss.compute_loss_from_embeddings([x, y, y.flip(1)], None)


def guided(x: Tensor, y: Tensor, _: Tensor, *, gathers: bool) -> Tensor:
    """The guide's embeddings follow from the embeddings, so that shards are parts of the batch."""
    model = TextModel(0)
    model.tokenizer = Words()
    loss = CachedGISTEmbedLoss(model, model, temperature=0.2, gather_across_devices=gathers)
    guides = [[side.detach()[:, [1, 0, 3, 2, 5, 4]]] for side in (x, y)]
    return loss.calculate_loss([[x], [y]], guides)


class Words:
    def get_vocab(self) -> dict[str, int]:
        return {}


def cases() -> dict[str, tuple[Loss, Loss, bool]]:
    """name → (drop-in, dense loss of the whole batch, whether each rank returns its own rows')."""
    flags = [(a, b) for a in (False, True) for b in (False, True)]
    clips = {
        f"clip {local} {grad}": (ClipLoss(local, grad, world_size=WORLD), clip, local)
        for local, grad in flags
    }
    siglip_loss = SigLipLoss(world_size=WORLD, dist_impl="shift")

    def weight(a: Tensor, b: Tensor) -> Tensor:
        return ((a - b) ** 2).sum(1)

    return clips | {
        "nt_xent": (
            lambda x, y, _: NTXentLoss(0.5, gather_distributed=True)(x, y),
            lambda *given: views(*given, decoupled=False),
            False,
        ),
        "dcl": (
            lambda x, y, _: DCLLoss(0.5, gather_distributed=True)(x, y),
            lambda *given: views(*given, decoupled=True),
            False,
        ),
        "weighted dcl": (
            lambda x, y, _: DCLLoss(0.5, weight, gather_distributed=True)(x, y),
            lambda x, y, _: DCLLoss(0.5, weight)(x, y),
            False,
        ),
        "siglip": (lambda x, y, s: siglip_loss(x, y, s, -2.0), siglip, True),
        "inf_cl": (lambda x, y, s: cal_inf_loss(x, y, scale=s), infonce, True),
        "inf_cl labels": (
            lambda x, y, s: cal_inf_loss(x, y, torch.arange(len(x)), s),
            infonce,
            True,
        ),
        # With one rank these are tested against formulas and the peer.
        "ranking": (partial(ranking, gathers=True), partial(ranking, gathers=False), False),
        "guided": (partial(guided, gathers=True), partial(guided, gathers=False), False),
    }


def check(name: str, ours: Loss, dense: Loss, own: bool, lengths: list[int], rank: int) -> None:
    """Gradients averaged over ranks are the whole batch's; so is the value, if each rank's counts
    by its rows."""
    model = Both()
    generator = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(sum(lengths), DIM, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    want_value, want = model.gradients(dense, x, y)
    value, found = model.gradients(ours, x.split(lengths)[rank], y.split(lengths)[rank])
    found = mean_over_ranks(found)
    if own:
        (mean,) = mean_over_ranks([value * lengths[rank] * WORLD / sum(lengths)])
        assert (value - mean).abs() > 1e-6, name
        value = mean
    torch.testing.assert_close(value, want_value, rtol=1e-12, atol=0, msg=name)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)
    print(name, lengths, flush=True)


def peers_gradients(rank: int) -> None:
    """What the flags keep: open_clip's default loses a factor of the world size in the encoders,
    Inf-CL's scale gains one."""
    model, lengths = Both(), [5, 5]
    x, y = (torch.randn(10, DIM, dtype=torch.float64) for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    clip_loss = ClipLoss(world_size=WORLD, peer_gradients=True)
    for ours, dense, factors in (
        (clip_loss, clip, {"scale": 1.0, "other": 1 / WORLD}),
        (
            lambda x, y, s: cal_inf_loss(x, y, scale=s, peer_scale_gradient=True),
            infonce,
            {"scale": WORLD, "other": 1.0},
        ),
    ):
        _, want = model.gradients(dense, x, y)
        _, found = model.gradients(ours, x.split(lengths)[rank], y.split(lengths)[rank])
        for name, one, other in zip(names, mean_over_ranks(found), want, strict=True):
            factor = factors.get(name, factors["other"])
            torch.testing.assert_close(one, factor * other, rtol=1e-10, atol=1e-12, msg=name)


def peers_local_gradients(rank: int) -> None:
    """With local_loss and without gather_with_grad: gradients of other ranks' terms are missing."""
    model, lengths = Both(), [5, 5]
    x, y = (torch.randn(10, DIM, dtype=torch.float64) for _ in range(2))
    mine = slice(5 * rank, 5 * rank + 5)

    def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(10)[mine]
        rows = cross_entropy(scale * x[mine] @ y.detach().T, target)
        return (rows + cross_entropy(scale * y[mine] @ x.detach().T, target)) / 2

    want_value, want = model.gradients(dense, x, y)
    loss = ClipLoss(local_loss=True, world_size=WORLD, peer_gradients=True)
    value, found = model.gradients(loss, x.split(lengths)[rank], y.split(lengths)[rank])
    torch.testing.assert_close(value, want_value, rtol=1e-12, atol=0)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def cached_steps_reduce_once(rank: int) -> None:
    """Under DistributedDataParallel: the ranks' mean, one reduction with the last chunk."""
    a, b, x, y = tower(0), tower(1), batch(2 + rank), batch(4 + rank)
    want = local(a, b, loss=lambda: contrast(a(x), b(y)))
    (wrapped_a, in_a), (wrapped_b, in_b) = counted(a), counted(b)
    GradCache([wrapped_a, wrapped_b], [4, 3], contrast)(x, y)
    assert_same(gradients(a, b), want)
    assert (len(in_a), len(in_b)) == (1, 1), (in_a, in_b)

    model, given = TextModel(0), [texts(8, seed=2 * rank + n) for n in range(2)]
    plain = MultipleNegativesRankingLoss(model)
    want = local(model, loss=lambda: plain([dict(features) for features in given], None))
    wrapped, buckets = counted(model)
    CachedMultipleNegativesRankingLoss(wrapped, mini_batch_size=3)(given, None).backward()
    assert_same(gradients(model), want)
    assert len(buckets) == 1, buckets


def main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    assert shards_of(torch.ones(3 + rank)).rows == (3, 4)
    compiled = cases()  # once: what is compiled serves both splits
    for lengths in ([5, 5], [4, 7]):
        for name, (ours, dense, own) in compiled.items():
            check(name, ours, dense, own, lengths, rank)
    torch.manual_seed(3)
    peers_gradients(rank)
    peers_local_gradients(rank)
    cached_steps_reduce_once(rank)
    print("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
