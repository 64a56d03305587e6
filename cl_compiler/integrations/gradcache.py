"""GradCache's class and decorators, on deferred chunks: exact random numbers on every device.

    from cl_compiler.integrations.gradcache import GradCache
    step = GradCache(models=[query_encoder, doc_encoder], chunk_sizes=32, loss_fn=loss_fn)
    value = step(queries, documents)

``cl_compiler.GradientCache`` has more to offer; this is for code that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_compiler.errors import ArgumentError
from cl_compiler.step.deferred import Chunk, deferred
from cl_compiler.step.inputs import chunk_ranges, cut
from cl_compiler.step.modules import modules_of, reducers_of, without_reduction
from cl_compiler.units import counted

__all__ = ["GradCache", "cached", "cat_input_tensor", "gather_input_tensor"]


class GradCache:
    """A cached step over chunks of each model's input.

    Args:
        models: encoders; a frozen one runs once.
        chunk_sizes: samples per chunk, one number or one per model.
        loss_fn: of one tensor per model and keywords; returns a scalar.
        split_input_fn: (input, chunk size) -> chunks; by default whatever ``GradientCache`` cuts.
        get_rep_fn: from a model's output to its embeddings.
        fp16: run models and loss under autocast.
        scaler: multiplies the loss before its backward; needed with fp16.

    Raises:
        ArgumentError: fp16 without a scaler, or not one chunk size per model.
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        chunk_sizes: int | Sequence[int],
        loss_fn: Callable[..., Tensor],
        split_input_fn: Callable[[Any, int], Any] | None = None,
        get_rep_fn: Callable[..., Tensor] | None = None,
        fp16: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if fp16 and scaler is None:
            raise ArgumentError("fp16=True needs scaler=, a torch.amp.GradScaler.")
        self.models = models
        if isinstance(chunk_sizes, int):
            chunk_sizes = [chunk_sizes] * len(models)
        self.chunk_sizes = list(chunk_sizes)
        if len(self.chunk_sizes) != len(models):
            raise ArgumentError(f"{len(self.chunk_sizes)} chunk_sizes for {len(models)} models.")
        self.loss_fn = loss_fn
        self.split_input_fn = split_input_fn
        self.get_rep_fn = get_rep_fn
        self.fp16 = fp16
        self.scaler = scaler

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.cache_step(*args, **kwargs)

    def cache_step(
        self, *model_inputs: Any, no_sync_except_last: bool = False, **loss_kwargs: Any
    ) -> Tensor:
        """One step: gradients are in the parameters, the loss comes back detached.

        Args:
            *model_inputs: one per model.
            no_sync_except_last: without effect: a DistributedDataParallel model always reduces
                once, with the last chunk that uses it.
            **loss_kwargs: go to the loss.
        """
        if len(model_inputs) != len(self.models):
            raise ArgumentError(
                f"{counted(len(model_inputs), 'input')} for "
                f"{counted(len(self.models), 'model')}: give one per model."
            )
        columns = [
            [self._encode(model, part) for part in self.split_inputs(value, size)]
            for model, value, size in zip(self.models, model_inputs, self.chunk_sizes, strict=True)
        ]
        reps = [torch.cat([chunk.embedding for chunk in column]) for column in columns]
        with self._autocast(model_inputs):
            loss = self.compute_loss(*reps, **loss_kwargs)
        torch.autograd.backward(self.scaler.scale(loss) if self.fp16 and self.scaler else loss)
        backward_of_chunks(
            (chunk, model)
            for model, column in zip(self.models, columns, strict=True)
            for chunk in column
        )
        return loss.detach()

    def split_inputs(self, model_input: Any, chunk_size: int) -> list[Any]:
        """The chunks of one input."""
        if self.split_input_fn is not None:
            return list(self.split_input_fn(model_input, chunk_size))
        ranges = chunk_ranges(model_input, chunk_size, "an input")
        return [cut(model_input, start, stop) for start, stop in ranges]

    def model_call(self, model: Callable[..., Any], model_input: Any) -> Any:
        """A list gives positions, a mapping keywords, (list, dict) both, a tensor one argument."""
        if isinstance(model_input, Mapping):
            return model(**model_input)
        if isinstance(model_input, list):
            return model(*model_input)
        if isinstance(model_input, tuple) and [type(p) for p in model_input] == [list, dict]:
            return model(*model_input[0], **model_input[1])
        return model(model_input)

    def get_reps(self, model_out: Any) -> Tensor:
        """The embeddings in a model's output."""
        reps: Tensor = model_out if self.get_rep_fn is None else self.get_rep_fn(model_out)
        return reps

    def compute_loss(self, *reps: Tensor, **loss_kwargs: Any) -> Tensor:
        """The loss of all embeddings."""
        return self.loss_fn(*reps, **loss_kwargs)

    def _encode(self, model: Callable[..., Any], part: Any) -> Chunk:
        with self._autocast(part), _unreduced(model):
            return deferred(lambda: self.get_reps(self.model_call(model, part)))()

    def _autocast(self, value: Any) -> Any:
        if not self.fp16:
            return nullcontext()
        accelerator = torch.accelerator.current_accelerator()
        return torch.autocast("cpu" if accelerator is None else accelerator.type)


