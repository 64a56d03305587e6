"""Train two encoders to find code from its description, on as many ranks as torchrun starts.

    torchrun --nproc-per-node 4 examples/train_distributed.py
    python examples/train_distributed.py          # one process: the same curve

The data are the functions of installed packages with their descriptions (``cl-compiler demo``).
Every rank encodes its part of a batch; the loss compares all descriptions with all code, and
DistributedDataParallel averages the gradients of the encoders.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

# Before torch is imported.  Threads that wait by spinning take the core that the other one needs
# as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import platformdirs
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cl_compiler import compile_loss
from cl_compiler.cli.demo.collection import collect
from cl_compiler.cli.demo.encoders import Bags, TwoTowers, hash_bags
from cl_compiler.cli.demo.harvest import split
from cl_compiler.cli.demo.metrics import rank_of_own, retrieval
from cl_compiler.cli.demo.sources import installed_roots

BUCKETS = 1 << 13


class Model(torch.nn.Module):
    """Both towers and the scale behind one wrapper: one reduction for all of it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.towers = TwoTowers(BUCKETS, dim)

    def forward(self, text: Bags, code: Bags) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.towers.text(text), self.towers.code(code), self.towers.logit_scale()


def load(folder: Path, max_files: int) -> tuple[Bags, Bags, torch.Tensor, torch.Tensor]:
    """Descriptions, code, and which of them are for training and for testing."""
    sides = split(collect(installed_roots(), folder, max_files=max_files or None).pairs)
    pairs = (*sides.train, *sides.test)
    train = torch.arange(len(sides.train))
    text = hash_bags([p.text for p in pairs], train, max_words=64, buckets=BUCKETS)
    code = hash_bags([p.code for p in pairs], train, max_words=256, buckets=BUCKETS)
    return text, code, train, torch.arange(len(train), len(pairs))


def train(arguments: argparse.Namespace) -> list[float]:
    """Take the steps; returns the loss of each (the same on every rank)."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    kept = "" if arguments.max_files else f", once for {arguments.data}"
    say(f"rank 0 of {ranks} reads the functions of installed packages{kept}")
    loaded = [load(arguments.data, arguments.max_files) if rank == 0 else None]
    dist.broadcast_object_list(loaded)  # parsed once
    assert loaded[0] is not None
    text, code, members, tests = loaded[0]
    say(f"{len(members)} pairs to train on; {arguments.batch} in a step, all ranks together")
    torch.manual_seed(arguments.seed)
    model = DistributedDataParallel(Model(arguments.dim))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_fn = compile_loss(
        "auto",
        arguments.budget,
        loss="clip",
        group=dist.group.WORLD,
        grad_convention="mean",  # DistributedDataParallel averages
        timeout_s=120,
    )
    order = torch.Generator().manual_seed(arguments.seed)
    losses = []
    for step in range(arguments.steps):
        batch = members[torch.randperm(len(members), generator=order)[: arguments.batch]]
        mine = batch.tensor_split(ranks)[rank]
        x, y, scale = model(text.take(mine), code.take(mine))
        value = loss_fn(x, y, logit_scale=scale)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        if step % 10 == 0 and step + 1 < arguments.steps:
            say(f"step {step:4d}  loss {losses[-1]:.6f}")
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    say(f"step {arguments.steps - 1:4d}  loss {losses[-1]:.6f}  on {where}")
    if rank == 0:
        with torch.no_grad():
            found = model.module(text.take(tests), code.take(tests))
        recall = retrieval(rank_of_own(found[0], found[1])).recall_at_10
        say(f"recall@10 on {len(tests)} functions of other modules: {recall:.1%}")
    dist.barrier()
    loss_fn.close()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048, help="pairs of a step, all ranks'")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--budget", default="16MiB", help="of the loss, on each rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-files", type=int, default=0, help="of each package; 0: all")
    cache = platformdirs.user_cache_dir("cl_compiler_demo", appauthor=False)
    parser.add_argument("--data", type=Path, default=Path(cache))
    arguments = parser.parse_args()
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29555")
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks > 1:  # torchrun would leave each of them one thread
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    train(arguments)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
