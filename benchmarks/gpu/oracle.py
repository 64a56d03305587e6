"""The losses in float64 at full size, a panel of rows at a time, and gradients of sampled rows.

Written from the definitions alone: nothing here is shared with what it judges.  A test holds it
against the dense reference of the loss language.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SAMPLES", "Truth", "errors_of", "truth_of"]

SAMPLES = 64
"""Rows of each side whose gradients are compared."""
PANEL_ELEMENTS = 1 << 26
NOT_FINITE = 1e300
"""The error of NaN and of infinity: worse than any, and JSON has a word for it."""


@dataclass(frozen=True)
class Truth:
    """Value and gradients in float64.

    Attributes:
        rows: of each operand, indices of the sampled rows.
        gradients: by name of the leaf: [SAMPLES, D] of an operand, [] of a parameter.
    """

    value: Tensor
    rows: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Problem:
    """x [M, D], y [N, D] (the same tensor for NT-Xent), scale and bias [], all float64."""

    loss: str
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor

    def cosines(self, rows: Tensor) -> Tensor:
        return self.x[rows] @ self.y.T

    def logits(self, cosines: Tensor, rows: Tensor) -> Tensor:
        """[m, N]; a pair that is no candidate has -inf."""
        logits = self.scale * cosines + self.bias
        if self.loss == "nt_xent":
            logits[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        return logits

    def positives(self, rows: Tensor) -> Tensor:
        """The column of each row's positive."""
        half = len(self.x) // 2
        return (rows + half) % len(self.x) if self.loss == "nt_xent" else rows

    def gradient(self, logits: Tensor, rows: Tensor, row_lse: Tensor, col_lse: Tensor) -> Tensor:
        """dL/dlogits [m, N] of some rows; ``row_lse`` is theirs, ``col_lse`` [N] all columns'."""
        at = (torch.arange(len(rows), device=rows.device), self.positives(rows))
        if self.loss == "siglip":
            found = torch.sigmoid(logits)
            found[at] -= 1
            return found / len(self.x)
        found = torch.exp(logits - row_lse[:, None])
        if self.loss == "clip":
            found += torch.exp(logits - col_lse)
            found[at] -= 2
            return found / (2 * len(self.x))
        found[at] -= 1
        return found / len(self.x)


def truth_of(loss: str, leaves: Mapping[str, Tensor], seed: int = 0) -> Truth:
    """Evaluate a loss.

    Args:
        loss: "clip", "infonce", "siglip" or "nt_xent".
        leaves: x and y, or z; logit_scale; logit_bias for SigLIP.
        seed: of the sampled rows.
    """
    problem = _problem(loss, leaves)
    row_lse, col_lse, value = _statistics(problem)
    d_scale, d_bias = _parameter_gradients(problem, row_lse, col_lse)
    gradients = {"logit_scale": d_scale}
    if "logit_bias" in leaves:
        gradients["logit_bias"] = d_bias
    rows = {n: _sample(len(t), seed + i, t.device) for i, (n, t) in enumerate(leaves.items())
            if t.dim() == 2}  # fmt: skip
    for name, picked in rows.items():
        gradients[name] = _operand_gradient(problem, name, picked, row_lse, col_lse)
    return Truth(value, rows, gradients)


def errors_of(truth: Truth, value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, float | None]:
    """‖got - true‖ / ‖true‖ of the value and every gradient; None for one that is not given."""
    found: dict[str, float | None] = {"value": _error(value, truth.value)}
    for name, want in truth.gradients.items():
        got = leaves[name].grad
        if got is not None and name in truth.rows:
            got = got[truth.rows[name]]
        found[f"d_{name}"] = None if got is None else _error(got, want)
    return found


def _error(got: Tensor, want: Tensor) -> float:
    difference = got.detach().to(want.device, torch.float64).reshape(want.shape) - want
    size = float(difference.norm() / want.norm().clamp_min(1e-300))
    return size if math.isfinite(size) else NOT_FINITE


def _problem(loss: str, leaves: Mapping[str, Tensor]) -> _Problem:
    wide = {name: t.detach().to(torch.float64) for name, t in leaves.items()}
    x = wide["z"] if loss == "nt_xent" else wide["x"]
    y = x if loss == "nt_xent" else wide["y"]
    bias = wide.get("logit_bias", torch.zeros((), dtype=torch.float64, device=x.device))
    return _Problem(loss, x, y, wide["logit_scale"], bias)


def _panels(problem: _Problem) -> list[Tensor]:
    step = max(1, PANEL_ELEMENTS // len(problem.y))
    everything = torch.arange(len(problem.x), device=problem.x.device)
    return [everything[i : i + step] for i in range(0, len(everything), step)]


def _statistics(p: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(row logsumexp [M], column logsumexp [N], value)."""
    row_lse, by_panel, value = [], [], p.x.new_zeros(())
    for rows in _panels(p):
        logits = p.logits(p.cosines(rows), rows)
        positive = logits[torch.arange(len(rows), device=rows.device), p.positives(rows)]
        if p.loss == "siglip":
            value = value + (F.softplus(logits).sum() - positive.sum()) / len(p.x)
            continue
        row_lse.append(torch.logsumexp(logits, 1))
        share = (row_lse[-1] - positive).sum() / len(p.x)
        if p.loss == "clip":
            by_panel.append(torch.logsumexp(logits, 0))
            value = value + share / 2 - positive.sum() / (2 * len(p.x))
        else:
            value = value + share
    if p.loss != "clip":
        empty = p.x.new_zeros(0)
        return (torch.cat(row_lse) if row_lse else empty), empty, value
    col_lse = torch.logsumexp(torch.stack(by_panel), 0)
    return torch.cat(row_lse), col_lse, value + col_lse.sum() / (2 * len(p.x))


def _parameter_gradients(p: _Problem, row_lse: Tensor, col_lse: Tensor) -> tuple[Tensor, Tensor]:
    d_scale, d_bias = p.x.new_zeros(()), p.x.new_zeros(())
    for rows in _panels(p):
        cosines = p.cosines(rows)
        own = row_lse[rows] if len(row_lse) else row_lse
        gradient = p.gradient(p.logits(cosines, rows), rows, own, col_lse)
        d_scale, d_bias = d_scale + (gradient * cosines).sum(), d_bias + gradient.sum()
    return d_scale, d_bias


def _operand_gradient(
    p: _Problem, name: str, picked: Tensor, row_lse: Tensor, col_lse: Tensor
) -> Tensor:
    """[SAMPLES, D] of the picked rows of x, y or z."""
    own = row_lse[picked] if len(row_lse) else row_lse
    of_rows = p.x.new_zeros(len(picked), p.x.shape[1])
    if name in ("x", "z"):
        gradient = p.gradient(p.logits(p.cosines(picked), picked), picked, own, col_lse)
        of_rows = p.scale * gradient @ p.y
    if name == "x":
        return of_rows
    by_columns = torch.zeros_like(of_rows)
    for rows in _panels(p):
        theirs = row_lse[rows] if len(row_lse) else row_lse
        gradient = p.gradient(p.logits(p.cosines(rows), rows), rows, theirs, col_lse)
        by_columns += p.scale * gradient[:, picked].T @ p.x[rows]
    return of_rows + by_columns


def _sample(length: int, seed: int, device: torch.device) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    picked = torch.randperm(length, generator=source)[: min(SAMPLES, length)]
    return picked.sort().values.to(device)
