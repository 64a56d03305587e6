"""The shipped losses as most training code writes them: dense PyTorch formulas.

They are what a compiled loss is compared with, so they are written to be fast, not to be short:
one similarity matrix each, fused cross-entropies, no mask where a shift will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cl_compiler.lang.ir import LossIR

__all__ = [
    "DENSE",
    "DenseFormula",
    "dense_baseline",
    "dense_clip",
    "dense_infonce",
    "dense_nt_xent",
    "dense_siglip",
]

DenseFormula = Callable[..., "Tensor"]
"""(x [M, D], y [N, D], **parameters) → scalar; over one set: (z [2b, D], **parameters)."""


def dense_clip(x: Tensor, y: Tensor, *, logit_scale: Tensor) -> Tensor:
    """CLIP: two cross-entropies of one matrix, as OpenAI's; on one rank open_clip makes two."""
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


DENSE_COPIES = 4.5
"""Matrices of M x N that a dense formula with its gradients holds at once, at most."""
REFERENCE = "reference, fp64"
"""The baseline of a loss for which nobody wrote a dense formula."""


def dense_baseline(loss: LossIR, element_bytes: int) -> tuple[str, DenseFormula, float]:
    """What a compiled loss is compared with.

    Args:
        loss: compared by what it computes, whatever it is called.
        element_bytes: of one element of a similarity matrix.

    Returns:
        (name, formula, bytes that it may hold per element of the matrix): a shipped loss's dense
        formula, or the dense float64 evaluation of what the loss says.
    """
    from cl_compiler.losses import find

    for name, formula in DENSE.items():
        if _maths(find(name)) == _maths(loss):
            return "dense", formula, DENSE_COPIES * element_bytes
    return REFERENCE, _reference(loss), 8.0 * _reference_copies(loss)


def _maths(loss: LossIR) -> dict[str, object]:
    from cl_compiler.api import loss_to_json

    return {k: v for k, v in loss_to_json(loss).items() if k not in ("name", "doc")}


def _reference(loss: LossIR) -> DenseFormula:
    from cl_compiler.lang.reference import evaluate

    def value(**inputs: Tensor) -> Tensor:
        parameters = {name: inputs[name] for name in loss.parameters}
        tensors = {name: t for name, t in inputs.items() if name not in parameters}
        return evaluate(loss, tensors, parameters)

    return value


def _reference_copies(loss: LossIR) -> int:
    """Matrices that autograd keeps: two of every node of what is reduced, and the similarity's."""
    import sympy as sp

    expressions = [expr for red in loss.reductions for expr in red.expressions]
    return 4 + 2 * len({node for expr in expressions for node in sp.preorder_traversal(expr)})
