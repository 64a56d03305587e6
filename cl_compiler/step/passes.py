"""The three stages of a cached step: encode without graphs, differentiate the loss, encode again.

Everything that a step knows lives in its own arguments and results, so that steps may nest or run
side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cl_compiler.errors import ArgumentError
from cl_compiler.step.autocast import AutocastState, forget_casts
from cl_compiler.step.modules import reducers_of, without_reduction
from cl_compiler.step.out_of_memory import blame
from cl_compiler.step.randomness import RandomState
from cl_compiler.step.towers import Job

__all__ = ["Encoded", "LossGradients", "Report", "backpropagate", "differentiate", "encode"]

Report = Callable[[str, int, int], None]
"""Called after every chunk with the stage, the samples done and the samples in all."""


@dataclass(frozen=True)
class Encoded:
    """What the first pass leaves of one encoder.

    embeddings: [samples · rows per sample, …], a leaf; states: of each chunk the state of the
    random generators before it, None where it drew nothing.
    """

    embeddings: Tensor
    states: tuple[RandomState | None, ...]


@dataclass(frozen=True)
class LossGradients:
    """The loss, and its gradients with respect to each encoder's embeddings; None: not needed.

    late: (tensor with a graph, its gradient) of arguments whose backward belongs to the last chunk.
    """

    returned: Any
    embeddings: tuple[Tensor | None, ...]
    late: tuple[tuple[Tensor, Tensor], ...]


def encode(job: Job, report: Callable[[int], None]) -> Encoded:
    """The first pass of one encoder: its embeddings, chunk by chunk, and nothing else.

    Raises:
        ArgumentError: chunks whose embeddings do not fit together.
    """
    embeddings: Tensor | None = None
    states: list[RandomState | None] = []
    with_graph = job.trains and job.tower.needs_graph()
    before = RandomState.now(job.devices) if job.trains else None
    for number, (start, stop) in enumerate(job.ranges):
        with blame(job.tower.number), nullcontext() if with_graph else torch.no_grad():
            part = job.tower.encode(job.chunk(number)).detach()
        if with_graph:
            forget_casts()
        if len(job.ranges) == 1:
            embeddings = part
        elif embeddings is None:
            rows = job.samples * _rows_per_sample(job, part, stop - start)
            embeddings = part.new_empty((rows, *part.shape[1:]))
        _check_rows(job, part, embeddings, stop - start)
        if embeddings is not part:
            per_sample = embeddings.shape[0] // job.samples
            embeddings[start * per_sample : stop * per_sample] = part
        del part
        if before is not None:
            after = RandomState.now(job.devices)
            drew = not after.same_as(before)
            states.append(before if drew else None)
            before = after if drew else before
        report(stop - start)
    assert embeddings is not None  # an input without samples is refused
    if job.trains and not embeddings.is_floating_point():
        raise ArgumentError(
            f"{job.tower.what} returned embeddings of {embeddings.dtype}, which have no gradient; "
            "return floating-point numbers, or freeze the encoder with requires_grad_(False)."
        )
    return Encoded(embeddings.requires_grad_(job.trains), tuple(states))


def _rows_per_sample(job: Job, part: Tensor, samples: int) -> int:
    rows, rest = divmod(part.shape[0], samples)
    if rest or not rows:
        raise ArgumentError(
            f"{job.tower.what} returned {part.shape[0]} rows for a chunk of {samples} samples; it "
            "must return the same number for every sample. Where the embeddings are a part of "
            "what it returns, pass embedding=."
        )
    return rows


def _check_rows(job: Job, part: Tensor, whole: Tensor, samples: int) -> None:
    same_rows = part.shape[0] * job.samples == whole.shape[0] * samples
    if same_rows and part.shape[1:] == whole.shape[1:] and part.dtype == whole.dtype:
        return
    raise ArgumentError(
        f"{job.tower.what} returned {list(part.shape)} {part.dtype} for a chunk of {samples} "
        f"samples, and {list(whole.shape[1:])} {whole.dtype} per row before; all chunks must agree."
    )


def differentiate(
    encoded: Sequence[Encoded],
    loss_fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None,
    autocast: AutocastState,
    *,
    hold_arguments: bool,
) -> LossGradients:
    """The second stage: the loss of all embeddings, and one backward down to them.

    Args:
        encoded: of each encoder, in the order of the loss's arguments.
        loss_fn: returns a scalar, a tuple that begins with one, or a mapping with "loss".
        arguments: the loss's keywords.
        scaler: multiplies the loss before its backward.
        autocast: what to leave for the backward.
        hold_arguments: keep the backward of keyword arguments for the end of the step.

    Raises:
        ArgumentError: the loss returns something else, or something without a graph.
    """
    held: list[tuple[Tensor, Tensor]] = []

    def hold(argument: Any) -> Any:
        if not (isinstance(argument, Tensor) and argument.requires_grad):
            return argument
        leaf = argument.detach().requires_grad_()
        held.append((argument, leaf))
        return leaf

    keywords = {k: tree_map(hold, v) for k, v in arguments.items()} if hold_arguments else arguments
    returned = loss_fn(*(e.embeddings for e in encoded), **keywords)
    value, detached = _value_of(returned)
    if value.requires_grad:
        scaled = value if scaler is None else scaler.scale(value)
        with autocast.suspended():
            torch.autograd.backward(scaled)
    elif any(e.embeddings.requires_grad for e in encoded):
        raise ArgumentError(
            "the loss has no graph although encoders train: it detaches its arguments, or runs "
            "under no_grad. Return the loss as PyTorch computed it."
        )
    late = tuple((given, leaf.grad) for given, leaf in held if leaf.grad is not None)
    return LossGradients(detached, tuple(e.embeddings.grad for e in encoded), late)


def _value_of(returned: Any) -> tuple[Tensor, Any]:
    """The loss in what a loss function returned, and the latter without graphs."""
    value = returned
    if isinstance(returned, tuple) and returned:
        value = returned[0]
    elif isinstance(returned, Mapping):
        value = returned.get("loss")
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"the loss function returned {got}; it must return a scalar tensor, a tuple that "
            'begins with one, or a mapping that has one as "loss".'
        )
    return value, tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, returned)


def last_uses(
    reducers: Mapping[int, Sequence[nn.Module]], items: Iterable[tuple[int, int]]
) -> dict[nn.Module, tuple[int, int]]:
    """Of each reducer the last (job, chunk) that uses it: there it reduces."""
    return {reducer: item for item in items for reducer in reducers[item[0]]}


def backpropagate(
    jobs: Sequence[Job],
    states: Sequence[Sequence[RandomState | None]],
    loss: LossGradients,
    autocast: AutocastState,
    report: Callable[[int], None],
) -> None:
    """The third stage: every chunk again, as it was, with a graph; its gradient goes down it.

    Raises:
        ArgumentError: an encoder does not do again what it did.
    """
    wanted = [n for n, gradient in enumerate(loss.embeddings) if gradient is not None]
    items = [(n, chunk) for n in wanted for chunk in range(len(jobs[n].ranges))]
    reducers = {n: reducers_of(jobs[n].tower.modules) for n in wanted}
    last = last_uses(reducers, items)
    late = loss.late
    without: set[int] = set()  # encoders that turned out to train nothing
    for item in items:
        n, chunk = item
        job, gradient = jobs[n], loss.embeddings[n]
        start, stop = job.ranges[chunk]
        if n in without or gradient is None:
            continue
        unreduced = without_reduction(reducer for reducer in last if last[reducer] != item)
        with blame(job.tower.number), unreduced:
            state = states[n][chunk]
            if state is not None:
                state.set()
            part = job.tower.encode(job.chunk(chunk))
            if not part.requires_grad:
                without.add(n)
                continue
            rows = gradient.shape[0] // job.samples
            piece = gradient[start * rows : stop * rows]
            if piece.shape != part.shape:
                raise ArgumentError(
                    f"{job.tower.what} returned {list(part.shape)} for a chunk that gave "
                    f"{list(piece.shape)} before; the shape may depend on nothing but the input."
                )
            roots, gradients = [part], [piece]
            if item == items[-1]:
                roots += [given for given, _ in late]
                gradients += [leaf for _, leaf in late]
                late = ()
            with autocast.suspended():
                torch.autograd.backward(roots, gradients)
            del part, roots
            forget_casts()
        report(stop - start)
    if late:
        with autocast.suspended():
            torch.autograd.backward([given for given, _ in late], [leaf for _, leaf in late])
