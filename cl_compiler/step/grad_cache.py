"""``GradientCache``: a training step whose encoders hold the graph of one chunk at a time.

The embeddings of a whole batch are small; what fills the memory is the graph between them and the
parameters.  So a step encodes everything without graphs, asks the loss once for the gradients of
all embeddings, and then encodes each chunk a second time, as it was, to carry its part of those
gradients down to the parameters (Gao et al. 2021).  The gradients are those of the whole batch; the
price is a second forward of the encoders that train.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import le
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError
from cl_compiler.lang.ir import LossIR
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.step.autocast import AutocastState, forget_casts
from cl_compiler.step.chunks import units_of
from cl_compiler.step.inputs import Tokens, tensors_of
from cl_compiler.step.ledger import Ledger
from cl_compiler.step.loss_share import is_named
from cl_compiler.step.modules import (
    Buffers,
    leaves_of,
    modules_of,
    reducers_of,
    without_reduction,
)
from cl_compiler.step.offload import Link, link_to, parts
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
from cl_compiler.units import counted

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
        loss_fn: called with one tensor per encoder; a compiled loss or any other.  With "auto" also
            the name or definition of a loss, which gets what the embeddings leave of the budget.
        chunk_sizes: samples per chunk, or ``Tokens``; one for all encoders or one for each; "auto"
            or ``Tokens("auto", …)``: the fastest that hold memory_budget, found at the first batch
            (see ``plan_step``) and again at one with more or larger samples.
        memory_budget: of what a step allocates on one device; with "auto" only.
        embedding: from an encoder's output to the tensor [rows, …] that the loss gets; one or one
            for each; None where the output is that tensor.
        call: (encoder, chunk) -> output; one or one for each.  By default a mapping gives keywords,
            a tuple positions, anything else is the one argument.
        device: where the encoders are; inputs come from where they are, the host as a rule.
        offload: what waits in host memory between its uses, any of "inputs" (they come chunk by
            chunk, the next while one is encoded), "embeddings" (until the loss) and "gradients"
            (from the loss on).  With "auto" the planner decides, and this is left out.
        scaler: its factor multiplies the loss before the backward.
        progress: show a progress bar, or call this with stage, samples done and samples in all.

    Raises:
        ArgumentError: arguments that do not fit together.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        loss_fn: Callable[..., Any] | str | LossIR,
        *,
        chunk_sizes: int | Tokens | Sequence[int | Tokens | Literal["auto"]] | Literal["auto"],
        memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None = None,
        embedding: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
        call: Call | Sequence[Call] = call_by_structure,
        device: torch.device | str | None = None,
        offload: Collection[str] = (),
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
        self._units = units_of(chunk_sizes, count)
        if (self._units is not None) != (memory_budget is not None):
            raise ArgumentError(
                f"chunk_sizes={chunk_sizes!r} with memory_budget={memory_budget!r}: give "
                'chunk_sizes="auto" and a budget, e.g. "8GiB", or numbers and no budget.'
            )
        if offload and self._units is not None:
            raise ArgumentError(
                f'offload={offload!r} with chunk_sizes="auto": the planner decides what waits on '
                "the host; leave offload out, or give chunk sizes."
            )
        self.device, self.offload = device, parts(offload)
        self.memory_budget = None if memory_budget is None else MemoryBudget.parse(memory_budget)
        self.plan: StepPlan | None = None
        self._widths: tuple[float, ...] = ()
        """Of the inputs that were planned for: elements of a sample."""
        self._lessons: dict[int, int | Tokens] = {}
        """Chunk sizes after one ran out of memory, by tower: none is larger later."""
        wanted: Any = chunk_sizes if self._units is None else 1  # until the first batch
        sizes: list[int | Tokens] = _for_each(wanted, count, "chunk_sizes")
        for size in sizes:
            tokens = size.per_chunk if isinstance(size, Tokens) else size
            if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
                raise ArgumentError(
                    f"chunk_sizes has {size!r}: a chunk is a number of samples of at least 1, or "
                    "Tokens(per_chunk) of at least 1."
                )
        if is_named(loss_fn) and self._units is None:
            raise ArgumentError(
                f"loss_fn={loss_fn!r} with chunk sizes: a loss is compiled for what a memory "
                'budget leaves it, with chunk_sizes="auto"; otherwise give compile_loss(…, loss=…).'
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
                f"{counted(len(inputs), 'input')} for {counted(len(self.towers), 'encoder')}: give "
                "one per encoder by position, and everything else by keyword."
            )
        if self.memory_budget is not None:
            self._plan(inputs, loss_arguments, self.memory_budget)
        with reporter(self.progress) as report:
            jobs, ledger = self._jobs(inputs), Ledger()
            if not torch.is_grad_enabled():
                return self._evaluate(jobs, loss_arguments, report)
            try:
                return self._train(jobs, loss_arguments, report, ledger)
            except (RuntimeError, MemoryError) as error:
                if ledger.had_gradients or not self._learns_from(error, jobs, loss_arguments):
                    raise
            # Outside of the handler: the error's traceback holds what the failed step allocated.
            return self._train(self._jobs(inputs), loss_arguments, report, Ledger())

    def _evaluate(
        self, jobs: Sequence[Job], loss_arguments: Mapping[str, Any], report: Report
    ) -> Any:
        count = _counter(report, "encode", sum(job.samples for job in jobs))
        encoded = [encode(job, count, on_host="embeddings" in self.offload) for job in jobs]
        return self._loss(*(one.leaf() for one in encoded), **loss_arguments)

    def _train(
        self,
        jobs: Sequence[Job],
        loss_arguments: Mapping[str, Any],
        report: Report,
        ledger: Ledger,
    ) -> Any:
        modules = modules_of(*(job.tower.modules for job in jobs))
        training = [job for job in jobs if job.trains]
        reducers = reducers_of(m for job in training for m in job.tower.modules)
        devices = frozenset().union(*(job.devices for job in jobs))
        autocast = AutocastState.now(devices)
        # A keyword's parameter (logit_scale) inside a DistributedDataParallel belongs to the
        # backward that reduces, unless unused parameters are looked for: then it counts as one of
        # them there.
        hold = any(getattr(r, "find_unused_parameters", True) is False for r in reducers)
        # Alone, a scalar's own graph (log_scale.exp()) waits, too: the step can be tried again.
        hold = hold or (not reducers and _are_scalars(loss_arguments))
        ledger.know(_trained(jobs, modules, self._loss, loss_arguments))
        buffers = Buffers(modules)
        with _undone_by_errors(ledger, buffers, devices):
            count = _counter(report, "encode", sum(job.samples for job in jobs))
            with without_reduction(reducers):
                forget_casts()
                on_host = "embeddings" in self.offload
                encoded = [encode(job, count, on_host=on_host) for job in jobs]
                forget_casts()
                loss: LossGradients = differentiate(
                    encoded,
                    self._loss,
                    loss_arguments,
                    self.scaler,
                    autocast,
                    hold_arguments=hold,
                    ledger=ledger,
                    link=self._link() if "gradients" in self.offload else None,
                )
                forget_casts()
            first = [replace(one, embeddings=None) for one in encoded]
            del encoded
            after = RandomState.now(devices)
            updated = buffers.forget_unchanged()
            buffers.restore()
            count = _counter(report, "backpropagate", sum(job.samples for job in training))
            backpropagate(jobs, first, loss, autocast, ledger, count)
            updated.restore()
            # Reading a stream once more may draw random numbers, too.
            if any(s is not None for one in first for s in one.states) or _read_twice(jobs):
                after.set()
        return loss.returned

    def _link(self) -> Link:
        return link_to(self.device)

    @property
    def _loss(self) -> Callable[..., Any]:
        """The loss to call: as given, or as planned."""
        found: Any = self.loss_fn if self.plan is None else self.plan.loss_fn
        return found  # type: ignore[no-any-return]

    @property
    def chunk_sizes(self) -> tuple[int | Tokens, ...]:
        """As they are now, one for each encoder."""
        return tuple(tower.chunk_size for tower in self.towers)

    def _jobs(self, inputs: Sequence[Any]) -> list[Job]:
        link = self._link()
        jobs = [tower.job(value, link) for tower, value in zip(self.towers, inputs, strict=True)]
        return jobs if "inputs" in self.offload else [job.on_device() for job in jobs]

    def _plan(
        self, inputs: Sequence[Any], loss_arguments: Mapping[str, Any], budget: MemoryBudget
    ) -> None:
        """Chunk sizes for batches up to the size of this one, where there are none yet."""
        with torch.enable_grad():
            link = self._link()
            jobs = [tower.job(v, link) for tower, v in zip(self.towers, inputs, strict=True)]
            widths = tuple(_width(job) for job in jobs)
            sizes = max(job.samples for job in jobs), *widths
            if self.plan is not None and all(map(le, sizes, (self.plan.samples, *self._widths))):
                return
            assert self._units is not None
            self.plan = plan_jobs(jobs, self.loss_fn, budget, loss_arguments, self._units)
            self._widths = widths
        self.offload = parts(self.plan.offload)
        lessons = [self._lessons.get(tower.number) for tower in self.towers]
        chunks = zip(self.towers, map(_smaller, self.plan.chunk_sizes, lessons), strict=True)
        self.towers = tuple(replace(tower, chunk_size=size) for tower, size in chunks)

    def _learns_from(
        self, error: BaseException, jobs: Sequence[Job], loss_arguments: Mapping[str, Any]
    ) -> bool:
        """Halve the chunk that ran out of memory; False where a second try would not be safe."""
        number = blamed_encoder(error)
        modules = modules_of(*(job.tower.modules for job in jobs))
        if number is None or reducers_of(modules) or not _are_scalars(loss_arguments):
            return False
        size, ranges = self.towers[number].chunk_size, jobs[number].ranges
        largest = jobs[number].samples
        if ranges is not None:
            largest = max(stop - start for start, stop in ranges)
        elif isinstance(size, int):
            largest = min(largest, size)
        if largest < 2:
            return False
        if isinstance(size, Tokens):
            assert size.per_chunk != "auto"  # planned by now
            half: int | Tokens = replace(size, per_chunk=max(1, size.per_chunk // 2))
        else:
            half = largest // 2
        towers = list(self.towers)
        for tower in self.towers:
            same = tower.encoder is self.towers[number].encoder
            if tower.number == number or (same and type(tower.chunk_size) is type(half)):
                smaller = _smaller(half, None if tower.number == number else tower.chunk_size)
                self._lessons[tower.number] = smaller
                towers[tower.number] = replace(tower, chunk_size=smaller)
        self.towers = tuple(towers)
        return True


def _for_each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ArgumentError(f"{name} has {len(value)} entries for {count} encoders; give one each.")
    return list(value)


def _width(job: Job) -> float:
    """Elements of a sample in an input that is there whole: tokens and their features."""
    return sum(t.numel() for t in tensors_of(job.value)) / job.samples


def _smaller(size: int | Tokens, other: int | Tokens | None) -> int | Tokens:
    """The smaller of two chunk sizes in the same unit; the first where there is no such other."""
    if isinstance(size, Tokens) and isinstance(other, Tokens):
        assert size.per_chunk != "auto" and other.per_chunk != "auto"
        return replace(size, per_chunk=min(size.per_chunk, other.per_chunk))
    return min(size, other) if isinstance(size, int) and isinstance(other, int) else size


def _read_twice(jobs: Sequence[Job]) -> bool:
    return any(job.ranges is None for job in jobs)


def _counter(report: Report, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(samples: int) -> None:
        nonlocal done
        done += samples
        report(stage, done, total)

    return add


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
    ledger: Ledger, buffers: Buffers, devices: frozenset[torch.device]
) -> Iterator[None]:
    """An error inside leaves generators, buffers and gradients as they were before."""
    before = RandomState.now(devices)
    try:
        yield
    except BaseException as error:
        before.set()
        buffers.restore()
        forget_casts()
        ledger.clear()
        if ledger.had_gradients:
            error.add_note(
                "Gradients that were there before the step may hold a part of its sum: set them to "
                "zero before the next one."
            )
        raise
