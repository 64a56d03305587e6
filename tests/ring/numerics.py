"""What ranks do in ``test_numerics.py``: the losses of the zoo on shards, in real processes."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cl_compiler import compile_loss
from tests import losses_zoo as zoo
from tests.ring.shards import local, split
from tests.zoo_case import sample

ROWS, COLS, WIDTH = 40, 52, 16
HARDWARE = {"blas": "xeon-amx-2c", "onednn": "epyc-zen5-2c"}
"""Where a library multiplies."""


@dataclass(frozen=True)
class Job:
    """One loss, schedule and way to cut; ``scale``: what the embeddings are multiplied by;
    ``size``: rows, columns, width."""

    case: str
    schedule: str
    shares: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    library: str = "blas"
    size: tuple[int, int, int] = (ROWS, COLS, WIDTH)


def drawn(job: Job):
    """(sample, split) of a job: the same in every process."""
    case = next(c for c in zoo.cases() if c.name == job.case)
    whole = sample(case, *job.size, seed=job.seed)
    with torch.no_grad():
        for name in case.operands:
            whole.tensors[name].copy_((whole.tensors[name] * job.scale).to(job.dtype))
    return whole, split(case, *whole.is_positive.shape, job.shares)


def run(rank: int, jobs: list[Job]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """This rank's value and gradients of every job."""
    results = []
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    for job in jobs:
        whole, cut = drawn(job)
        loss_fn = compile_loss(
            HARDWARE[job.library],
            "16MiB",
            loss=whole.case.loss,
            schedule=job.schedule,
            group=dist.group.WORLD,
            grad_convention="global",
            timeout_s=30,
        )
        values = local(whole, cut, rank, job.dtype)
        value = loss_fn(**values)
        value.backward()
        assert loss_fn.plan.library == job.library
        assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # as before
        grads = {n: values[n].grad for n in sorted(whole.case.needs)}
        results.append((float(value.detach()), grads))
        loss_fn.close()
    return results


def numpy_results(rank: int, jobs: list[Job]) -> list[tuple[float, dict[str, object]]]:
    """The same with arrays: tensors would travel through shared memory."""
    return [(v, {n: g.numpy() for n, g in grads.items()}) for v, grads in run(rank, jobs)]
