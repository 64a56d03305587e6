"""A loss's inputs cut into shards, run through emitted files on loopback rings, put together again.

``Split`` says which global rows and columns every rank has.  The order of ranks is the global
order, positives included, except that without ids rank r's first columns are those of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from cl_compiler.codegen.ring.render import render_ring
from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.lang.base_two import in_base_two
from cl_compiler.lang.ir import BANK, COLS, ROWS
from cl_compiler.lang.ring import (
    CANONICAL,
    HALF_RING,
    OWNER_COMPUTES,
    build_ring_program,
    ring_schedules,
)
from cl_compiler.lang.strips import in_strips
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Tile
from cl_compiler.runtime.loader import forget_sizes, load_source
from cl_compiler.runtime.ring import LoopbackRing, run_ranks
from tests.tiles import COL_TILE, ROW_TILE, Result
from tests.zoo_case import Case, Sample


def schedules_of(case: Case) -> list[str]:
    """The cluster schedules that a case can use."""
    reasons = ring_schedules(plan_sweeps(case.loss, case.positives, case.needs))
    return [schedule for schedule, reason in reasons.items() if not reason]


def emit_ring(
    case: Case,
    schedule: str,
    *,
    dtype: str = "float64",
    chunk: int = 4,
    tile: Tile | None = None,
    width: int = 6,
    needs: frozenset[str] | None = None,
    node: int = 1,
    resident: int = 5,
    precision: str = "ieee",
    arch: str = "",
    core: CoreTile | None = None,
    device: str = "",
    library: str = "blas",
    strip: int = 0,
) -> str:
    """The text of the file for one case, without the planner; ``arch``: as Triton kernels.

    ``device``: "cuda" for PyTorch's tiles on GPUs.  ``strip``: of so many columns, with
    exponentials to base 2.
    """
    needs = case.needs if needs is None else needs
    sweeps = plan_sweeps(case.loss, case.positives, needs)
    program = build_ring_program(
        sweeps,
        owner_computes=schedule in OWNER_COMPUTES,
        canonical=schedule == CANONICAL,
        half=schedule == HALF_RING,
    )
    if strip:
        program = in_strips(in_base_two(program))
    plan = Plan(
        case.loss.name,
        "test",
        Problem(64, 64, width, dtype),  # type: ignore[arg-type]
        case.positives,
        needs,
        precision,
        MemoryBudget(1 << 30),
        program.schedule,
        tile or Tile(ROW_TILE, COL_TILE),
        0,
        (),
        (),
        0,
        0.0,
        4.0,
        library=library,  # type: ignore[arg-type]
        exponential="exp2" if strip else "exp",
        strip=strip,
    )
    return render_ring(
        plan,
        program,
        "test",
        cluster_schedule=schedule,
        chunk=chunk,
        ranks_of_node=node,
        resident=resident,
        device=device or ("cuda" if arch else "cpu"),
        arch=arch,
        core=core,
    )


@dataclass(frozen=True)
class Split:
    """Global positions of every rank's rows and columns."""

    rows: tuple[Tensor, ...]
    cols: tuple[Tensor, ...]

    @property
    def lengths(self) -> dict[str, tuple[int, ...]]:
        return {
            ROWS: tuple(len(r) for r in self.rows),
            COLS: tuple(len(c) for c in self.cols),
        }


def split(case: Case, rows: int, cols: int, shares: Sequence[int]) -> Split:
    """Cut ``rows`` and ``cols`` in proportion to ``shares`` (0: an empty shard)."""
    if case.loss.is_single_set and case.positives == "views":
        half = rows // 2
        parts = tuple(torch.cat([p, p + half]) for p in _cut(torch.arange(half), shares))
        return Split(parts, parts)
    own_rows = _cut(torch.arange(rows), shares)
    if case.loss.is_single_set:
        return Split(own_rows, own_rows)
    if case.positives == "ids" or not case.loss.uses_positives:
        return Split(own_rows, _cut(torch.arange(cols), tuple(reversed(shares))))
    extra = _cut(torch.arange(rows, cols), shares)
    both = tuple(torch.cat([r, e]) for r, e in zip(own_rows, extra, strict=True))
    return Split(own_rows, both)


