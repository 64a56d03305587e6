"""``plan_step``: chunk sizes with which a whole step holds a memory budget, and what it will cost.

The peak of a step is the largest of three stages: a chunk without a graph beside the embeddings so
far; the loss beside all embeddings; a chunk's graph beside the cached gradients and those of the
parameters.  Encoders are probed on parts of a sample batch, the loss on embeddings of its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.step.out_of_memory import blame, blamed_encoder
from cl_compiler.step.probe import ChunkCost, LossCost, probe_chunk, probe_loss
from cl_compiler.step.towers import Call, Encoder, Job, Tower, call_by_structure
from cl_compiler.units import format_bytes, format_seconds

__all__ = ["EncoderPlan", "StepPlan", "plan_jobs", "plan_step"]

_PROBES = 8
"""Chunks that are measured per encoder in search of the largest that fits, at most."""
_FULL = 0.92
"""A chunk that takes this share of what it may take is not made larger."""
_TIMED = (1, 2, 4, 8)
"""Fractions of the largest chunk whose speed is compared."""


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder of a planned step.

    what: its name; samples: of the batch; chunk: what one chunk costs; parameter_gradient_bytes: of
    what it trains, counted with the first encoder that trains it; trains: whether it has a second
    pass; largest: a chunk that would fit as well, if a slower one; least: what two samples cost.
    """

    what: str
    samples: int
    chunk: ChunkCost
    parameter_gradient_bytes: int
    trains: bool
    largest: int
    least: ChunkCost

    @property
    def embedding_bytes(self) -> int:
        """Of all its embeddings."""
        return self.chunk.shape.bytes_per_sample * self.samples

    @property
    def later_bytes(self) -> int:
        """Peak of the chunks after the first, gradients in place; 0 if there are none.

        Where there is one only, it is smaller; a peak is convex in the size, so that a straight
        line from the smallest chunk's lies above it.
        """
        chunk, least = self.chunk, self.least
        rest = min(chunk.samples, self.samples - chunk.samples)
        if rest <= 0 or chunk.samples <= least.samples:
            return chunk.training_bytes if rest > 0 else 0
        share = max(0, rest - least.samples) / (chunk.samples - least.samples)
        return math.ceil(
            least.training_bytes + share * (chunk.training_bytes - least.training_bytes)
        )

    def of(self, factor: float) -> EncoderPlan:
        """The same encoder and chunk for a batch that is so many times as large."""
        return replace(self, samples=math.ceil(self.samples * factor))


