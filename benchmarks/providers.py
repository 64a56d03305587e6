"""The alternatives: each turns a case into a call that runs forward and backward once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case
from cl_compiler import Problem, compile_loss
from cl_compiler.cli.bench import PARAMETERS, step_of
from cl_compiler.cli.dense import DENSE
from cl_compiler.hardware.cpu import cpu_facts, free_memory_bytes
from cl_compiler.plan.types import Plan, Tile
from cl_compiler.runtime.measure import planted_pairs
from cl_compiler.units import format_bytes

__all__ = ["OPEN_CLIP", "Prepared", "Skipped", "inputs_of", "prepare"]

OPEN_CLIP = "open_clip 4.2.0.dev0"
"""Whose formula ``open_clip`` is: checked at commit 2e25cb1a0897ae598319d7f8626d60eef4af8531."""
CHUNK_ROWS = 1024
"""Rows of the chunked PyTorch formula at a time."""
DENSE_MATRICES = {"dense": 4.5, "open_clip": 7.0, "torch_compile": 4.5}
"""M x N matrices that a provider may hold at once; more than is free is not attempted."""
GEMM_UNITS = 4.0
"""Of 2·M·N·D FLOP in the bare GEMM loop: S, S, dX, dY."""


class Skipped(Exception):
    """A provider that does not apply here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A provider ready to be measured.

    Attributes:
        step: one forward and backward.
        plan: of a compiled provider.
        visible: its tensors pass PyTorch's dispatcher, so that they can be counted.
        has_gradients: it leaves gradients in the inputs.
    """

    step: Callable[[], Any]
    plan: Plan | None = None
    visible: bool = True
    has_gradients: bool = True


def inputs_of(case: Case) -> dict[str, Tensor]:
    """Fresh random unit-length features with planted positives, and the loss's parameters."""
    dtype: torch.dtype = getattr(torch, case.dtype)
    seed = case.M + 7 * case.D
    if case.loss == "nt_xent":
        z = torch.cat(planted_pairs(case.M // 2, case.M // 2, case.D, dtype, seed=seed))
        operands = {"z": z}
    else:
        x, y = planted_pairs(case.M, case.N, case.D, dtype, seed=seed)
        operands = {"x": x, "y": y}
    names = ["logit_scale", *(["logit_bias"] if case.loss == "siglip" else [])]
    parameters = {name: torch.tensor(PARAMETERS[name]) for name in names}
    return {n: t.requires_grad_() for n, t in (operands | parameters).items()}


def prepare(name: str, case: Case, inputs: Mapping[str, Tensor], plan: Plan | None) -> Prepared:
    """Make a provider ready.

    Args:
        name: "compiled", "compiled:<schedule>", "compiled:bf16", "dense", "open_clip",
            "torch_compile", "chunked" or "gemm".
        case: what is measured.
        inputs: leaves by name.
        plan: whose tiles "gemm" walks.

    Raises:
        Skipped: it does not apply to this machine or size.
    """
    family, _, variant = name.partition(":")
    _require_memory(family, case)
    match family:
        case "compiled":
            return _compiled(variant, case, inputs)
        case "dense":
            return Prepared(step_of(DENSE[case.loss], inputs))
        case "open_clip":
            return Prepared(step_of(open_clip, inputs))
        case "chunked":
            return Prepared(step_of(chunked_clip, inputs))
        case "torch_compile":
            formula = torch.compile(DENSE[case.loss], dynamic=False)
            return Prepared(step_of(formula, inputs), visible=False)
        case "gemm":
            if plan is None:
                raise Skipped("no compiled provider gave a tile")
            x = inputs["z" if "z" in inputs else "x"].detach()
            y = inputs["z" if "z" in inputs else "y"].detach()
            return Prepared(lambda: gemm_loop(x, y, plan.tile, plan.library), has_gradients=False)
    raise ValueError(f"no provider {name!r}")


def _require_memory(family: str, case: Case) -> None:
    needed = int(DENSE_MATRICES.get(family, 0) * case.M * case.N * 4)
    free = free_memory_bytes()
    if needed > 0.9 * free:
        raise Skipped(f"needs about {format_bytes(needed)}, {format_bytes(free)} are free")


def _compiled(variant: str, case: Case, inputs: Mapping[str, Tensor]) -> Prepared:
    precision, schedule = "auto", variant or "auto"
    if variant == "bf16":
        if "amx_bf16" not in cpu_facts().features:
            raise Skipped("bf16 products pay on CPUs with AMX only; this one has none")
        precision, schedule = "bf16", "auto"
    loss_fn = compile_loss(
        "auto",
        case.budget,
        loss=case.loss,
        precision=precision,
        schedule=schedule,
        problem=Problem(case.M, case.N, case.D, case.dtype),  # type: ignore[arg-type]
    )
    return Prepared(step_of(loss_fn, inputs), plan=loss_fn.plan)


def open_clip(x: Tensor, y: Tensor, *, logit_scale: Tensor) -> Tensor:
    """What open_clip's ``ClipLoss`` computes on one rank: it makes both matrices.

    ``dense`` is faster: it transposes the first one, which open_clip does only across ranks.
    """
    # github.com/mlfoundations/open_clip, src/open_clip/loss.py: ``ClipLoss.get_logits``, its branch
    # for world_size 1 without logit_bias, and ``ClipLoss.forward``.
    logits_per_image = logit_scale * x @ y.T
    logits_per_text = logit_scale * y @ x.T
    labels = torch.arange(len(x), device=x.device, dtype=torch.long)
    images = F.cross_entropy(logits_per_image, labels)
    texts = F.cross_entropy(logits_per_text, labels)
    return (images + texts) / 2


def chunked_clip(x: Tensor, y: Tensor, *, logit_scale: Tensor) -> Tensor:
    """CLIP by row chunks under ``torch.utils.checkpoint``: what PyTorch offers without a kernel.

    Four units of work, as in tiles, and one chunk of logits at a time.
    """

    def chunk(rows: Tensor, start: int) -> tuple[Tensor, Tensor]:
        logits = logit_scale * rows @ y.T
        labels = torch.arange(start, start + len(rows))
        value = F.cross_entropy(logits, labels, reduction="sum")
        return value, torch.logsumexp(logits, 0)

    values, columns = [], []
    for start in range(0, len(x), CHUNK_ROWS):
        value, column = checkpoint(chunk, x[start : start + CHUNK_ROWS], start, use_reentrant=False)
        values.append(value)
        columns.append(column)
    positives = logit_scale * (x * y).sum(1)
    by_columns = (torch.logsumexp(torch.stack(columns), 0) - positives).sum()
    return (torch.stack(values).sum() + by_columns) / (2 * len(x))


def gemm_loop(x: Tensor, y: Tensor, tile: Tile, library: str = "blas") -> None:
    """The four products of a tiled loss over its tiles, and nothing else: the limit.

    x [M, D], y [N, D]; a sweep makes every tile of S, a second one makes it again and multiplies
    it into dX [M, D] and dY [N, D].  ``library``: "onednn" asks for it as emitted files do.
    """
    similarity = torch.empty(min(tile.rows, len(x)), min(tile.cols, len(y)), dtype=x.dtype)
    with products_by(library):
        _sweep(x, y, tile, similarity)
        _sweep(x, y, tile, similarity, (torch.zeros_like(x), torch.zeros_like(y)))


@contextmanager
def products_by(library: str) -> Iterator[None]:
    """``"onednn"``: it makes fp32 products meanwhile, exactly on CPUs without matrix units."""
    settings: Any = torch.backends.mkldnn.matmul
    found = settings.fp32_precision
    settings.fp32_precision = "bf16" if library == "onednn" else found
    try:
        yield
    finally:
        settings.fp32_precision = found


def _sweep(
    x: Tensor, y: Tensor, tile: Tile, similarity: Tensor, gradients: tuple[Tensor, ...] = ()
) -> None:
    flat = similarity.flatten()
    for i in range(0, len(x), tile.rows):
        x_i = x[i : i + tile.rows]
        for j in range(0, len(y), tile.cols):
            y_j = y[j : j + tile.cols]
            s = flat[: len(x_i) * len(y_j)].view(len(x_i), len(y_j))
            torch.mm(x_i, y_j.T, out=s)
            if gradients:
                d_x, d_y = gradients
                d_x[i : i + tile.rows].addmm_(s, y_j)
                d_y[j : j + tile.cols].addmm_(s.T, x_i)
