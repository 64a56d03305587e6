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
    operands = x.detach(), y.detach(), loss_fn.plan.tile
    products = gemm_by_onednn if loss_fn.plan.library == "onednn" else gemm
    library = growth_bytes(lambda: products(*operands))
    with LiveBytes() as live:
        products(*operands)
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


def gemm(x: torch.Tensor, y: torch.Tensor, tile) -> None:
    """The loss's three kinds of product on one tile."""
    x, y = x[: tile.rows], y[: tile.cols]
    similarity = torch.mm(x, y.T)
    torch.zeros_like(x).addmm_(similarity, y)
    torch.zeros_like(y).addmm_(similarity.T, x)


def gemm_by_onednn(x: torch.Tensor, y: torch.Tensor, tile) -> None:
    """The same where oneDNN makes those with packed rows: it keeps code for every shape, so for
    the ragged tiles, too, and for products with and without an offset."""
    ops = torch.ops.mkldnn
    for m, n in itertools.product({tile.rows, len(x) % tile.rows}, {tile.cols, len(y) % tile.cols}):
        x_i, y_j = x[:m], y[:n]
        if m * n == 0:
            continue
        for offset in (None, torch.zeros(m)):
            rows = ops._reorder_linear_weight(x_i, tile.cols)
            similarity = ops._linear_pointwise(y_j, rows, offset, "none", [], "")
        torch.zeros_like(x_i).addmm_(similarity.T, y_j)
        rows = ops._reorder_linear_weight(x_i.T, tile.cols)
        torch.zeros_like(y_j).add_(ops._linear_pointwise(similarity, rows, None, "none", [], ""))


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
