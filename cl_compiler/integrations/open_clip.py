"""open_clip's ``ClipLoss`` and ``SigLipLoss`` without their [B, B] logits.

    from cl_compiler.integrations.open_clip import patch
    patch()          # first line of a training script: open_clip makes these losses from here on

or use the classes by themselves: names, arguments, defaults and returns are open_clip's.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.compiled import Compiled, MemoryBudget
from cl_compiler.integrations.own_rows import clip_rows, siglip_rows
from cl_compiler.integrations.ranks import (
    OfRanks,
    Shards,
    gather,
    shards_of,
    with_value,
    world_size,
)

__all__ = ["ClipLoss", "SigLipLoss", "patch"]


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of one process or of many.

    Args:
        local_loss: with several ranks, return the mean over this rank's rows and columns; otherwise
            the whole batch's loss on every rank.  The work is shared among ranks in both cases.
        gather_with_grad: see ``peer_gradients``.
        cache_labels: without effect, there are no labels.
        rank: of this process; its position comes from ``torch.distributed``.
        world_size: of all ranks; more than 1 needs an initialised default group.
        use_horovod: refused (open_clip up to 3.3 has it).
        peer_gradients: False: parameter gradients averaged over ranks (DistributedDataParallel) are
            those of the whole batch, whatever the two flags say.  True: as open_clip computes them,
            where without gather_with_grad other ranks' terms are missing: a factor 1/world_size in
            the encoders without local_loss, and wrong directions with it.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        peer_gradients: bool = False,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ArgumentError(
                "use_horovod=True: ranks are torch.distributed's here; leave it out."
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.peer_gradients = peer_gradients
        self._both = Compiled("clip", memory_budget)
        self._rows = Compiled("infonce", memory_budget)
        self._ranks = OfRanks(clip_rows, memory_budget)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``.

        Args:
            image_features: [B, D], this rank's.
            text_features: [B, D].
            logit_scale: multiplies the similarities.
            logit_bias: without effect on a softmax; its gradient is 0.
            output_dict: return a dictionary.

        Raises:
            ArgumentError: images and texts of different shapes, in one process.
        """
        if self.world_size > 1:
            value = self._of_ranks(image_features, text_features, logit_scale)
        else:
            _check_pairs(image_features, text_features)
            value = self._both(image_features, text_features, logit_scale=logit_scale)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            value = value + 0 * logit_bias.sum()
        return {"contrastive_loss": value} if output_dict else value

    def _of_ranks(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        _check_group(self.world_size)
        if self.peer_gradients and not self.gather_with_grad:
            return self._as_open_clip(images, texts, scale)
        value: Tensor
        value, own = self._ranks(images, texts, logit_scale=scale)
        if self.local_loss and len(images):
            value = with_value(value, (own["rows"].mean() + own["cols"].mean()) / 2)
        return value

    def _as_open_clip(self, images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
        """With the gradients that open_clip computes where it gathers without them."""
        shards = shards_of(images)
        all_images, all_texts = (gather(side.detach(), shards) for side in (images, texts))
        if not self.local_loss:
            all_images = _with_own(all_images, images, shards)
            all_texts = _with_own(all_texts, texts, shards)
            return self._both(all_images, all_texts, logit_scale=scale)
        ids = _ids(shards, images.device)
        rows = self._rows(images, all_texts, logit_scale=scale, **ids)
        return (rows + self._rows(texts, all_images, logit_scale=scale, **ids)) / 2


class SigLipLoss(nn.Module):
    """The sigmoid loss of one process or of many: each rank's images against all texts.

    Args:
        cache_labels: without effect, there are no labels.
        rank: of this process; its position comes from ``torch.distributed``.
        world_size: of all ranks; more than 1 needs an initialised default group.
        dist_impl: open_clip's name of an exchange; all give the same numbers, and here texts always
            travel around a ring.
        chunk_size: without effect: memory does not grow with the matrix anyway.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.

    Raises:
        ArgumentError: an unknown exchange.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__()
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise ArgumentError(
                f"dist_impl={dist_impl!r} is no exchange; use bidir, shift, reduce or gather."
            )
        self._pairs = Compiled("siglip", memory_budget)
        self._ranks = OfRanks(siglip_rows, memory_budget)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or ``{"contrastive_loss": loss}``; arguments as in ``ClipLoss``."""
        if self.world_size > 1:
            _check_group(self.world_size)
            bias = 0.0 if logit_bias is None else logit_bias
            value, own = self._ranks(
                image_features, text_features, logit_scale=logit_scale, logit_bias=bias
            )
            if len(image_features):
                value = with_value(value, own["rows"].mean())
        else:
            _check_pairs(image_features, text_features)
            value = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": value} if output_dict else value

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Of one block of texts; without positives where they are another rank's."""
        ids = {}
        if negative_only:
            zeros = image_features.new_zeros(image_features.shape[0], dtype=torch.int64)
            ones = text_features.new_ones(text_features.shape[0], dtype=torch.int64)
            ids = {"row_ids": zeros, "col_ids": ones}
        bias = 0.0 if logit_bias is None else logit_bias
        return self._pairs(
            image_features, text_features, logit_scale=logit_scale, logit_bias=bias, **ids
        )


def patch() -> None:
    """Have open_clip make these losses: in its ``create_loss`` and wherever it names the classes.

    Raises:
        ImportError: open_clip is not installed.
    """
    import open_clip

    ours = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}
    theirs = {name: getattr(open_clip.loss, name) for name in ours}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "open_clip":
            continue
        for known, replacement in ours.items():
            if getattr(module, known, None) is theirs[known]:
                setattr(module, known, replacement)


def _check_pairs(images: Tensor, texts: Tensor) -> None:
    """In one process only: of several, a rank that raised alone would keep the others waiting."""
    if images.shape != texts.shape:
        raise ArgumentError(
            f"image_features {tuple(images.shape)} and text_features {tuple(texts.shape)} are no "
            "pairs: give both the same shape. Further texts as negatives are what "
            "cl_compiler.compile_loss takes."
        )


def _check_group(expected: int) -> None:
    if world_size() != expected:
        raise ArgumentError(
            f"world_size={expected}, but torch.distributed knows {world_size()} ranks here: call "
            "init_process_group first, or leave world_size at 1."
        )


def _with_own(gathered: Tensor, own: Tensor, shards: Shards) -> Tensor:
    """The rows of other ranks without a gradient, and this rank's with one."""
    stop = shards.start + own.shape[0]
    return torch.cat([gathered[: shards.start], own, gathered[stop:]])


def _ids(shards: Shards, device: torch.device) -> dict[str, Tensor]:
    """Which column is whose positive, where columns are all ranks'."""
    columns = torch.arange(shards.total, device=device)
    own = columns[shards.start : shards.start + shards.rows[dist.get_rank()]]
    return {"row_ids": own, "col_ids": columns}
