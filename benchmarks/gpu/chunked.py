"""The strongest baseline that needs no kernel: ``torch.mm`` over panels of rows, and elementwise
PyTorch between the products.

It does the least work that each loss allows: SigLIP, InfoNCE and NT-Xent have their gradient as
soon as a panel of whole rows is complete, so the forward makes it; CLIP's waits for the columns, so
the backward multiplies again.  Statistics, logits and gradient sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.mixed import add_product, product

__all__ = ["chunked_loss"]

PANEL_BYTES = 1 << 30
"""Of one fp32 panel of logits."""
LEAST_PANELS = 4


@dataclass(frozen=True)
class _Task:
    """loss; whether elementwise stages go through ``torch.compile``."""

    loss: str
    compiled: bool

    def stage(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function) if self.compiled else function

    @property
    def round_off(self) -> Callable[..., Tensor]:
        return _rounded if self.compiled else _rounded_in_place


def chunked_loss(
    loss: str,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """The value of a loss, differentiable in all operands and parameters.

    Args:
        loss: "clip", "infonce", "siglip" or "nt_xent".
        x: [M, D], or z [2b, D] of NT-Xent.
        y: [N, D]; for NT-Xent z again.
        logit_scale: [].
        logit_bias: [] for SigLIP.
        compiled: elementwise stages through ``torch.compile``.
    """
    bias = torch.zeros_like(logit_scale) if logit_bias is None else logit_bias
    apply: Any = _Chunked.apply
    value: Tensor = apply(_Task(loss, compiled), x, y, logit_scale, bias)
    return value


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _panel_rows(x: Tensor, y: Tensor) -> int:
    most = max(1, PANEL_BYTES // (4 * len(y)))
    return max(1, min(most, -(-len(x) // LEAST_PANELS)))


# ---- elementwise stages: what torch.compile sees ---------------------------------------------


def _row_and_column_sums(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scaled = logits * scale
    return torch.logsumexp(scaled, 1), torch.logsumexp(scaled, 0)


def _two_softmaxes(logits: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor) -> Tensor:
    scaled = logits * scale
    return torch.exp(scaled - row_lse[:, None]) + torch.exp(scaled - col_lse)


def _row_softmax(logits: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each row's logsumexp, gradient without its positive, its sum over each row)."""
    scaled = logits * scale + bias
    row_lse = torch.logsumexp(scaled, 1)
    return row_lse, torch.exp(scaled - row_lse[:, None]), torch.ones_like(row_lse)