def _cut(positions: Tensor, shares: Sequence[int]) -> tuple[Tensor, ...]:
    total, sizes = sum(shares), []
    for share in shares:
        sizes.append(len(positions) * share // total)
    largest = max(range(len(shares)), key=shares.__getitem__)
    sizes[largest] += len(positions) - sum(sizes)
    return positions.split(sizes)


def local(
    sample: Sample, cut: Split, rank: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """One rank's arguments by name; those that need a gradient are leaves."""
    case, position = sample.case, {ROWS: cut.rows[rank], COLS: cut.cols[rank]}
    axes = {op.name: op.axes[0] for op in case.loss.operands}
    axes |= {n: case.loss.leaves[n].axes[0] for n in case.inputs}
    values: dict[str, Tensor] = {}
    for name, tensor in sample.tensors.items():
        part = tensor.detach() if axes[name] == BANK else tensor.detach()[position[axes[name]]]
        kind = dtype if part.dim() > 1 or dtype.itemsize > 4 else torch.float32
        values[name] = part.to(device, kind).requires_grad_(name in case.needs)
    for name, number in sample.parameters.items():
        values[name] = number.detach().clone().requires_grad_()
    for name, ids in sample.ids.items():
        values[name] = ids[cut.cols[rank] if name == "col_ids" else cut.rows[rank]].to(device)
    return values


@dataclass(frozen=True)
class GroupResult:
    """What every rank returned, put together: a ``Result``, and bytes that each rank posted."""

    result: Result
    values: tuple[float, ...]
    posted_bytes: tuple[int, ...]


def run_group(
    source: str,
    sample: Sample,
    cut: Split,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    timeout_s: float = 20.0,
    prepare: Callable[[ModuleType], None] = lambda module: None,
) -> GroupResult:
    """Run a file on as many threads as the split has ranks; ``prepare`` may change it before."""
    forget_sizes()
    module = load_source(source, "test")
    prepare(module)
    parts = [local(sample, cut, rank, dtype, device) for rank in range(len(cut.rows))]

    def run(hub, rank):
        ring = LoopbackRing(hub, rank, cut.lengths)
        values = parts[rank]
        results = module.Loss.apply(ring, *(values[name] for name in module.ARGUMENTS))
        grads: tuple[Tensor, ...] = ()
        if module.GRADIENTS:
            grads = torch.autograd.grad(results[0], [values[n] for n in module.GRADIENTS])
        return results, dict(zip(module.GRADIENTS, grads, strict=True)), ring.posted_bytes

    everyone = run_ranks(len(cut.rows), run, timeout_s=timeout_s)
    gradients = {
        name: together(sample, cut, name, [g[name] for _, g, _ in everyone])
        for name in module.GRADIENTS
    }
    outputs: Mapping[str, Tensor] = {}
    first = everyone[0][0]
    values = tuple(float(r[0].detach()) for r, _, _ in everyone)
    posted = tuple(n for _, _, n in everyone)
    return GroupResult(Result(first[0].detach(), gradients, dict(outputs)), values, posted)


def together(sample: Sample, cut: Split, name: str, parts: Sequence[Tensor]) -> Tensor:
    """Every rank's part of a gradient in global order; a scalar's is the same everywhere."""
    if name in sample.parameters:
        assert all(torch.equal(p, parts[0]) for p in parts), name
        return parts[0]
    case = sample.case
    axes = {op.name: op.axes[0] for op in case.loss.operands}
    axes |= {n: case.loss.leaves[n].axes[0] for n in case.inputs}
    whole = torch.zeros_like(sample.tensors[name], dtype=parts[0].dtype)
    if axes[name] == BANK:  # a queue that takes part in nothing
        assert not any(part.any() for part in parts), name
        return whole
    positions = cut.cols if axes[name] == COLS else cut.rows
    for position, part in zip(positions, parts, strict=True):
        whole[position] = part.cpu()
    return whole
