"""The shipped losses as most training code writes them: dense PyTorch formulas.

They are what a compiled loss is compared with, so they are written to be fast, not to be short:
one similarity matrix each, fused cross-entropies, no mask where a shift will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DENSE", "DenseFormula", "dense_clip", "dense_infonce", "dense_nt_xent", "dense_siglip"]

DenseFormula = Callable[..., "Tensor"]
"""(x [M, D], y [N, D], **parameters) → scalar; over one set: (z [2b, D], **parameters)."""


def dense_clip(x: Tensor, y: Tensor, *, logit_scale: Tensor) -> Tensor:
    """CLIP: two cross-entropies of one matrix (OpenAI's CLIP, open_clip's ``ClipLoss``)."""
    import torch
    import torch.nn.functional as F

    logits = logit_scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[: len(x)], labels)) / 2


def dense_infonce(x: Tensor, y: Tensor, *, logit_scale: Tensor) -> Tensor:
    """InfoNCE: the cross-entropy of each row."""
    import torch
    import torch.nn.functional as F

    return F.cross_entropy(logit_scale * x @ y.T, torch.arange(len(x), device=x.device))


def dense_siglip(x: Tensor, y: Tensor, *, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """SigLIP: open_clip's ``SigLipLoss``, -sum(logsigmoid(±logits)) / rows."""
    import torch
    import torch.nn.functional as F

    logits = logit_scale * x @ y.T + logit_bias
    labels = 2 * torch.eye(len(x), len(y), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def dense_nt_xent(z: Tensor, *, logit_scale: Tensor) -> Tensor:
    """NT-Xent: SimCLR's cross-entropy of 2b - 1 candidates; rows i and i + b are two views."""
    import torch
    import torch.nn.functional as F

    logits = logit_scale * z @ z.T
    logits.fill_diagonal_(-torch.inf)
    views = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, views)


DENSE: Mapping[str, DenseFormula] = {
    "clip": dense_clip,
    "infonce": dense_infonce,
    "siglip": dense_siglip,
    "nt_xent": dense_nt_xent,
}
"""Loss → formula."""
