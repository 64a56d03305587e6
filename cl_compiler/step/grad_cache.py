"""``GradientCache``: a training step whose encoders hold the graph of one chunk at a time.

The embeddings of a whole batch are small; what fills the memory is the graph between them and the
parameters.  So a step encodes everything without graphs, asks the loss once for the gradients of
all embeddings, and then encodes each chunk a second time, as it was, to carry its part of those
gradients down to the parameters (Gao et al. 2021).  The gradients are those of the whole batch; the
price is a second forward of the encoders that train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.step.autocast import AutocastState, forget_casts
from cl_compiler.step.inputs import Tokens, tensors_of
from cl_compiler.step.modules import (
    Buffers,
    leaves_of,
    modules_of,
    reducers_of,
    without_reduction,
)
from cl_compiler.step.out_of_memory import blamed_encoder
from cl_compiler.step.passes import (
    LossGradients,
    Report,
    backpropagate,
    differentiate,
    encode,
)
from cl_compiler.step.planner import StepPlan, plan_jobs
from cl_compiler.step.progress import reporter
from cl_compiler.step.randomness import RandomState
from cl_compiler.step.towers import Call, Encoder, Job, Tower, call_by_structure

__all__ = ["GradientCache"]

T = TypeVar("T")


class GradientCache:
    """A step over a batch that is larger than what the encoders could hold a graph of.

        step = GradientCache([image_encoder, text_encoder], loss_fn, chunk_sizes=64)
        value = step(images, texts, logit_scale=scale)   # gradients are in .grad, value is detached
        optimizer.step()

    Calling it takes one input per encoder and the keywords of the loss, which gets the embeddings
    by position.  Gradients are added to ``.grad`` as a backward adds them, those of the loss's own
    parameters and keywords once.  What comes back is what the loss returned, without graphs.  Under
    ``torch.no_grad`` it evaluates the loss.

    *Randomness.*  Every chunk sees the same random numbers in both passes.  *Buffers* (BatchNorm's
    running statistics) are updated once, as the chunks in their order update them; BatchNorm itself
    normalises with the statistics of its chunk, not of the batch.  *Autocast* of the caller holds
    for encoders and loss, not for the backwards.  *DistributedDataParallel* and ``fully_shard``
    reduce once per step, and not at all where the caller has turned that off; the latter gathers
    weights for every chunk, so that all ranks need the same number of chunks.  *Errors* leave
    random generators, buffers and gradients as they were; gradients that were there before the step
    then hold a part of its sum.

    *Memory.*  A chunk that runs out of memory is halved, for good, and the step tried once more,
    where no gradient was there before it and no gradients are reduced across ranks.

    Args:
        encoders: modules, methods of modules or functions; the same one may occur twice.  One whose
            parameters are all frozen is run once, and the loss computes no gradient for it.
        loss_fn: called with one tensor per encoder; a compiled loss or any other.
        chunk_sizes: samples per chunk, or ``Tokens``; one for all encoders or one for each; "auto":
            the fastest that hold memory_budget, found at the first batch (see ``plan_step``) and
            again at a larger one.
        memory_budget: of what a step allocates on one device; with "auto" only.
        embedding: from an encoder's output to the tensor [rows, …] that the loss gets; one or one
            for each; None where the output is that tensor.
        call: (encoder, chunk) -> output; one or one for each.  By default a mapping gives keywords,
            a tuple positions, anything else is the one argument.  It is also the place to move a
            chunk to a device.
        scaler: its factor multiplies the loss before the backward.
        progress: show a progress bar, or call this with stage, samples done and samples in all.

    Raises:
        ArgumentError: arguments that do not fit together.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        loss_fn: Callable[..., Any],
        *,
        chunk_sizes: int | Tokens | Sequence[int | Tokens] | Literal["auto"],
        memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None = None,
        embedding: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
        call: Call | Sequence[Call] = call_by_structure,
        scaler: torch.amp.GradScaler | None = None,
        progress: bool | Report = False,
    ) -> None:
        if isinstance(encoders, nn.Module) and not isinstance(encoders, nn.ModuleList):
            raise ArgumentError(
                f"encoders is a single {type(encoders).__name__}: give a list with one encoder per "
                "input of the loss, e.g. [model, model] where both inputs share it."
            )
        count = len(encoders)
        if not count:
            raise ArgumentError("no encoders: give one per input of the loss.")
        if (chunk_sizes == "auto") != (memory_budget is not None):
            raise ArgumentError(
                f"chunk_sizes={chunk_sizes!r} with memory_budget={memory_budget!r}: give "
                'chunk_sizes="auto" and a budget, e.g. "8GiB", or numbers and no budget.'
            )
        self.memory_budget = None if memory_budget is None else MemoryBudget.parse(memory_budget)
        self.plan: StepPlan | None = None
        wanted = 1 if chunk_sizes == "auto" else chunk_sizes  # until the first batch
        sizes: list[int | Tokens] = _for_each(wanted, count, "chunk_sizes")
        for size in sizes:
            tokens = size.per_chunk if isinstance(size, Tokens) else size
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ArgumentError(
                    f"chunk_sizes has {size!r}: a chunk is a number of samples of at least 1, or "
                    "Tokens(per_chunk) of at least 1."
                )
        self.loss_fn = loss_fn
        self.scaler = scaler
        self.progress = progress
        calls = _for_each(call, count, "call")
        picks = _for_each(embedding, count, "embedding")
        self.towers = tuple(
            Tower(number, encoder, sizes[number], calls[number], picks[number])
            for number, encoder in enumerate(encoders)
        )

    def __call__(self, *inputs: Any, **loss_arguments: Any) -> Any:
        """One step: see the class.

        Args:
            *inputs: one per encoder; see ``cl_compiler.step.inputs`` for what is cut how.
            **loss_arguments: go to the loss as they are.

        Returns:
            What the loss returned, detached.
        """
        if len(inputs) != len(self.towers):
            raise ArgumentError(
                f"{len(inputs)} inputs for {len(self.towers)} encoders: give one per encoder by "
                "position, and everything else by keyword."
            )
        if self.memory_budget is not None:
            self._plan(inputs, loss_arguments, self.memory_budget)
        with reporter(self.progress) as report:
            jobs = self._jobs(inputs)
            if not torch.is_grad_enabled():
                return _evaluate(jobs, self.loss_fn, loss_arguments, report)
            try:
                return _train(jobs, self.loss_fn, loss_arguments, self.scaler, report)
            except (RuntimeError, MemoryError) as error:
                if not self._learns_from(error, jobs, loss_arguments):
                    raise
            # Outside of the handler: the error's traceback holds what the failed step allocated.
            jobs = self._jobs(inputs)
            return _train(jobs, self.loss_fn, loss_arguments, self.scaler, report)

    @property
    def chunk_sizes(self) -> tuple[int | Tokens, ...]:
        """As they are now, one for each encoder."""
        return tuple(tower.chunk_size for tower in self.towers)

    def _jobs(self, inputs: Sequence[Any]) -> list[Job]:
        return [tower.job(value) for tower, value in zip(self.towers, inputs, strict=True)]

    def _plan(
        self, inputs: Sequence[Any], loss_arguments: Mapping[str, Any], budget: MemoryBudget
    ) -> None:
        """Chunk sizes for batches up to the size of this one, where there are none yet."""
        with torch.enable_grad():
            jobs = self._jobs(inputs)
            if self.plan is not None and self.plan.samples >= max(job.samples for job in jobs):
                return
            self.plan = plan_jobs(jobs, self.loss_fn, budget.device_bytes, loss_arguments)
        sizes = zip(self.towers, self.plan.chunk_sizes, strict=True)
        self.towers = tuple(replace(tower, chunk_size=size) for tower, size in sizes)

    def _learns_from(
        self, error: BaseException, jobs: Sequence[Job], loss_arguments: Mapping[str, Any]
    ) -> bool:
        """Halve the chunk that ran out of memory; False where a second try would not be safe."""
        number = blamed_encoder(error)
        modules = modules_of(*(job.tower.modules for job in jobs))
        if number is None or reducers_of(modules) or not _are_scalars(loss_arguments):
            return False
        if any(p.grad is not None for p in _trained(jobs, modules, self.loss_fn, loss_arguments)):
            return False
        largest = max(stop - start for start, stop in jobs[number].ranges)
        if largest < 2:
            return False
        size = self.towers[number].chunk_size
        if isinstance(size, Tokens):
            half: int | Tokens = replace(size, per_chunk=max(1, size.per_chunk // 2))
        else:
            half = largest // 2
        towers = list(self.towers)
        towers[number] = replace(towers[number], chunk_size=half)
        self.towers = tuple(towers)
        return True


def _for_each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ArgumentError(f"{name} has {len(value)} entries for {count} encoders; give one each.")
    return list(value)


def _counter(report: Report, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(samples: int) -> None:
        nonlocal done
        done += samples
        report(stage, done, total)

    return add


def _evaluate(
    jobs: Sequence[Job],
    loss_fn: Callable[..., Any],
    loss_arguments: Mapping[str, Any],
    report: Report,
) -> Any:
    count = _counter(report, "encode", sum(job.samples for job in jobs))
    return loss_fn(*(encode(job, count).embeddings for job in jobs), **loss_arguments)


def _train(
    jobs: Sequence[Job],
    loss_fn: Callable[..., Any],
    loss_arguments: Mapping[str, Any],
    scaler: torch.amp.GradScaler | None,
    report: Report,
) -> Any:
    modules = modules_of(*(job.tower.modules for job in jobs))
    training = [job for job in jobs if job.trains]
    reducers = reducers_of(m for job in training for m in job.tower.modules)
    devices = frozenset().union(*(job.devices for job in jobs))
    autocast = AutocastState.now(devices)
    # A keyword's parameter (logit_scale) inside a DistributedDataParallel belongs to the backward
    # that reduces, unless unused parameters are looked for: then it counts as one of them there.
    hold = any(getattr(reducer, "find_unused_parameters", True) is False for reducer in reducers)
    # Alone, a scalar's own graph (log_scale.exp()) waits, too: the step can be tried again.
    hold = hold or (not reducers and _are_scalars(loss_arguments))
    parameters = _trained(jobs, modules, loss_fn, loss_arguments)
    buffers = Buffers(modules)
    with _undone_by_errors(parameters, buffers, devices):
        count = _counter(report, "encode", sum(job.samples for job in jobs))
        with without_reduction(reducers):
            forget_casts()
            encoded = [encode(job, count) for job in jobs]
            forget_casts()
            states = [one.states for one in encoded]
            loss: LossGradients = differentiate(
                encoded, loss_fn, loss_arguments, scaler, autocast, hold_arguments=hold
            )
            forget_casts()
        del encoded
        after = RandomState.now(devices)
        updated = buffers.forget_unchanged()
        buffers.restore()
        count = _counter(report, "backpropagate", sum(job.samples for job in training))
        backpropagate(jobs, states, loss, autocast, count)
        updated.restore()
        if any(state is not None for per_job in states for state in per_job):
            after.set()
    return loss.returned


def _are_scalars(loss_arguments: Mapping[str, Any]) -> bool:
    """Whether those of the loss's keywords that come with a graph are scalars."""
    tensors = [t for value in loss_arguments.values() for t in tensors_of(value)]
    return all(t.numel() == 1 for t in tensors if t.requires_grad and not t.is_leaf)


def _trained(
    jobs: Sequence[Job],
    modules: Sequence[nn.Module],
    loss_fn: Callable[..., Any],
    loss_arguments: Mapping[str, Any],
) -> list[Tensor]:
    """Everything that may get a gradient."""
    found: list[Tensor] = [p for m in (*modules_of(loss_fn), *modules) for p in m.parameters()]
    given = [*loss_arguments.values(), *(job.value for job in jobs)]
    return found + leaves_of([t for value in given for t in tensors_of(value)])


@contextmanager
def _undone_by_errors(
    parameters: Sequence[Tensor], buffers: Buffers, devices: frozenset[torch.device]
) -> Iterator[None]:
    """An error inside leaves generators, buffers and gradients as they were before."""
    before = RandomState.now(devices)
    empty = [p for p in parameters if p.grad is None]
    try:
        yield
    except BaseException as error:
        before.set()
        buffers.restore()
        forget_casts()
        for parameter in empty:
            parameter.grad = None
        if len(empty) < len(parameters):
            error.add_note(
                "Gradients that were there before the step may hold a part of its sum: set them to "
                "zero before the next one."
            )
        raise
