"""The three stages of a cached step: encode without graphs, differentiate the loss, encode again.

Everything that a step knows lives in its own arguments and results, so that steps may nest or run
side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cl_compiler.errors import ArgumentError
from cl_compiler.step.autocast import AutocastState, forget_casts
from cl_compiler.step.ledger import Ledger
from cl_compiler.step.modules import owner_of, reducers_of, without_reduction
from cl_compiler.step.offload import Link, Pending, Room, RowsHere
from cl_compiler.step.out_of_memory import blame
from cl_compiler.step.randomness import RandomState
from cl_compiler.step.towers import Chunk, Job

__all__ = ["Encoded", "LossGradients", "Report", "backpropagate", "differentiate", "encode"]

Report = Callable[[str, int, int], None]
"""Called after every chunk with the stage, the samples done and the samples in all."""


@dataclass(frozen=True)
class Encoded:
    """What the first pass leaves of one encoder.

    embeddings: [rows, …], rows = samples · rows per sample, on the device or in host memory, None
    after the loss;
    trains: whether the loss computes their gradient; ranges: of the chunks, in samples;
    states: of each chunk the state of the random generators before it, None where it drew nothing.
    """

    embeddings: Tensor | Room | None
    rows: int
    trains: bool
    ranges: tuple[tuple[int, int], ...]
    states: tuple[RandomState | None, ...]

    def leaf(self) -> Tensor:
        """The embeddings as the loss gets them, on the device."""
        found = self.embeddings
        assert found is not None
        if not isinstance(found, Tensor):
            found = found.begin(0, self.rows).get()
        return found.requires_grad_(self.trains)


@dataclass(frozen=True)
class LossGradients:
    """The loss, and its gradients with respect to each encoder's embeddings; None: not needed.

    embeddings: on the device, or in host memory;
    late: (tensor with a graph, its gradient) of arguments whose backward belongs to the last chunk.
    """

    returned: Any
    embeddings: tuple[Tensor | Room | None, ...]
    late: tuple[tuple[Tensor, Tensor], ...]


def encode(job: Job, report: Callable[[int], None], *, on_host: bool = False) -> Encoded:
    """The first pass of one encoder: its embeddings, chunk by chunk, and nothing else.

    Args:
        job: the encoder and its input.
        report: told the samples of each chunk.
        on_host: leave the embeddings in host memory.

    Raises:
        ArgumentError: chunks whose embeddings do not fit together.
    """
    whole: Tensor | Room | None = None
    rows, kind = 0, None  # of all embeddings: how many, and one without rows
    ranges: list[tuple[int, int]] = []
    states: list[RandomState | None] = []
    with_graph = job.trains and job.tower.needs_graph()
    before: RandomState | None = None
    for chunk in job.chunks():
        samples, value = chunk.stop - chunk.start, chunk.fetch()
        if job.trains and (before is None or job.ranges is None):  # reading may have drawn some
            before = RandomState.now(job.devices)
        with blame(job.tower.number), nullcontext() if with_graph else torch.no_grad():
            part = job.tower.encode(value).detach()
        del value
        if with_graph:
            forget_casts()
        if kind is None:
            per_sample, kind = _rows_per_sample(job, part, samples), part[:0].clone()
            rows = job.samples * per_sample
            if on_host:
                whole = job.link.room(kind, rows)
            else:
                alone = samples == job.samples
                whole = part if alone else part.new_empty((rows, *part.shape[1:]))
        _check_rows(job, part, kind, rows, samples)
        first = chunk.start * per_sample
        if isinstance(whole, Tensor):
            if whole is not part:
                whole[first : first + len(part)] = part
        elif whole is not None:
            whole.put(first, part)
        del part
        ranges.append((chunk.start, chunk.stop))
        if before is not None:
            after = RandomState.now(job.devices)
            drew = not after.same_as(before)
            states.append(before if drew else None)
            before = after if drew else before
        report(samples)
    assert whole is not None and kind is not None  # an input without samples is refused
    if job.trains and not kind.is_floating_point():
        raise ArgumentError(
            f"{job.tower.what} returned embeddings of {kind.dtype}, which have no gradient; "
            "return floating-point numbers, or freeze the encoder with requires_grad_(False)."
        )
    return Encoded(whole, rows, job.trains, tuple(ranges), tuple(states))


def _rows_per_sample(job: Job, part: Tensor, samples: int) -> int:
    rows, rest = divmod(part.shape[0], samples)
    if rest or not rows:
        raise ArgumentError(
            f"{job.tower.what} returned {part.shape[0]} rows for a chunk of {samples} samples; it "
            "must return the same number for every sample. Where the embeddings are a part of "
            "what it returns, pass embedding=."
        )
    return rows


def _check_rows(job: Job, part: Tensor, kind: Tensor, rows: int, samples: int) -> None:
    same_rows = part.shape[0] * job.samples == rows * samples
    if same_rows and part.shape[1:] == kind.shape[1:] and part.dtype == kind.dtype:
        return
    raise ArgumentError(
        f"{job.tower.what} returned {list(part.shape)} {part.dtype} for a chunk of {samples} "
        f"samples, and {list(kind.shape[1:])} {kind.dtype} per row before; all chunks must agree."
    )


def differentiate(
    encoded: Sequence[Encoded],
    loss_fn: Callable[..., Any],
    arguments: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None,
    autocast: AutocastState,
    *,
    hold_arguments: bool,
    ledger: Ledger,
    link: Link | None = None,
) -> LossGradients:
    """The second stage: the loss of all embeddings, and one backward down to them.

    Args:
        encoded: of each encoder, in the order of the loss's arguments.
        loss_fn: returns a scalar, a tuple that begins with one, or a mapping with "loss".
        arguments: the loss's keywords.
        scaler: multiplies the loss before its backward.
        autocast: what to leave for the backward.
        hold_arguments: keep the backward of keyword arguments for the end of the step.
        ledger: enters what the loss gives gradients to.
        link: to the host memory where the gradients of embeddings are to wait.

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
    leaves = [one.leaf() for one in encoded]
    returned = loss_fn(*leaves, **keywords)
    value, detached = _value_of(returned)
    if value.requires_grad:
        scaled = value if scaler is None else scaler.scale(value)
        ledger.meet([scaled], but=[*leaves, *(leaf for _, leaf in held)])
        with autocast.suspended():
            torch.autograd.backward(scaled)
    elif any(one.trains for one in encoded):
        raise ArgumentError(
            "the loss has no graph although encoders train: it detaches its arguments, or runs "
            "under no_grad. Return the loss as PyTorch computed it."
        )
    late = tuple((given, leaf.grad) for given, leaf in held if leaf.grad is not None)
    gradients: list[Tensor | Room | None] = []
    for leaf in leaves:
        gradients.append(leaf.grad if link is None or leaf.grad is None else _kept(leaf.grad, link))
        leaf.grad = None
    return LossGradients(detached, tuple(gradients), late)