@dataclass(frozen=True)
class StepPlan:
    """A step of ``samples``, and what it takes beyond model, batch and optimiser state.

    loss: of the whole batch's embeddings.
    """

    samples: int
    budget_bytes: int
    encoders: tuple[EncoderPlan, ...]
    loss: LossCost

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Samples per chunk, one for each encoder."""
        return tuple(encoder.chunk.samples for encoder in self.encoders)

    @property
    def stages(self) -> dict[str, int]:
        """Peak bytes of each stage of each encoder, and of the loss."""
        return _stages(self.encoders, self.loss.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Predicted for a step whose parameters have no gradients yet (``zero_grad()``)."""
        return max(self.stages.values())

    @property
    def seconds(self) -> float:
        """Predicted for one step, from the probes."""
        encoding = sum(e.chunk.seconds_per_sample * e.samples for e in self.encoders)
        return encoding + self.loss.seconds

    @property
    def max_batch(self) -> int:
        """The largest batch whose step would hold the budget with these chunks.

        The loss's share is taken to grow with the batch as the embeddings do, which a compiled loss
        within its own budget does and a dense one does not.
        """

        def fits(samples: int) -> bool:
            factor = samples / self.samples
            encoders = [encoder.of(factor) for encoder in self.encoders]
            stages = _stages(encoders, math.ceil(self.loss.peak_bytes * factor))
            return max(stages.values()) <= self.budget_bytes

        low, high = self.samples, 2 * self.samples
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def explain(self) -> str:
        """The plan as text: chunks, where the bytes go, seconds."""
        lines = [
            f"step of {self.samples:,} samples within {format_bytes(self.budget_bytes)}: "
            f"peak {format_bytes(self.peak_bytes)}, about {format_seconds(self.seconds)}"
        ]
        for encoder in self.encoders:
            chunk, count = encoder.chunk, -(-encoder.samples // encoder.chunk.samples)
            passes = "two passes" if encoder.trains else "one pass: it does not train"
            lines.append(
                f"  {encoder.what}: {count} chunks of {chunk.samples} (the fastest; "
                f"{encoder.largest} would fit), {passes}; "
                f"{format_seconds(chunk.forward_s)} forward, {format_seconds(chunk.training_s)} "
                "with its backward, each"
            )
        lines.append("  peaks:")
        largest = self.peak_bytes
        for stage, size in self.stages.items():
            mark = "  <- the step's" if size == largest else ""
            lines.append(f"    {format_bytes(size):>10}  {stage}{mark}")
        lines.append(f"  largest batch with these chunks: about {self.max_batch:,}")
        return "\n".join(lines)


def plan_step(
    encoders: Sequence[Encoder],
    sample_batch: Sequence[Any],
    loss_fn: Callable[..., Any],
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget,
    *,
    samples: int | None = None,
    loss_arguments: Mapping[str, Any] | None = None,
    embedding: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
    call: Call | Sequence[Call] = call_by_structure,
) -> StepPlan:
    """Choose chunk sizes for ``GradientCache(encoders, loss_fn, chunk_sizes=plan.chunk_sizes)``.

    Encoders run on parts of the batch a few times, the loss once or twice; random generators,
    buffers and gradients are as before afterwards.

    Args:
        encoders: as in ``GradientCache``.
        sample_batch: one input per encoder.
        loss_fn: as in ``GradientCache``.
        memory_budget: of what the step allocates on one device: embeddings, graphs, the loss, and
            the parameters' gradients; model, batch and optimiser state are there already.
        samples: of the batches to come; by default as many as the sample batch has.
        loss_arguments: the loss's keywords; parameters of a compiled loss may be left out.
        embedding: as in ``GradientCache``.
        call: as in ``GradientCache``.

    Raises:
        ArgumentError: inputs that do not fit together.
        BudgetError: no chunk is small enough; the message says what would be.
    """
    if len(sample_batch) != len(encoders) or not encoders:
        raise ArgumentError(
            f"sample_batch has {len(sample_batch)} inputs for {len(encoders)} encoders: give a "
            "tuple with one per encoder."
        )
    calls: list[Any] = _for_each(call, len(encoders))
    picks: list[Any] = _for_each(embedding, len(encoders))
    with torch.enable_grad():
        jobs = [
            Tower(number, encoder, 1, calls[number], picks[number]).job(sample_batch[number])
            for number, encoder in enumerate(encoders)
        ]
        budget = MemoryBudget.parse(memory_budget)
        return plan_jobs(jobs, loss_fn, budget.device_bytes, loss_arguments or {}, samples)


def _for_each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def plan_jobs(
    jobs: Sequence[Job],
    loss_fn: Callable[..., Any],
    budget_bytes: int,
    loss_arguments: Mapping[str, Any],
    samples: int | None = None,
) -> StepPlan:
    """The same for encoders that have their inputs; errors as ``plan_step``."""
    counts = [job.samples for job in jobs]
    samples = max(counts) if samples is None else samples
    gradients = _parameter_gradient_bytes(jobs)
    # Inputs of unequal length (rows and columns of a loss) keep their proportion.
    totals = [-(-samples * count // max(counts)) for count in counts]
    smallest = []
    for job, total, bytes_ in zip(jobs, totals, gradients, strict=True):
        least = probe_chunk(job, _least(job))
        plan = EncoderPlan(job.tower.what, total, least, bytes_, job.trains, least.samples, least)
        smallest.append(plan)
    _check_floor(smallest, samples, budget_bytes)
    embeddings = sum(plan.embedding_bytes for plan in smallest)
    shapes = [(plan.chunk.shape, plan.samples, plan.trains) for plan in smallest]
    loss = probe_loss(loss_fn, shapes, loss_arguments, budget_bytes - embeddings)
    if embeddings + loss.peak_bytes > budget_bytes:
        raise BudgetError(
            f"a step of {samples:,} samples within {format_bytes(budget_bytes)}: the loss takes "
            f"{format_bytes(loss.peak_bytes)} beside {format_bytes(embeddings)} of embeddings, "
            "whatever the chunks. Give the loss a smaller budget of its own (compile_loss), or the "
            f"step {format_bytes(embeddings + loss.peak_bytes)}."
        )
    chosen = list(smallest)
    for number, job in enumerate(jobs):
        chosen[number] = _largest_that_fits(chosen, number, job, budget_bytes)
    return StepPlan(samples, budget_bytes, tuple(chosen), loss)


def _least(job: Job) -> int:
    """Samples of the smallest chunk: BatchNorm needs two."""
    return min(2, job.samples)


def _parameter_gradient_bytes(jobs: Sequence[Job]) -> list[int]:
    """Of each encoder's trained parameters, those of earlier encoders left out."""
    seen: set[int] = set()
    found = []
    for job in jobs:
        parameters = {id(p): p for m in job.tower.modules for p in m.parameters()}
        new = [p for key, p in parameters.items() if key not in seen and p.requires_grad]
        seen |= set(parameters)
        found.append(sum(p.numel() * p.element_size() for p in new) if job.trains else 0)
    return found


def _stages(encoders: Sequence[EncoderPlan], loss_bytes: int) -> dict[str, int]:
    """Peak bytes by stage, in the order in which they run."""
    stages: dict[str, int] = {}
    embeddings = 0
    for encoder in encoders:
        # A single chunk's embeddings are not copied: they are part of its own peak.
        beside = 0 if encoder.chunk.samples >= encoder.samples else encoder.embedding_bytes
        stages[f"{encoder.what}, without a graph"] = (
            embeddings + beside + encoder.chunk.forward_bytes
        )
        embeddings += encoder.embedding_bytes
    stages["loss and its gradients"] = embeddings + loss_bytes
    cached = sum(encoder.embedding_bytes for encoder in encoders if encoder.trains)
    parameters = 0
    for encoder in encoders:
        if encoder.trains:
            new = encoder.parameter_gradient_bytes
            first = encoder.chunk.first_bytes if new else encoder.chunk.training_bytes
            later = encoder.later_bytes
            peaks = (first, new + later if later else 0)
            stages[f"{encoder.what}, with a graph"] = cached + parameters + max(peaks)
            parameters += new
    return stages


def _check_floor(encoders: Sequence[EncoderPlan], samples: int, budget_bytes: int) -> None:
    """Whether the smallest chunks fit at all."""
    least = max(_stages(encoders, 0).values())
    if least <= budget_bytes:
        return
    embeddings = sum(encoder.embedding_bytes for encoder in encoders)
    raise BudgetError(
        f"a step of {samples:,} samples within {format_bytes(budget_bytes)}: with chunks of two "
        f"samples it takes {format_bytes(least)}, {format_bytes(embeddings)} of it embeddings. "
        f"Give it {format_bytes(least)} or more, or a smaller batch."
    )


def _largest_that_fits(
    encoders: Sequence[EncoderPlan], number: int, job: Job, budget_bytes: int
) -> EncoderPlan:
    """The fastest chunk among the largest that fits and fractions of it."""
    what = encoders[number].what

    def share(cost: ChunkCost) -> float:
        """Of the budget, in the stages of this encoder; at most 1 fits."""
        with_it = list(encoders)
        with_it[number] = replace(encoders[number], chunk=cost)
        stages = _stages(with_it, 0)
        return max(size for name, size in stages.items() if name.startswith(what)) / budget_bytes

    known = _search(encoders[number].chunk, job, share, budget_bytes)
    largest = max(size for size, cost in known.items() if share(cost) <= 1)
    total = encoders[number].samples
    sizes = {_without_a_single(max(_least(job), largest // part), total) for part in _TIMED}
    timed = [probe_chunk(job, size, repeats=2, limit_bytes=budget_bytes) for size in sorted(sizes)]
    fits = [cost for cost in timed if share(cost) <= 1] or [known[largest]]
    best = min(fits, key=lambda cost: cost.seconds_per_sample)
    return replace(encoders[number], chunk=best, largest=max(cost.samples for cost in fits))


def _without_a_single(size: int, total: int) -> int:
    """A chunk size at most so large that leaves no last chunk of one sample: BatchNorm fails."""
    while size > 2 and total % size == 1:
        size -= 1
    return size


def _search(
    smallest: ChunkCost, job: Job, share: Callable[[ChunkCost], float], budget_bytes: int
) -> dict[int, ChunkCost]:
    """Measured chunks, in search of the largest that fits; none is known to exceed the budget.

    A peak is the largest of several that grow linearly from something that is not negative: n times
    the samples take at most n times the bytes, and chunks for which that fits may be measured.
    """
    known = {smallest.samples: smallest}
    low, high = smallest.samples, job.samples + 1
    for _ in range(_PROBES):
        size = _furthest(known[low], low, high - 1, share)
        if size <= low:  # nothing larger is sure to fit
            break
        try:
            with blame(job.tower.number):
                cost = probe_chunk(job, size, limit_bytes=budget_bytes)
        except (RuntimeError, MemoryError) as error:
            if blamed_encoder(error) is None:
                raise
            high = size
            continue
        known[size] = cost
        if share(cost) > 1:
            high = size
        else:
            low = size
        if low == job.samples or share(known[low]) > _FULL:
            break
    return known


def _furthest(cost: ChunkCost, low: int, high: int, share: Callable[[ChunkCost], float]) -> int:
    """The largest size up to ``high`` that fits if bytes grow no faster than samples."""

    def fits(size: int) -> bool:
        factor = size / cost.samples
        larger = replace(
            cost,
            samples=size,
            forward_bytes=math.ceil(factor * cost.forward_bytes),
            training_bytes=math.ceil(factor * cost.training_bytes),
            first_bytes=math.ceil(factor * cost.first_bytes),
        )
        return share(larger) <= 1

    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
