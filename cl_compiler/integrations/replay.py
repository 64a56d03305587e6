"""Mini-batches of tokenised text, encoded twice: what sentence-transformers' cached losses do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.gradcache import backward_of_chunks
from cl_compiler.step.deferred import Chunk, deferred
from cl_compiler.step.inputs import Tokens, chunk_ranges, cut
from cl_compiler.step.modules import modules_of, reducers_of, without_reduction
from cl_compiler.step.progress import reporter

__all__ = ["encode_columns", "evaluated", "mini_batches", "replayed"]


def mini_batches(
    features: dict[str, Any], size: int, tokens: int | None = None
) -> list[dict[str, Any]]:
    """Consecutive parts of one column, padding at their ends cut off.

    Args:
        features: tensors with one sample per row, and other things that every part gets.
        size: samples of each part.
        tokens: instead, at most so many tokens that are not padding.

    Raises:
        ArgumentError: features that are packed into one sequence, or no attention mask to count.
    """
    if "cu_seq_lens_q" in features:
        raise ArgumentError(
            "features are packed into one sequence (cu_seq_lens_q): mini-batches are cut from "
            "padded ones. Turn flattening off, or use sentence-transformers' loss."
        )
    if tokens is not None and "attention_mask" not in features:
        raise ArgumentError(
            "mini_batch_num_tokens counts the attention_mask, and the features have none; use "
            "mini_batch_size."
        )

    def lengths(batch: dict[str, Any]) -> Tensor:
        return batch["attention_mask"].sum(1)  # type: ignore[no-any-return]

    wanted = size if tokens is None else Tokens(tokens, lengths, padded=False)
    ranges = chunk_ranges(features, wanted, "a column of features")
    return [_trimmed(cut(features, start, stop)) for start, stop in ranges]


def _trimmed(features: dict[str, Any]) -> dict[str, Any]:
    """Without the columns at the end that are padding in every row."""
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.any()):
        return features
    width = mask.shape[1]
    used = int(mask.any(0).nonzero().max()) + 1

    def trim(value: Any) -> Any:
        has_tokens = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == width
        return value[:, :used] if has_tokens else value

    return {name: trim(value) for name, value in features.items()}


def encode_columns(
    embed: Callable[[dict[str, Any]], Tensor],
    columns: Sequence[Sequence[dict[str, Any]]],
    *,
    progress: bool = False,
) -> list[list[Chunk]]:
    """The first pass over all mini-batches of all columns."""
    total, done = sum(map(len, columns)), 0
    result: list[list[Chunk]] = []
    encode = deferred(embed)
    reducers = reducers_of(modules_of(embed))
    with reporter(progress) as report, without_reduction(reducers):
        for column in columns:
            result.append([])
            for part in column:
                result[-1].append(encode(part))
                done += 1
                report("Embed mini-batches", done, total)
    return result


def replayed(
    columns: Sequence[Sequence[Chunk]], model: Any, loss_of: Callable[..., Tensor]
) -> Tensor:
    """The loss of all chunks, a leaf; its backward is that of every chunk.

    Args:
        columns: chunks of each of the loss's inputs.
        model: what the chunks were encoded with.
        loss_of: embeddings of each column's mini-batches, with_backward -> loss; with it, their
            gradients are there afterwards.
    """
    embeddings = [[chunk.embedding for chunk in column] for column in columns]
    trains = torch.is_grad_enabled()
    trains = trains and any(part.requires_grad for column in embeddings for part in column)
    with torch.set_grad_enabled(trains):
        value = loss_of(embeddings, with_backward=trains).detach()
    if not trains:
        return value
    result = value.requires_grad_()
    chunks = [chunk for column in columns for chunk in column]
    result.register_hook(partial(_replay, chunks, model))  # type: ignore[no-untyped-call]
    return result


def evaluated(value: Tensor, *, with_backward: bool) -> Tensor:
    """A loss, or after its backward its value."""
    if not with_backward:
        return value
    if value.requires_grad:
        torch.autograd.backward(value)
    return value.detach()


def _replay(chunks: Sequence[Chunk], model: Any, factor: Tensor) -> None:
    """Carry the cached gradients, times that of the loss, down to the parameters."""
    for chunk in chunks:
        if chunk.embedding.grad is not None:
            chunk.embedding.grad.mul_(factor.to(chunk.embedding.grad))
    backward_of_chunks((chunk, model) for chunk in chunks)