def _unreduced(model: Any) -> Any:
    return without_reduction(reducers_of(modules_of(model)))


def backward_of_chunks(chunks: Iterator[tuple[Chunk, Any]]) -> None:
    """The backward of every chunk; each wrapper of its model reduces with its last one only."""
    items = list(chunks)
    wrappers = [reducers_of(modules_of(model)) for _, model in items]
    last = {wrapper: number for number, found in enumerate(wrappers) for wrapper in found}
    for number, (chunk, _) in enumerate(items):
        with without_reduction(w for w, n in last.items() if n != number):
            chunk.backward()


def cached(func: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """Decorate a model call: it returns leaves for its embeddings, and a function.

    Call that function with the leaves after the loss's backward: it calls the model again, with the
    same random numbers, and carries the leaves' gradients down.
    """

    @wraps(func)
    def call_without_graph(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        shapes: list[torch.Size] = []

        def flat() -> Tensor:
            found = func(*args, **kwargs)
            parts = (found,) if isinstance(found, Tensor) else tuple(found)
            shapes[:] = [part.shape for part in parts]
            return torch.cat([part.flatten() for part in parts])

        chunk = deferred(flat)()
        pieces = torch.split(chunk.embedding.detach(), [shape.numel() for shape in shapes])
        leaves = tuple(
            piece.view(shape).requires_grad_(chunk.embedding.requires_grad)
            for piece, shape in zip(pieces, shapes, strict=True)
        )

        @wraps(func)
        def backward(*cache_reps: Any) -> None:
            given = cache_reps[0] if len(cache_reps) == 1 else cache_reps
            given = (given,) if isinstance(given, Tensor) else tuple(given)
            gradients = [torch.zeros_like(g) if g.grad is None else g.grad for g in given]
            chunk.embedding.grad = torch.cat([gradient.flatten() for gradient in gradients])
            chunk.backward()

        return (*leaves, backward)

    return call_without_graph


def _joined(value: Any) -> Any:
    if isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
        return torch.cat(value)
    return value


def cat_input_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a loss: lists of tensors, positional or by keyword, reach it as one tensor."""

    @wraps(func)
    def of_lists(*args: Any, **kwargs: Any) -> Any:
        return func(*map(_joined, args), **{name: _joined(v) for name, v in kwargs.items()})

    return of_lists


def _gathered(value: Any, axis: int) -> Any:
    if not isinstance(value, Tensor):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    parts[dist.get_rank()] = value
    return torch.cat(parts, dim=axis)


def gather_input_tensor(func: Callable[..., Any], axis: int = 0) -> Callable[..., Any]:
    """Decorate a loss: tensors of all ranks reach it as one; this rank's part has a gradient."""

    @wraps(func)
    def of_ranks(*args: Any, **kwargs: Any) -> Any:
        everything = {name: _gathered(value, axis) for name, value in kwargs.items()}
        return func(*(_gathered(value, axis) for value in args), **everything)

    return of_ranks
