"""The loss of a group of ranks on CPUs, beside what gathers every rank's embeddings.

    python -m benchmarks.groups                    # two ranks of one thread each, minutes
    python -m benchmarks.groups --ranks 4 --quick  # tiny sizes: does it run?
    python -m benchmarks.groups --out groups.json

Gloo between processes of this machine.  Every step is a forward and a backward with gradients of
both sides and of the scale, timed from one barrier to the next; providers take turns.

``compiled``     ``compile_loss(..., group=...)``: shards travel, no rank holds a matrix
``gathered``     open_clip's formula with local_loss and gather_with_grad
``decomposed``   DisCo-CLIP's: gathered without a graph, gradients of all rows made here and summed
                 over ranks
``…, onednn``    the same, multiplied by oneDNN, which is no default of PyTorch's; the compiled loss
                 takes it where the machine says that it is faster
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_grad
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.processes import run_processes
from benchmarks.providers import products_by
from benchmarks.record import environment, save
from cl_compiler import compile_loss
from cl_compiler.hardware.cpu import cpu_facts
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.measure import planted_pairs, relative_error
from cl_compiler.units import format_bytes, format_seconds

LIMIT_S = 900.0
"""Of one case."""


@dataclass(frozen=True)
class Case:
    """Rows of each rank, and columns of their embeddings."""

    rows: int
    width: int
    repeats: int


CASES = (Case(2048, 512, 9), Case(4096, 512, 7), Case(8192, 512, 5))
QUICK = (Case(96, 32, 2),)
BY_ONEDNN = ", onednn"
"""At the end of a name: with PyTorch's setting that has oneDNN multiply."""

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The loss of this rank's images, texts and the scale.  The mean over ranks of what encoders then
get is the whole batch's gradient."""


def gathered(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The mean over this rank's rows and columns; gradients of others' rows go home."""
    all_x, all_y = (torch.cat(with_grad.all_gather(side)) for side in (x, y))
    return _of_own_rows(x, y, all_x, all_y, scale)


def decomposed(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The same mean; gradients are made at once, of all ranks' rows, and given to autograd."""
    own = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
    sides = []
    for side in (x, y):
        parts = [torch.empty_like(side) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, side.detach())
        sides.append(torch.cat(parts).requires_grad_())
    all_x, all_y = sides
    value = _of_own_rows(all_x[own], all_y[own], all_x, all_y, scale)
    d_x, d_y, d_scale = torch.autograd.grad(value, [all_x, all_y, scale])
    for gradient in (d_x, d_y):
        dist.all_reduce(gradient)
    found: Tensor = _Known.apply(value.detach(), (d_x[own], d_y[own], d_scale), x, y, scale)
    return found


class _Known(torch.autograd.Function):
    """A value whose backward gives gradients that were made before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return None, None, *(gradient.mul_(grad_output) for gradient in ctx.gradients)


def _of_own_rows(x: Tensor, y: Tensor, all_x: Tensor, all_y: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(x)) + dist.get_rank() * len(x)
    rows = cross_entropy(scale * x @ all_y.T, labels)
    return (rows + cross_entropy(scale * y @ all_x.T, labels)) / 2


def providers(case: Case) -> dict[str, Step]:
    """What is compared, by name."""
    budget = (3 * 2 * case.rows * case.width * 4) + (16 << 20)
    compiled = compile_loss("auto", budget, group=dist.group.WORLD)
    theirs = {"gathered": gathered, "decomposed": decomposed}
    if "amx_bf16" not in cpu_facts().features:  # there it would round
        theirs |= {f"{name}{BY_ONEDNN}": step for name, step in theirs.items()}
    return {"compiled": lambda x, y, scale: compiled(x, y, logit_scale=scale), **theirs}


def rank_main(rank: int, ranks: int, case: Case, meet: str, out: str) -> None:
    """One rank of a case; the first one writes what all of them found."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # of collectives that have newer names
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    x, y = (t.requires_grad_() for t in planted_pairs(case.rows, case.rows, case.width, seed=rank))
    scale = torch.tensor(14.3, requires_grad=True)
    inputs, found = [x, y, scale], {}
    steps = providers(case)

    def run(name: str) -> list[Tensor]:
        for tensor in inputs:
            tensor.grad = None
        with products_by("onednn" if name.endswith(BY_ONEDNN) else ""):
            steps[name](x, y, scale).backward()
        return [t.grad for t in (x, y) if t.grad is not None]

    gradients = {name: run(name) for name in steps}  # and warms up
    for name in steps:
        for tensor in inputs:
            tensor.grad = None
        with LiveBytes() as live:
            run(name)
        found[name] = {
            "seconds": [],
            "live_bytes": _largest(live.peak_bytes),
            "difference": _largest(relative_error(gradients[name], gradients["gathered"])),
        }
    for _ in range(case.repeats):
        for name in steps:
            dist.barrier()
            start = time.perf_counter()
            run(name)
            dist.barrier()
            found[name]["seconds"].append(_largest(time.perf_counter() - start))
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _largest(number: float) -> float:
    """Of all ranks."""
    told = torch.tensor(float(number), dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def measure(case: Case, ranks: int) -> dict[str, Any]:
    """One case: seconds of every repetition, bytes of the rank that holds most."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/found.json"
        given = [(rank, ranks, case, f"file://{folder}/meet", out) for rank in range(ranks)]
        run_processes(rank_main, given, LIMIT_S)
        rows: dict[str, Any] = json.loads(Path(out).read_text())
    for row in rows.values():
        row["median_s"] = statistics.median(row["seconds"])
    return {"case": asdict(case), "ranks": ranks, "rows": rows}


def show(console: Console, found: dict[str, Any]) -> None:
    """One case as text."""
    case, rows = found["case"], found["rows"]
    console.print(f"\n{found['ranks']} ranks, {case['rows']:,} rows of {case['width']} each")
    table = Table("provider", "median", "of compiled", "live", "difference", box=None)
    for name, row in rows.items():
        ratio = row["median_s"] / rows["compiled"]["median_s"]
        table.add_row(
            name,
            format_seconds(row["median_s"]),
            f"{ratio:.2f}",
            format_bytes(round(row["live_bytes"])),
            f"{row['difference']:.1e}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help="write every repetition as JSON")
    given = parser.parse_args(arguments)
    console, results = Console(), []
    for case in QUICK if given.quick else CASES:
        results.append(measure(case, given.ranks))
        show(console, results[-1])
    if given.out is not None:
        save(given.out, {"environment": environment(), "cases": results})
    return results


if __name__ == "__main__":
    main()