def _kept(gradient: Tensor, link: Link) -> Room:
    room = link.room(gradient, gradient.shape[0])
    room.put(0, gradient)
    return room


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
    first: Sequence[Encoded],
    loss: LossGradients,
    autocast: AutocastState,
    ledger: Ledger,
    report: Callable[[int], None],
) -> None:
    """The third stage: every chunk again, as it was, with a graph; its gradient goes down it.

    Args:
        jobs: the encoders and their inputs.
        first: what the first pass left; its embeddings are not needed.
        loss: the gradients.
        autocast: what to leave for the backwards.
        ledger: enters what encoders of unknown parts give gradients to.
        report: told the samples of each chunk.

    Raises:
        ArgumentError: an encoder or a stream does not do again what it did.
    """
    wanted = [n for n, gradient in enumerate(loss.embeddings) if gradient is not None]
    items = [(n, chunk) for n in wanted for chunk in range(len(first[n].ranges))]
    reducers = {n: reducers_of(jobs[n].tower.modules) for n in wanted}
    last = last_uses(reducers, items)
    late = loss.late
    for n in wanted:
        job = jobs[n]
        for number, (chunk, piece) in enumerate(_with_gradients(job, first[n], loss.embeddings[n])):
            unreduced = without_reduction(r for r in last if last[r] != (n, number))
            with blame(job.tower.number), unreduced:
                value = chunk.fetch()
                state = first[n].states[number]
                if state is not None:
                    state.set()
                part = job.tower.encode(value)
                if not part.requires_grad:
                    break  # an encoder that turned out to train nothing
                gradient = piece.get()
                if gradient.shape != part.shape:
                    raise ArgumentError(
                        f"{job.tower.what} returned {list(part.shape)} for a chunk that gave "
                        f"{list(gradient.shape)} before; the shape may depend on nothing but the "
                        "input."
                    )
                roots, gradients = [part], [gradient]
                if (n, number) == items[-1]:
                    roots += [given for given, _ in late]
                    gradients += [leaf for _, leaf in late]
                    late = ()
                if number == 0 or owner_of(job.tower.encoder) is None:
                    ledger.meet(roots)
                with autocast.suspended():
                    torch.autograd.backward(roots, gradients)
                del part, roots, gradients, gradient, value
                forget_casts()
            report(chunk.stop - chunk.start)
    if late:
        ledger.meet(given for given, _ in late)
        with autocast.suspended():
            torch.autograd.backward([given for given, _ in late], [leaf for _, leaf in late])


def _with_gradients(
    job: Job, first: Encoded, gradient: Tensor | Room | None
) -> Iterator[tuple[Chunk, Pending]]:
    """Each chunk and its rows of the gradient, both on their way to the device.

    Raises:
        ArgumentError: a stream gives other chunks than before.
    """
    assert gradient is not None
    room = RowsHere(gradient) if isinstance(gradient, Tensor) else gradient
    per_sample = first.rows // job.samples
    for number, chunk in enumerate(job.chunks()):
        if number == len(first.ranges) or first.ranges[number] != (chunk.start, chunk.stop):
            raise ArgumentError(
                f"the input of {job.tower.what} gave other parts when it was read again: a Stream "
                "has to give the same ones each time (a DataLoader without shuffle)."
            )
        # On its way while the chunk is encoded: it is wanted after that.
        yield chunk, room.begin(chunk.start * per_sample, chunk.stop * per_sample)
