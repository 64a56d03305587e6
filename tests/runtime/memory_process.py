"""One fresh process of ``test_memory.py``: how high does its resident memory climb?

``python memory_process.py '{"run": "loss", "M": …, "N": …, "D": …, "budget": …, "threads": …}'``
prints JSON.  What runs is the loss, the products of its tiles ("gemm"), or "nothing"; all else is
identical.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from cl_compiler import Problem, compile_loss
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.measure import planted_pairs

SCALES = (1 / 0.07, 2000.0)
"""Of the logits: small ones share an exponential; at 2000 its sums underflow, and the sweep is
repeated with running maxima, which need other buffers.  A plan has to allow for both."""


def main(request: dict) -> dict:
    torch.set_num_threads(request["threads"])
    sizes = Problem(request["M"], request["N"], request["D"])
    loss_fn = compile_loss("auto", request["budget"], problem=sizes)
    x, y = (t.requires_grad_() for t in planted_pairs(sizes.M, sizes.N, sizes.D))

    def loss(rows: int = sizes.M) -> None:
        few = [t[:rows].detach().requires_grad_() for t in (x, y)] if rows < sizes.M else [x, y]
        for factor in SCALES:
            x.grad = y.grad = None
            scale = torch.tensor(factor, requires_grad=True)
            loss_fn(*few, logit_scale=scale).backward()

    runs = {
        "loss": loss,
        "gemm": lambda: gemm(x.detach(), y.detach(), loss_fn.plan.tile),
        "nothing": lambda: None,
    }
    loss(64)  # code is paged in and threads start: neither is the loss's memory
    x.grad = y.grad = None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark becomes what is resident now
    before = status_bytes("VmHWM")
    runs[request["run"]]()
    after = status_bytes("VmHWM")
    x.grad = y.grad = None
    with LiveBytes() as live:
        runs[request["run"]]()
    return {
        "before": before,
        "after": after,
        "live": live.peak_bytes,
        "predicted": loss_fn.plan.peak_bytes,
        "schedule": loss_fn.plan.schedule,
        "tile": str(loss_fn.plan.tile),
    }


def gemm(x: torch.Tensor, y: torch.Tensor, tile) -> None:
    """The loss's three kinds of product on one tile."""
    x, y = x[: tile.rows], y[: tile.cols]
    similarity = torch.mm(x, y.T)
    torch.zeros_like(x).addmm_(similarity, y)
    torch.zeros_like(y).addmm_(similarity.T, x)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
