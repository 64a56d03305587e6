"""``inf_cl.cal_inf_loss``: any D, CPUs too, with a group or without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.compiled import Compiled
from cl_compiler.integrations.own_rows import infonce_rows
from cl_compiler.integrations.ranks import OfRanks, shards_of, with_value, world_size

__all__ = ["cal_inf_loss"]

_LOSS, _OF_RANKS = Compiled("infonce"), OfRanks(infonce_rows)


def cal_inf_loss(
    q: Tensor,
    k: Tensor,
    labels: Tensor | None = None,
    scale: Tensor | float | None = None,
    head_dim: int = 256,
    *,
    peer_scale_gradient: bool = False,
) -> Tensor:
    """Mean over this rank's rows of the cross-entropy of ``scale·q·kᵀ``, k being all ranks'.

    Args:
        q: [B, D] of this rank.
        k: [B, D] of this rank; D need not be a multiple of anything.
        labels: [B], which of this rank's k belongs to each row; by default its own number.
        scale: multiplies the similarities; by default 1.
        head_dim: without effect, the way inf_cl cuts D does not change the sum.
        peer_scale_gradient: sum the gradient of ``scale`` over ranks, as inf_cl does; averaged over
            ranks afterwards it is world_size times too large.  By default that average is right.

    Returns:
        A scalar; its mean over ranks is the loss of the whole batch, where shards are equal.

    Raises:
        ArgumentError: ``labels`` are no numbers of columns, or what ``CompiledLoss`` raises.
    """
    if labels is not None and (labels.dim() != 1 or labels.is_floating_point()):
        raise ArgumentError(
            f"cal_inf_loss: labels are numbers of columns, [B] integers; got {labels.dtype} of "
            f"shape {list(labels.shape)}. A scale is given as scale=."
        )
    chosen: dict[str, Any] = {}
    if world_size() == 1:
        if labels is not None:
            columns = torch.arange(k.shape[0], device=k.device)
            chosen = {"row_ids": labels, "col_ids": columns}
        return _LOSS(q, k, logit_scale=1.0 if scale is None else scale, **chosen)
    if labels is not None:
        shards = shards_of(k)
        columns = torch.arange(k.shape[0], device=k.device) + shards.start
        chosen = {"row_ids": labels.to(k.device) + shards.start, "col_ids": columns}
    if peer_scale_gradient and isinstance(scale, Tensor):
        scale = _summed(scale)
    value, own = _OF_RANKS(q, k, logit_scale=1.0 if scale is None else scale, **chosen)
    return with_value(value, own["rows"].mean()) if len(q) else value


def _summed(scale: Tensor) -> Tensor:
    """The scale, with a gradient that is the sum over ranks: they all have its mean."""
    scale = scale.clone()
    if scale.requires_grad:
        scale.register_hook(lambda gradient: world_size() * gradient)  # type: ignore[no-untyped-call]
    return scale
