"""``plan_step``: chunk sizes with which a whole step holds a memory budget, and what it will cost.

The peak of a step is the largest of three stages: a chunk without a graph beside the embeddings so
far; the loss beside all embeddings; a chunk's graph beside the cached gradients and those of the
parameters.  Encoders are probed on parts of a sample batch, the loss on embeddings of its size; it
gets what the embeddings leave of the budget.  Where a host has memory beside the device, what the
stages do not need may wait there, for the time that copies take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError, BudgetError
from cl_compiler.lang.ir import LossIR
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.step.chunks import Sizes, fastest_that_fits, units_of
from cl_compiler.step.inputs import Tokens, tensors_of
from cl_compiler.step.loss_share import within
from cl_compiler.step.offload import PARTS, link_to
from cl_compiler.step.plans import EncoderPlan, StepPlan, stages_of
from cl_compiler.step.probe import ChunkCost, LossCost, link_rate, probe_loss
from cl_compiler.step.towers import Call, Encoder, Job, Tower, call_by_structure
from cl_compiler.units import counted, format_bytes

__all__ = ["EncoderPlan", "StepPlan", "plan_jobs", "plan_step"]

_WORTH = 0.9
"""More is left on the host only if the step then takes less than this share of the time."""


def plan_step(
    encoders: Sequence[Encoder],
    sample_batch: Sequence[Any],
    loss_fn: Callable[..., Any] | str | LossIR,
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget,
    *,
    samples: int | None = None,
    chunk_sizes: Any = "auto",
    loss_arguments: Mapping[str, Any] | None = None,
    embedding: Callable[[Any], Tensor] | Sequence[Callable[[Any], Tensor] | None] | None = None,
    call: Call | Sequence[Call] = call_by_structure,
    device: torch.device | str | None = None,
) -> StepPlan:
    """Choose what ``GradientCache`` is to do: chunk sizes, the loss's tiles, what is offloaded.

        plan = plan_step(encoders, batch, "clip", "8GiB")
        step = GradientCache(encoders, plan.loss_fn, chunk_sizes=plan.chunk_sizes)

    Encoders run on parts of the batch a few times, the loss once or twice; random generators,
    buffers and gradients are as before afterwards.

    Args:
        encoders: as in ``GradientCache``.
        sample_batch: one input per encoder.
        loss_fn: as in ``GradientCache``; or the name or definition of a loss, to be compiled for
            what the embeddings leave of the budget.  A compiled loss whose own budget is larger
            than that is compiled again for it.
        memory_budget: of what the step allocates on one device: embeddings, graphs, the loss, and
            the parameters' gradients; model, batch and optimiser state are there already.  As
            {"device": …, "host": …} also of what waits on the host.
        samples: of the batches to come; by default as many as the sample batch has.
        chunk_sizes: "auto" for samples, ``Tokens("auto")`` for tokens; one or one for each.
        loss_arguments: the loss's keywords; parameters of a compiled loss may be left out.
        embedding: as in ``GradientCache``.
        call: as in ``GradientCache``.
        device: as in ``GradientCache``.

    Raises:
        ArgumentError: inputs that do not fit together.
        BudgetError: no chunk is small enough; the message says what would be.
    """
    count = len(encoders)
    if len(sample_batch) != count or not count:
        raise ArgumentError(
            f"sample_batch has {counted(len(sample_batch), 'input')} for "
            f"{counted(count, 'encoder')}: give a tuple with one per encoder."
        )
    units = units_of(chunk_sizes, count)
    if units is None:
        raise ArgumentError(
            f'chunk_sizes={chunk_sizes!r}: a plan finds them; give "auto" or Tokens("auto", …).'
        )
    calls: list[Any] = _for_each(call, count)
    picks: list[Any] = _for_each(embedding, count)
    link = link_to(device)
    with torch.enable_grad():
        jobs = [
            Tower(number, encoder, 1, calls[number], picks[number]).job(sample_batch[number], link)
            for number, encoder in enumerate(encoders)
        ]
        budget = MemoryBudget.parse(memory_budget)
        return plan_jobs(jobs, loss_fn, budget, loss_arguments or {}, units, samples)


def _for_each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def plan_jobs(
    jobs: Sequence[Job],
    loss_fn: Callable[..., Any] | str | LossIR,
    budget: MemoryBudget,
    loss_arguments: Mapping[str, Any],
    units: Sequence[Tokens | None],
    samples: int | None = None,
) -> StepPlan:
    """The same for encoders that have their inputs; errors as ``plan_step``."""
    counts = [job.samples for job in jobs]
    samples = max(counts) if samples is None else samples
    # Inputs of unequal length (rows and columns of a loss) keep their proportion.
    totals = [-(-samples * count // max(counts)) for count in counts]
    sizes = [Sizes(job.first_part(), tokens) for job, tokens in zip(jobs, units, strict=True)]
    gradients = _parameter_gradient_bytes(jobs)
    smallest = [_smallest(*one) for one in zip(jobs, sizes, totals, gradients, strict=True)]
    link = jobs[0].link
    rate = link_rate(link, jobs[0], budget.device_bytes) if link.separate else None
    plan = _Planner(sizes, smallest, samples, budget, loss_fn, loss_arguments, rate)
    found: list[StepPlan] = []
    refusal: BudgetError | None = None
    for waiting in _choices(smallest, separate=link.separate):
        try:
            found.append(plan(waiting))
        except BudgetError as error:
            refusal = error
            continue
        if all(e.largest >= s.most for e, s in zip(found[-1].encoders, sizes, strict=True)):
            break  # one chunk would fit: more room is of no use
    if not found:
        assert refusal is not None
        raise refusal
    best = found[0]
    for other in found[1:]:
        best = other if other.seconds < _WORTH * best.seconds else best
    return best


def _choices(encoders: Sequence[EncoderPlan], *, separate: bool) -> list[frozenset[str]]:
    """What may wait on the host: nothing, and then one thing more each time."""
    if not separate:
        return [frozenset()]
    on_host = any(e.input_bytes and not e.is_stream for e in encoders)
    kinds = [kind for kind in PARTS if kind != "inputs" or on_host]
    return [frozenset(kinds[:count]) for count in range(len(kinds) + 1)]


def _smallest(job: Job, sizes: Sizes, total: int, gradient_bytes: int) -> EncoderPlan:
    """An encoder with its smallest chunks."""
    least = sizes.measure(sizes.least)
    factor = total / sizes.job.samples
    elsewhere = [t for t in tensors_of(sizes.job.value) if not job.link.holds(t)]
    return EncoderPlan(
        job.tower.what,
        total,
        least,
        gradient_bytes,
        job.trains,
        least.size,
        least,
        work=round(sizes.work(least.size) * factor),
        tokens=sizes.tokens,
        input_bytes=round(factor * sum(t.numel() * t.element_size() for t in elsewhere)),
        is_stream=job.ranges is None,
    )


class _Planner:
    """Plans a step for each choice of what waits on the host; measurements are shared."""

    def __init__(
        self,
        sizes: Sequence[Sizes],
        smallest: Sequence[EncoderPlan],
        samples: int,
        budget: MemoryBudget,
        loss_fn: Callable[..., Any] | str | LossIR,
        loss_arguments: Mapping[str, Any],
        rate: float | None,
    ) -> None:
        self.sizes, self.smallest, self.samples = sizes, smallest, samples
        self.budget, self.loss_fn, self.loss_arguments = budget, loss_fn, loss_arguments
        self.rate = rate
        self._losses: dict[int, tuple[Callable[..., Any], LossCost]] = {}

    def __call__(self, waiting: frozenset[str]) -> StepPlan:
        """The fastest step.

        Raises:
            BudgetError: none fits.
        """
        limit = self.budget.device_bytes
        before_loss = stages_of(self.smallest, 0, waiting)["loss and its gradients"]
        self._check_floor(waiting)
        loss_fn, loss = self._loss(limit - before_loss, before_loss)
        chosen = list(self.smallest)
        for number, sizes in enumerate(self.sizes):
            chosen[number] = self._chunk(chosen, number, sizes, waiting)
        offload = tuple(kind for kind in PARTS if kind in waiting)
        plan = StepPlan(self.samples, limit, tuple(chosen), loss, loss_fn, offload, self.rate)
        host_bytes = self.budget.host_bytes
        if host_bytes is not None and plan.host_bytes > host_bytes:
            raise BudgetError(
                f"{self._what}: {format_bytes(plan.host_bytes)} would wait on the host, and its "
                f"budget is {format_bytes(host_bytes)}. Give one of the two more."
            )
        return plan

    @property
    def _what(self) -> str:
        return f"a step of {self.samples:,} samples within {format_bytes(self.budget.device_bytes)}"

    def _check_floor(self, waiting: frozenset[str]) -> None:
        """Whether the smallest chunks fit at all."""
        least = max(stages_of(self.smallest, 0, waiting).values())
        if least <= self.budget.device_bytes:
            return
        embeddings = sum(encoder.embedding_bytes for encoder in self.smallest)
        raise BudgetError(
            f"{self._what}: with chunks of two samples it takes {format_bytes(least)}, "
            f"{format_bytes(embeddings)} of it embeddings. Give it {format_bytes(least)} or more, "
            "or a smaller batch."
        )

    def _loss(self, left_bytes: int, before: int) -> tuple[Callable[..., Any], LossCost]:
        """The loss for what is left, and what it takes."""
        if left_bytes in self._losses:
            return self._losses[left_bytes]
        shapes = [(e.chunk.shape, e.samples, e.trains) for e in self.smallest]
        try:
            loss_fn, own_limit = within(self.loss_fn, left_bytes)
            cost = probe_loss(loss_fn, shapes, self.loss_arguments, left_bytes)
        except BudgetError as error:
            raise BudgetError(
                f"{self._what}: beside {format_bytes(before)} of embeddings and inputs the loss "
                f"has {format_bytes(max(0, left_bytes))}, whatever the chunks. {error}"
            ) from error
        if cost.peak_bytes > left_bytes:
            raise BudgetError(
                f"{self._what}: the loss takes {format_bytes(cost.peak_bytes)} beside "
                f"{format_bytes(before)} of embeddings and inputs, whatever the chunks. Compile it "
                f"(compile_loss), or give the step {format_bytes(before + cost.peak_bytes)}."
            )
        self._losses[left_bytes] = loss_fn, replace(cost, limit_bytes=own_limit)
        return self._losses[left_bytes]

    def _chunk(
        self, encoders: Sequence[EncoderPlan], number: int, sizes: Sizes, waiting: frozenset[str]
    ) -> EncoderPlan:
        """One encoder with the fastest of its chunks that fit."""
        own, limit = encoders[number], self.budget.device_bytes

        def share(cost: ChunkCost) -> float:
            """Of the budget, in the stages of this encoder; at most 1 fits."""
            with_it = [*encoders[:number], replace(own, chunk=cost), *encoders[number + 1 :]]
            stages = stages_of(with_it, 0, waiting)
            return max(s for name, s in stages.items() if name.startswith(own.what)) / limit

        chunk, largest = fastest_that_fits(sizes, own.samples, share, limit)
        work = round(sizes.work(chunk.size) * own.samples / sizes.job.samples)
        return replace(own, chunk=chunk, largest=largest, work=work)


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