def _sigmoids(logits: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(each row's sum of softplus, gradient without its positive, its sum over each row)."""
    scaled = logits * scale + bias
    gradient = torch.sigmoid(scaled)
    return F.softplus(scaled).sum(1), gradient, gradient.sum(1)


def _rounded(gradient: Tensor, columns: Tensor, weight: int, dtype: torch.dtype) -> Tensor:
    """Less ``weight`` at each row's positive, in fp32, then rounded: one fused pass, compiled."""
    hit = torch.arange(gradient.shape[1], device=gradient.device) == columns[:, None]
    return (gradient - weight * hit).to(dtype)


def _rounded_in_place(gradient: Tensor, columns: Tensor, weight: int, dtype: torch.dtype) -> Tensor:
    """The same where every operator is a pass: the positives alone are touched."""
    at = columns[:, None]
    return gradient.scatter_add_(1, at, torch.full_like(gradient[:, :1], -weight)).to(dtype)


def _clip_stage(
    round_off: Callable[..., Tensor],
    logits: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    columns: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return round_off(_two_softmaxes(logits, *statistics), columns, 2, dtype)


def _row_stage(
    round_off: Callable[..., Tensor],
    terms: Callable[..., tuple[Tensor, Tensor, Tensor]],
    logits: Tensor,
    parameters: tuple[Tensor, Tensor],
    columns: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of the rows' terms, rounded gradient of the logits, its sum)."""
    row_terms, gradient, sums = terms(logits, *parameters)
    rounded = round_off(gradient, columns, 1, dtype)
    return row_terms.sum(), rounded, (sums - 1).sum()


# ---- the loss --------------------------------------------------------------------------------


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: _Task, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        ctx.task = task
        if task.loss == "clip":
            row_lse, col_lse = _clip_statistics(task, x, y, scale)
            ctx.save_for_backward(x, y, scale, row_lse, col_lse)
            positives = (x.float() * y.float()).sum(1) * scale
            return (row_lse.mean() + col_lse.mean()) / 2 - positives.mean()
        value, gradients = _by_panels(task, x, y, scale, bias)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.task.loss == "clip":
            d_x, d_y, d_scale = _clip_backward(ctx.task, *ctx.saved_tensors)
            d_bias = torch.zeros_like(d_scale)
        else:
            d_x, d_y, d_scale, d_bias = ctx.saved_tensors
        by = outer.to(d_x.dtype)
        return None, d_x * by, d_y * by, d_scale * outer, d_bias * outer


def _clip_statistics(task: _Task, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    sums = task.stage(_row_and_column_sums)
    panels = _panels_of(task, x, y)
    found = [sums(product(x_i, y.T), scale) for _, x_i, _ in panels]
    rows, columns = zip(*found, strict=True)
    return torch.cat(rows), torch.logsumexp(torch.stack(columns), 0)


def _clip_backward(
    task: _Task, x: Tensor, y: Tensor, scale: Tensor, row_lse: Tensor, col_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    sums, stage = _Sums.zeros(x, y), task.stage(_clip_stage)
    for start, x_i, columns in _panels_of(task, x, y):
        statistics = (scale, row_lse[start : start + len(x_i)], col_lse)
        gradient = stage(task.round_off, product(x_i, y.T), statistics, columns, x.dtype)
        sums.add(start, x_i, y, gradient, scale / (2 * len(x)))
    d_x, d_y, d_scale = sums.finish(scale / (2 * len(x)), y.dtype)
    return d_x, d_y, d_scale / (2 * len(x))


def _by_panels(
    task: _Task, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The value, and gradients of x, y, scale and bias, a panel of whole rows at a time."""
    rows, sums, stage = len(x), _Sums.zeros(x, y), task.stage(_row_stage)
    terms = _sigmoids if task.loss == "siglip" else _row_softmax
    value, d_bias = (torch.zeros((), device=x.device) for _ in range(2))
    for start, x_i, columns in _panels_of(task, x, y):
        logits = product(x_i, y.T)
        if task.loss == "nt_xent":
            logits.diagonal(start).fill_(-torch.inf)
        positives = logits.gather(1, columns[:, None]).sum() * scale + bias * len(x_i)
        share, gradient, change = stage(
            task.round_off, terms, logits, (scale, bias), columns, x.dtype
        )
        value, d_bias = value + share - positives, d_bias + change
        sums.add(start, x_i, y, gradient, scale / rows)
    d_x, d_y, d_scale = sums.finish(scale / rows, y.dtype)
    return value / rows, (d_x, d_y, d_scale / rows, d_bias / rows)


def _panels_of(task: _Task, x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first row, rows of x, column of each row's positive) of each panel."""
    step, shift = _panel_rows(x, y), len(y) // 2 if task.loss == "nt_xent" else 0
    columns = (torch.arange(len(x), device=x.device) + shift) % len(y)
    for start in range(0, len(x), step):
        yield start, x[start : start + step], columns[start : start + step]


@dataclass
class _Sums:
    """Gradients under construction: d_x [M, D] is finished panel by panel, d_y [N, D] fp32."""

    d_x: Tensor
    d_y: Tensor
    d_scale: Tensor

    @classmethod
    def zeros(cls, x: Tensor, y: Tensor) -> _Sums:
        d_y = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        return cls(torch.empty_like(x), d_y, torch.zeros((), device=x.device))

    def add(self, start: int, x_i: Tensor, y: Tensor, gradient: Tensor, factor: Tensor) -> None:
        """Multiply a panel's gradient of the logits out."""
        block = product(gradient, y)
        self.d_y = add_product(self.d_y, gradient.T, x_i)
        self.d_scale = self.d_scale + (block * x_i).sum()
        self.d_x[start : start + len(x_i)] = block * factor

    def finish(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return self.d_x, (self.d_y * factor).to(dtype), self.d_scale
