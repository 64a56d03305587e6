"""``inf_cl.cal_inf_loss``: any D, CPUs too, with a group or without."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_compiler.integrations.compiled import Compiled
from cl_compiler.integrations.ranks import gather, shards_of, world_size

__all__ = ["cal_inf_loss"]

_LOSS = Compiled("infonce")


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
            ranks afterwards it is world_size times too large.  By default it is this rank's own.

    Returns:
        A scalar; its mean over ranks is the loss of the whole batch.
    """
    if world_size() == 1:
        chosen: dict[str, Any] = {}
        if labels is not None:
            columns = torch.arange(k.shape[0], device=k.device)
            chosen = {"row_ids": labels, "col_ids": columns}
        return _LOSS(q, k, logit_scale=1.0 if scale is None else scale, **chosen)
    shards = shards_of(k)
    columns = torch.arange(shards.total, device=k.device)
    own = columns[: q.shape[0]] if labels is None else labels.to(k.device)
    if peer_scale_gradient and isinstance(scale, Tensor):
        scale = _summed(scale)
    return _LOSS(
        q,
        gather(k, shards),
        logit_scale=1.0 if scale is None else scale,
        row_ids=own + shards.start,
        col_ids=columns,
    )


def _summed(scale: Tensor) -> Tensor:
    """The scale, with a gradient that is the sum over ranks."""
    scale = scale.clone()
    if scale.requires_grad:

        def reduce(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            dist.all_reduce(total)
            return total

        scale.register_hook(reduce)  # type: ignore[no-untyped-call]
    return scale
