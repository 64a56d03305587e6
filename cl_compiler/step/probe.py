"""Measure an encoder on a part of its input, and a loss on made-up embeddings; leave no trace.

Bytes are those of live tensors beyond what exists already (``LiveBytes``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cl_compiler.errors import CompilerError
from cl_compiler.runtime.live_bytes import LiveBytes
from cl_compiler.runtime.signatures import LossSignature
from cl_compiler.step.autocast import forget_casts
from cl_compiler.step.inputs import cut, tensors_of
from cl_compiler.step.ledger import Ledger
from cl_compiler.step.modules import (
    Buffers,
    parts_of,
    reducers_of,
    without_reduction,
)
from cl_compiler.step.offload import Link, fetched
from cl_compiler.step.randomness import RandomState
from cl_compiler.step.towers import Job

__all__ = ["ChunkCost", "EmbeddingShape", "LossCost", "link_rate", "probe_chunk", "probe_loss"]


@dataclass(frozen=True)
class EmbeddingShape:
    """What an encoder makes of one sample: [rows, *rest] of a dtype."""

    rows: int
    rest: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_sample(self) -> int:
        return self.rows * torch.Size(self.rest).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class ChunkCost:
    """Of one chunk: peaks beyond what exists, and seconds.

    size: as a chunk size, in samples or tokens; work: what was measured, in the same units;
    samples: of the chunk, with tokens of the one that has most.
    forward: without a graph; training: forward and backward, 0 for what does not train, with the
    parameters' gradients in place; first: the same with none there, so that they are in the peak.
    """

    size: int
    work: int
    samples: int
    forward_bytes: int
    training_bytes: int
    first_bytes: int
    forward_s: float
    training_s: float
    shape: EmbeddingShape


@dataclass(frozen=True)
class LossCost:
    """Of one loss of a whole batch: its peak with the returned gradients, and seconds.

    seconds is NaN where only the bytes were found out; limit_bytes: what a compiled loss may take.
    """

    peak_bytes: int
    seconds: float
    limit_bytes: int | None = None


def probe_chunk(
    job: Job, start: int, stop: int, *, repeats: int = 1, limit_bytes: float = math.inf
) -> ChunkCost:
    """Encode some samples of a job's input, without and with a graph.

    Args:
        job: an encoder and its input.
        start: the first of them.
        stop: the one after the last.
        repeats: the fastest of so many is the time.
        limit_bytes: where the parameters' gradients do not fit beside the chunk's graph, they are
            not put there: training_bytes is then first_bytes, which is no less.
    """
    samples = stop - start
    chunk = fetched(cut(job.value, start, stop), job.link)()
    with _undisturbed(job) as ledger:
        with LiveBytes() as live, torch.no_grad():
            part = job.tower.encode(chunk)
        forward_bytes = live.peak_bytes
        rows, *rest = part.shape
        shape = EmbeddingShape(rows // samples, tuple(rest), part.dtype, part.device)
        gradient = torch.zeros_like(part)
        del part
        with torch.no_grad():
            forward_s = _fastest(lambda: job.tower.encode(chunk), repeats, job)
        first_bytes, training_bytes, training_s = 0, 0, 0.0
        if job.trains:

            def train() -> None:
                part = job.tower.encode(chunk)
                if part.requires_grad:
                    ledger.meet([part])
                    torch.autograd.backward(part, gradient)

            def train_first() -> None:
                for parameter in ledger.tensors:
                    parameter.grad = None
                train()

            with torch.enable_grad():
                with LiveBytes() as live:
                    train()
                first_bytes = training_bytes = live.peak_bytes
                gradients = sum(p.numel() * p.element_size() for p in ledger.tensors)
                fits = gradients + first_bytes <= limit_bytes
                if fits:
                    with LiveBytes() as live:
                        train()
                    training_bytes = live.peak_bytes
                training_s = _fastest(train if fits else train_first, repeats, job)
    return ChunkCost(
        size=samples,
        work=samples,
        samples=samples,
        forward_bytes=forward_bytes,
        training_bytes=training_bytes,
        first_bytes=first_bytes,
        forward_s=forward_s,
        training_s=training_s,
        shape=shape,
    )


def probe_loss(
    loss_fn: Callable[..., Any],
    shapes: Sequence[tuple[EmbeddingShape, int, bool]],
    arguments: Mapping[str, Any],
    limit_bytes: int,
) -> LossCost:
    """Evaluate a loss and its backward on random embeddings of a whole batch.

    A loss of plain PyTorch is tried without memory first (on the meta device); where that says that
    it needs more than ``limit_bytes``, it is not run.

    Args:
        loss_fn: of one tensor per encoder and the arguments.
        shapes: of each encoder's embeddings, how many samples, whether they need a gradient.
        arguments: the loss's keywords; parameters of a compiled loss that are missing count as 1.
        limit_bytes: what the loss may take.
    """
    given = {**_missing(loss_fn, arguments), **arguments}
    devices = sorted({shape.device for shape, _, _ in shapes}, key=str)
    before = RandomState.now(devices)
    ledger = Ledger(aside=True)
    ledger.know(_trained(given.values()))
    try:
        dry = _dry_bytes(loss_fn, shapes, given, ledger)
        if dry is not None and dry > limit_bytes:
            return LossCost(dry, float("nan"))
        embeddings = [_random(*wanted) for wanted in shapes]
        run = _loss_run(loss_fn, embeddings, given, ledger)
        with LiveBytes() as live:  # what is compiled or kept for good is made here
            run()
        for embedding in embeddings:
            embedding.grad = None
        started = time.perf_counter()
        run()
        return LossCost(live.peak_bytes, time.perf_counter() - started)
    finally:
        before.set()
        ledger.restore()


def _missing(loss_fn: Any, arguments: Mapping[str, Any]) -> dict[str, float]:
    signature = getattr(loss_fn, "signature", None)
    if not isinstance(signature, LossSignature):
        return {}
    return {name: 1.0 for name in signature.parameters if name not in arguments}


def _trained(values: Iterable[Any]) -> list[Tensor]:
    found = [t for value in values for t in tensors_of(value)]
    return [t for t in found if t.requires_grad and t.is_leaf]


def _random(shape: EmbeddingShape, samples: int, trains: bool) -> Tensor:
    size = (samples * shape.rows, *shape.rest)
    raw = torch.randn(size, dtype=torch.float32, device=shape.device)
    unit = torch.nn.functional.normalize(raw, dim=-1).to(shape.dtype)
    return unit.requires_grad_(trains)


def _loss_run(
    loss_fn: Callable[..., Any],
    embeddings: Sequence[Tensor],
    given: Mapping[str, Any],
    ledger: Ledger,
) -> Callable[[], None]:
    """The loss and its backward; keywords are cut off from their own graphs."""

    def detached(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        return value.detach().requires_grad_()

    def run() -> None:
        keywords = {name: tree_map(detached, value) for name, value in given.items()}
        found = loss_fn(*embeddings, **keywords)
        value = found["loss"] if isinstance(found, Mapping) else found
        value = value[0] if isinstance(value, tuple) else value
        if value.requires_grad:
            ledger.meet([value], but=embeddings)
            torch.autograd.backward(value)

    return run


def _dry_bytes(
    loss_fn: Callable[..., Any],
    shapes: Sequence[tuple[EmbeddingShape, int, bool]],
    given: Mapping[str, Any],
    ledger: Ledger,
) -> int | None:
    """The peak on the meta device; None for a loss that does not run there."""

    def onto_meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to("meta").requires_grad_(value.requires_grad)

    embeddings = []
    for shape, samples, trains in shapes:
        size = (samples * shape.rows, *shape.rest)
        embedding = torch.empty(size, dtype=shape.dtype, device="meta")
        embeddings.append(embedding.requires_grad_(trains))
    keywords = {name: tree_map(onto_meta, value) for name, value in given.items()}
    try:
        with LiveBytes() as live:
            _loss_run(loss_fn, embeddings, keywords, ledger)()
    except (CompilerError, RuntimeError, NotImplementedError, TypeError, ValueError):
        return None
    return int(live.peak_bytes)


def link_rate(link: Link, job: Job, budget_bytes: int) -> float:
    """Bytes per second from the host to the device, the better of two copies."""
    elements = max(1, min(1 << 22, budget_bytes // 16))
    host = link.room(torch.empty(0), elements)
    host.put(0, torch.zeros(elements, device=next(iter(job.devices), None)))

    def copy() -> None:
        host.begin(0, elements).get()

    return 4 * elements / max(_fastest(copy, 2, job), 1e-9)


def _fastest(run: Callable[[], Any], repeats: int, job: Job) -> float:
    clock = time.perf_counter
    if torch.get_num_threads() == 1 and all(d.type == "cpu" for d in job.devices):
        clock = time.process_time  # what other processes take is not in it
    seconds = []
    for _ in range(repeats):
        _synchronise(job.devices)
        started = clock()
        run()
        _synchronise(job.devices)
        seconds.append(clock() - started)
    return min(seconds)


def _synchronise(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


@contextmanager
def _undisturbed(job: Job) -> Iterator[Ledger]:
    """What trains, without gradients; afterwards all is as before, buffers and draws too."""
    modules = job.tower.modules
    ledger = Ledger(aside=True)
    parameters = (p for part in parts_of(modules) for p in part.parameters(recurse=False))
    ledger.know([*_trained([job.value]), *(p for p in parameters if p.requires_grad)])
    before = RandomState.now(job.devices)
    buffers = Buffers(modules)
    forget_casts()
    try:
        with without_reduction(reducers_of(modules)):
            yield ledger
    finally:
        forget_casts()
        ledger.restore()
        buffers.restore()
        before.set()
