"""What ranks do in ``test_groups.py``: groups of some ranks, meshes, cached steps, copies."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from cl_compiler import GradientCache, compile_loss
from cl_compiler.lang.ring import HALF_RING, HOST
from cl_compiler.runtime import group_loss
from cl_compiler.runtime.live_bytes import LiveBytes
from tests.ring.ranks import shards

SCALE = 10.0
SHORT = timedelta(seconds=10)


def dense(members: list[int], rows: tuple[int, ...]) -> tuple[float, dict[int, list[Tensor]]]:
    """The symmetric loss of these ranks' shards in float64: value, and gradients of each."""
    drawn = {m: shards(m, n) for m, n in zip(members, rows, strict=True)}
    parts = {m: [t.detach().double().requires_grad_() for t in drawn[m]] for m in members}
    x, y = (torch.cat([parts[m][k] for m in members]) for k in (0, 1))
    logits, labels = SCALE * x @ y.T, torch.arange(len(x))
    loss = nn.functional.cross_entropy(logits, labels)
    loss = (loss + nn.functional.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return float(loss.detach()), {m: [t.grad for t in ts] for m, ts in parts.items()}


def error(loss_fn: Any, rank: int, members: list[int], rows: tuple[int, ...] = ()) -> float:
    """The largest relative error of value and gradients."""
    rows = rows or (20,) * len(members)
    want, grads = dense(members, rows)
    x, y = shards(rank, rows[members.index(rank)])
    value = loss_fn(x, y, logit_scale=SCALE)
    value.backward()
    found = [abs(float(value.detach()) - want) / want]
    for got, true in zip((x.grad, y.grad), grads[rank], strict=True):
        found.append(float((got.double() - true).norm() / true.norm()))
    return max(found)


def compiled(**where: Any) -> Any:
    return compile_loss("xeon-amx-2c", "16MiB", grad_convention="global", timeout_s=20, **where)


def partial_groups(rank: int) -> dict[str, Any]:
    """Groups of every other rank, two at once and in turns; a mesh; what a group refuses."""
    found: dict[str, Any] = {}
    pairs = {k: dist.new_group([k, k + 2]) for k in (0, 1)}
    members = [rank % 2, rank % 2 + 2]
    apart = compiled(group=pairs[rank % 2])
    together = compiled(group=dist.group.WORLD)
    found["every other rank"] = error(apart, rank, members)
    found["all ranks"] = error(together, rank, [0, 1, 2, 3])
    found["again"] = error(apart, rank, members)
    in_host = compiled(group=pairs[rank % 2], schedule=HOST)
    found["every other rank, in host memory"] = error(in_host, rank, members, (23, 9))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "data"))
    found["mesh"] = error(compiled(mesh=mesh["data"]), rank, [rank // 2 * 2, rank // 2 * 2 + 1])
    for name, where in (
        ("2-D mesh", {"mesh": mesh}),
        ("no mesh", {"mesh": "WORLD"}),
        ("no member", {"group": pairs[1 - rank % 2]}),
    ):
        try:
            compiled(**where)
        except Exception as refusal:
            found[name] = f"{type(refusal).__name__}: {refusal}"
    apart.close()
    again = compiled(group=pairs[rank % 2])  # the same members once more
    found["after it was closed"] = error(again, rank, members)
    two, three = dist.new_group([0, 1]), dist.new_group([1, 2, 3])  # rank 1 is in both
    if rank < 2:
        found["overlapping, two"] = error(compiled(group=two), rank, [0, 1])
    if rank > 0:
        found["overlapping, three"] = error(compiled(group=three), rank, [1, 2, 3])
    try:
        compiled(group=dist.group.WORLD, precision="wrong" if rank == 2 else "auto")
    except Exception as refusal:
        found["wrong option"] = f"{type(refusal).__name__}: {refusal}"
    found["after a wrong option"] = error(compiled(group=dist.group.WORLD), rank, [0, 1, 2, 3])
    dist.barrier()
    dist.destroy_process_group()
    return found


def later_groups(rank: int) -> dict[str, Any]:
    """Groups beside a loss that lives on some ranks only."""
    found: dict[str, Any] = {}
    pair = [rank // 2 * 2, rank // 2 * 2 + 1]
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if rank < 2:
        # PyTorch numbers what it splits by the groups that a process knows: names may differ.
        halves[0]._set_group_name(f"known to {rank} as")
        first = compiled(group=halves[0])
        found["parents' names differ"] = error(first, rank, pair)
    if rank in (1, 2):  # called after its ranks, and after how many groups each of them knows
        middle = dist.new_group([1, 2], timeout=SHORT, use_local_synchronization=True)
        found["middle"] = error(compiled(group=middle), rank, [1, 2])
    if rank < 2:
        found["again"] = error(first, rank, pair)
        found["in the profiler's list"] = len(distributed_c10d._world.pg_config_info)
        found["known"] = len(distributed_c10d._world.pg_names)
    dist.barrier()  # who ends closes connections, of which others may still be making the last
    return found


def copies(rank: int) -> dict[str, Any]:
    """Copies, pickles, values without gradients, repetition, and the whole step."""
    loss_fn = compiled(group=dist.group.WORLD)
    found: dict[str, Any] = {"plain": error(loss_fn, rank, [0, 1])}
    found["several chunks"] = error(loss_fn, rank, [0, 1], (1300, 700))
    found["deepcopy"] = error(copy.deepcopy(loss_fn), rank, [0, 1])
    loaded = pickle.loads(pickle.dumps(loss_fn))
    try:
        loaded(*shards(rank), logit_scale=SCALE)
    except Exception as refusal:
        found["without a group"] = str(refusal)
    found["pickled"] = error(loaded.with_group(dist.group.WORLD), rank, [0, 1])
    x, y = shards(rank)
    with torch.no_grad():
        values = {float(loss_fn(x, y, logit_scale=SCALE)) for _ in range(3)}
    found["values"] = len(values)
    grads = []
    for _ in range(2):
        grads.append(torch.autograd.grad(loss_fn(x, y, logit_scale=SCALE), [x, y]))
    found["bitwise"] = all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    found["explained"], found["repr"] = loss_fn.explain(), repr(loss_fn)
    towers = [nn.Linear(8, 6), nn.Linear(8, 6)]
    for seed, tower in enumerate(towers):
        torch.manual_seed(seed)
        nn.init.normal_(tower.weight)
    a, b = (t.detach() for t in shards(rank))
    loss_fn(towers[0](a), towers[1](b), logit_scale=0.5).backward()
    want = [t.weight.grad.clone() for t in towers]
    for tower in towers:
        tower.zero_grad()
    GradientCache(towers, loss_fn, chunk_sizes=7)(a, b, logit_scale=0.5)
    found["whole step"] = max(
        float((t.weight.grad - w).norm() / w.norm()) for t, w in zip(towers, want, strict=True)
    )
    return found


CANONICAL_SHARES = {
    1: (8,),
    2: (3, 5),
    3: (3, 0, 5),
    4: (2, 1, 4, 1),
    8: (1,) * 8,
}
"""Chunks of every rank: eight in all."""


def canonical(rank: int) -> dict[str, str]:
    """Digests of the value and of every chunk's gradients, by place; what a group refuses."""
    shares = CANONICAL_SHARES[dist.get_world_size()]
    chunk, first = 256, sum(shares[:rank])
    x, y = shards(0, 8 * chunk, 24)  # the same on all ranks
    mine = slice(first * chunk, (first + shares[rank]) * chunk)
    x, y = (t.detach()[mine].clone().requires_grad_() for t in (x, y))
    loss_fn = compiled(group=dist.group.WORLD, deterministic="canonical")
    scale = torch.tensor(20.0, requires_grad=True)
    value = loss_fn(x, y, logit_scale=scale)
    value.backward()
    found = {"value": _digest(value), "logit_scale": _digest(scale.grad)}
    for name, grad in (("x", x.grad), ("y", y.grad)):
        for k, part in enumerate(grad.split(chunk) if len(grad) else ()):
            found[f"{name}{first + k}"] = _digest(part)
    try:
        loss_fn(*shards(rank, 100), logit_scale=SCALE)
    except Exception as refusal:
        found["refused"] = f"{type(refusal).__name__}: {refusal}"
    return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:12]


def posted(rank: int, schedules: list[str], rows: int, width: int) -> dict[str, dict[str, Any]]:
    """Bytes of matrices that this rank sends to each other one, and holds, beside the plan's.

    ``remote``: how many matrices that others sent it holds at once, and the largest's bytes.  Half
    rings have a loss of one set.
    """
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    plain, sent = group_loss.guarded_ring, Counter[int]()
    remote: dict[int, int] = {}
    most = [0, 0]

    def came(tensors: Any) -> None:
        for storage in (t.untyped_storage() for t in tensors if t.dim() > 1 and t.numel()):
            if storage._cdata not in remote:
                remote[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, remote.pop, storage._cdata)
        most[:] = max(most[0], len(remote)), max(most[1], *remote.values(), 0)

    def ring_of(*args: Any) -> Any:
        ring = plain(*args)
        others = [peer for peer in range(ring.world_size) if peer != rank]

        def counting(name: str, targets: Any) -> None:
            method = getattr(ring, name, None)
            if method is None:
                return

            def post(*tensors_and_peers: Any) -> Any:
                for peer, tensors in targets(*tensors_and_peers):
                    matrices = [t for t in tensors if t.dim() > 1]
                    sent[peer] += sum(t.numel() * t.element_size() for t in matrices)
                if name == "exchange":
                    came(tensors_and_peers[1])
                return method(*tensors_and_peers)

            setattr(ring, name, post)

        counting("exchange", lambda out, into, after, *_: [(after, out)])
        counting("gather", lambda out, into: [(peer, out) for peer in others])
        # of [ranks, rows, ...] each rank gets its own part; vectors of rows are [ranks, rows]
        counting("swap", lambda out, into: [(p, [t[p] for t in out]) for p in others])
        counting("spread", lambda owner, out: [(p, out) for p in others if owner == rank])
        return ring

    group_loss.guarded_ring = ring_of
    found = {}
    for schedule in schedules:
        loss_fn = compile_loss(
            "xeon-amx-2c",
            "2560KiB" if schedule == HOST else "64MiB",  # several blocks
            loss="nt_xent" if schedule == HALF_RING else "clip",
            group=dist.group.WORLD,
            schedule=schedule,
            timeout_s=20,
        )
        one_set = loss_fn.signature.single_set
        for _ in range(2):  # the second call makes nothing that stays
            x, y = shards(rank, rows, width)
            sent.clear()
            most[:] = 0, 0
            with LiveBytes() as live:
                loss_fn(*((x,) if one_set else (x, y)), logit_scale=SCALE).backward()
        plan = loss_fn.plan
        found[schedule] = {
            "sent": {peer: count for peer, count in sent.items() if count},
            "live": live.peak_bytes,
            "planned_sent": plan.cluster.forward_bytes + plan.cluster.backward_bytes,
            "planned_live": plan.peak_bytes,
            "chunk": plan.cluster.chunk,
            "resident": plan.cluster.resident,
            "remote": tuple(most),
            "links": [
                (ln.level, ln.forward_bytes + ln.backward_bytes) for ln in plan.cluster.links
            ],
        }
        loss_fn.close()
    return found
