"""The same by hand, for loops that gather micro-batches themselves: two decorators.

@deferred
def encode(model, batch):
    return model(**batch).pooler_output

@joined
def contrast(x, y, logit_scale):
    return loss_fn(x, y, logit_scale=logit_scale)

xs, ys = [], []
for a, b in micro_batches:                     # any number of them
    xs.append(encode(query_model, a))          # no graph is kept
    ys.append(encode(passage_model, b))
value = contrast(xs, ys, logit_scale=scale)
value.backward()                               # down to the embeddings
for chunk in (*xs, *ys):
    chunk.backward()                           # encodes again, down to the parameters
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError
from cl_compiler.step.autocast import AutocastState, forget_casts
from cl_compiler.step.inputs import devices_of, tensors_of
from cl_compiler.step.modules import Buffers, devices_of_modules, is_compiled, modules_of
from cl_compiler.step.randomness import RandomState

__all__ = ["Chunk", "deferred", "joined"]

P = ParamSpec("P")
R = TypeVar("R")


class Chunk:
    """Embeddings that were computed without a graph, and how to compute them again with one.

    ``embedding``: [rows, …], a leaf that collects the gradient of the loss.
    """

    def __init__(self, encode: Callable[..., Tensor], args: Any, kwargs: Any) -> None:
        again = functools.partial(encode, *args, **kwargs)
        self._again: Callable[[], Tensor] | None = again
        self._modules = modules = modules_of(again)
        given = (*args, *kwargs.values())
        self._devices = devices_of(given) | devices_of_modules(modules)
        before = RandomState.now(self._devices)
        self._autocast = AutocastState.now(self._devices)
        forget_casts()
        trains = torch.is_grad_enabled() and not _is_frozen(modules, given)
        compiled = trains and is_compiled(encode, modules)
        with torch.set_grad_enabled(compiled):
            found = again()
        forget_casts()
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise ArgumentError(
                f"a @deferred function returned {type(found).__name__}: it must return the "
                "embeddings as one floating-point tensor. Pick them from the encoder's output."
            )
        drew = not before.same_as(RandomState.now(self._devices))
        self._before = before if drew else None
        self.embedding = found.detach().requires_grad_(trains)

    def backward(self) -> None:
        """Encode again with the same random numbers and autocast; add to the gradients.

        Buffers keep the values that they have now.  Where all modules are frozen, nothing is done.

        Raises:
            ArgumentError: it was done already, or the loss has had no backward.
        """
        if self._again is None:
            raise ArgumentError(
                "a chunk's backward ran twice: its gradient has been used up. Call the @deferred "
                "function again for another step."
            )
        gradient = self.embedding.grad
        if not self.embedding.requires_grad:
            self._again = None
            return
        if gradient is None:
            raise ArgumentError(
                "a chunk's embedding has no gradient: run the loss on it and the loss's backward "
                "first."
            )
        now, buffers = RandomState.now(self._devices), Buffers(self._modules)
        outer = AutocastState.now(self._devices)
        try:
            if self._before is not None:
                self._before.set()
            forget_casts()
            with self._autocast.again(), torch.enable_grad():
                found = self._again()
            if found.requires_grad:
                with outer.suspended():
                    torch.autograd.backward(found, gradient)
        finally:
            forget_casts()
            buffers.restore()
            now.set()
        self._again = None
        self.embedding.grad = None


def deferred(encode: Callable[P, Tensor]) -> Callable[P, Chunk]:
    """Decorate a function that encodes one chunk: it then returns a ``Chunk``.

    Args:
        encode: returns embeddings [rows, …]; its arguments are kept until the chunk's backward.
    """

    @functools.wraps(encode)
    def encode_deferred(*args: P.args, **kwargs: P.kwargs) -> Chunk:
        return Chunk(encode, args, kwargs)

    return encode_deferred


def _is_frozen(modules: tuple[nn.Module, ...], given: Any) -> bool:
    """Whether modules are known, and neither they nor the input train anything."""
    tensors = [*tensors_of(given), *(p for module in modules for p in module.parameters())]
    return bool(modules) and not any(t.requires_grad for t in tensors)


def joined(loss_fn: Callable[..., R]) -> Callable[..., R]:
    """Decorate a loss: it then also takes lists of chunks where it takes embeddings.

    Args:
        loss_fn: any loss; each list or tuple of chunks or tensors among its arguments, positional
            or by keyword, reaches it as one tensor, a single chunk as its embedding.
    """

    @functools.wraps(loss_fn)
    def loss_of_chunks(*args: Any, **kwargs: Any) -> R:
        return loss_fn(*map(_join, args), **{k: _join(v) for k, v in kwargs.items()})

    return loss_of_chunks


def _join(value: Any) -> Any:
    if isinstance(value, Chunk):
        return value.embedding
    if isinstance(value, list | tuple) and value:
        parts = [part.embedding if isinstance(part, Chunk) else part for part in value]
        if all(isinstance(part, Tensor) and part.dim() > 0 for part in parts):
            return torch.cat(parts)
    return value
