"""One fresh process of ``test_memory.py``: how high does its resident memory climb?

``python memory_process.py '{"run": "loss", "M": …, "N": …, "D": …, "budget": …, "threads": …}'``
prints JSON.  What runs is the loss, or "nothing"; all else is identical.

Before either, the products of the loss's tiles run alone: the scratch memory that the library takes
for them, and keeps, is its own ("library"), and the mark starts above it.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import sys
from collections.abc import Callable
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

    loss(64)  # code is paged in and threads start: neither is the loss's memory
    x.grad = y.grad = None
    operands = x.detach(), y.detach(), loss_fn.plan.tile, loss_fn.plan.library
    library = growth_bytes(lambda: gemm(*operands))
    with LiveBytes() as live:
        gemm(*operands)
    run = loss if request["run"] == "loss" else lambda: None
    grown = growth_bytes(run)
    x.grad = y.grad = None
    with LiveBytes() as live_in_loss:
        run()
    return {
        "grown": grown,
        "live": live_in_loss.peak_bytes,
        "library": max(0, library - live.peak_bytes),
        "predicted": loss_fn.plan.peak_bytes,
        "schedule": loss_fn.plan.schedule,
        "tile": str(loss_fn.plan.tile),
    }


def growth_bytes(run: Callable[[], None]) -> int:
    """How far the resident memory climbs above where it was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark becomes what is resident now
    before = status_bytes("VmHWM")
    run()
    return status_bytes("VmHWM") - before


def gemm(x: torch.Tensor, y: torch.Tensor, tile, library: str) -> None:
    """A loss's three kinds of product; oneDNN keeps code for each shape, so of ragged tiles, too,
    scaled and with an offset."""
    settings = torch.backends.mkldnn.matmul
    found = settings.fp32_precision
    settings.fp32_precision = "bf16" if library == "onednn" else "ieee"
    for m, n in itertools.product({tile.rows, len(x) % tile.rows}, {tile.cols, len(y) % tile.cols}):
        x_i, y_j = x[:m], y[:n]
        if m * n == 0:
            continue
        similarity = torch.empty(n, m).T
        torch.mm(x_i, y_j.T, out=similarity)
        for factor in (1.0, 0.5):  # scaled products are code of their own
            similarity.addmm_(x_i, y_j.T, beta=0, alpha=factor)
            torch.addmm(torch.tensor(1.0), x_i, y_j.T, alpha=factor, out=similarity)
            torch.zeros_like(x_i).addmm_(similarity, y_j, alpha=factor)
            torch.zeros_like(y_j).addmm_(similarity.T, x_i, alpha=factor)
    settings.fp32_precision = found


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
