"""A planned step as a value: chunks, what waits on the host, peaks, seconds, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cl_compiler.step.inputs import Tokens
from cl_compiler.step.loss_share import least_of
from cl_compiler.step.probe import ChunkCost, LossCost
from cl_compiler.units import counted, format_bytes, format_seconds

__all__ = ["EncoderPlan", "StepPlan", "stages_of"]


@dataclass(frozen=True)
class EncoderPlan:
    """One encoder of a planned step.

    what: its name; samples: of the batch; chunk: what one chunk costs; parameter_gradient_bytes: of
    what it trains, counted with the first encoder that trains it; trains: whether it has a second
    pass; largest: a chunk size that would fit as well, if a slower one; least: what the smallest
    costs; work: samples, or tokens, of the whole input; tokens: what chunks are counted in;
    input_bytes: of the whole input, where it has to be copied to the device; is_stream: whether it
    cannot be there whole.
    """

    what: str
    samples: int
    chunk: ChunkCost
    parameter_gradient_bytes: int
    trains: bool
    largest: int
    least: ChunkCost
    work: int
    tokens: Tokens | None = None
    input_bytes: int = 0
    is_stream: bool = False

    @property
    def chunk_size(self) -> int | Tokens:
        """As ``GradientCache`` takes it."""
        size = self.chunk.size
        return size if self.tokens is None else replace(self.tokens, per_chunk=size)

    @property
    def embedding_bytes(self) -> int:
        """Of all its embeddings."""
        return self.chunk.shape.bytes_per_sample * self.samples

    @property
    def chunk_embedding_bytes(self) -> int:
        return self.chunk.shape.bytes_per_sample * self.chunk.samples

    @property
    def chunk_input_bytes(self) -> int:
        """Of the chunk that is encoded and the one that is on its way."""
        return math.ceil(2 * self.input_bytes * min(1.0, self.chunk.samples / self.samples))

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return (self.chunk.forward_s + self.chunk.training_s) * self.work / self.chunk.work

    @property
    def chunks(self) -> int:
        """How many there are; with tokens about so many."""
        return max(1, math.ceil(self.work / self.chunk.work))

    @property
    def later_bytes(self) -> int:
        """Peak of the chunks after the first, gradients in place; 0 if there are none.

        Where there is one only, it is smaller; a peak is convex in the size, so that a straight
        line from the smallest chunk's lies above it.
        """
        chunk, least = self.chunk, self.least
        rest = min(chunk.samples, self.samples - chunk.samples)
        if rest <= 0:
            return 0
        if self.tokens is not None or chunk.samples <= least.samples:
            return chunk.training_bytes
        share = max(0, rest - least.samples) / (chunk.samples - least.samples)
        return math.ceil(
            least.training_bytes + share * (chunk.training_bytes - least.training_bytes)
        )

    def of(self, factor: float) -> EncoderPlan:
        """The same encoder and chunk for a batch that is so many times as large."""
        return replace(
            self,
            samples=math.ceil(self.samples * factor),
            work=math.ceil(self.work * factor),
            input_bytes=math.ceil(self.input_bytes * factor),
        )


def stages_of(
    encoders: Sequence[EncoderPlan], loss_bytes: int, waiting: frozenset[str]
) -> dict[str, int]:
    """Peak bytes by stage on the device, in the order in which they run.

    Args:
        encoders: of the step.
        loss_bytes: of the loss and its gradients.
        waiting: what waits on the host.
    """

    def resident(encoder: EncoderPlan) -> int:
        there = encoder.input_bytes and not ("inputs" in waiting or encoder.is_stream)
        return encoder.input_bytes if there else 0

    def moving(encoder: EncoderPlan) -> int:
        return 0 if resident(encoder) else encoder.chunk_input_bytes

    inputs = sum(map(resident, encoders))
    stages: dict[str, int] = {}
    embeddings, in_host = 0, "embeddings" in waiting
    for encoder in encoders:
        # A single chunk's embeddings are not copied: they are part of its own peak.
        alone = encoder.chunk.samples >= encoder.samples
        beside = 0 if alone else encoder.embedding_bytes
        if in_host:  # those of the chunk before may still be on their way
            beside = encoder.chunk_embedding_bytes
        before = 0 if in_host else embeddings
        stages[f"{encoder.what}, without a graph"] = (
            inputs + moving(encoder) + before + beside + encoder.chunk.forward_bytes
        )
        embeddings += encoder.embedding_bytes
    stages["loss and its gradients"] = inputs + embeddings + loss_bytes
    cached = sum(encoder.embedding_bytes for encoder in encoders if encoder.trains)
    parameters = 0
    for encoder in encoders:
        if encoder.trains:
            new = encoder.parameter_gradient_bytes
            first = encoder.chunk.first_bytes if new else encoder.chunk.training_bytes
            later = encoder.later_bytes
            peaks = (first, new + later if later else 0)
            held = encoder.chunk_embedding_bytes if "gradients" in waiting else cached
            stages[f"{encoder.what}, with a graph"] = (
                inputs + moving(encoder) + held + parameters + max(peaks)
            )
            parameters += new
    return stages


@dataclass(frozen=True)
class StepPlan:
    """A step of ``samples``, and what it takes beyond model, batch and optimiser state.

    loss: of the whole batch's embeddings; loss_fn: the loss to call, within what is left for it;
    offload: what waits on the host; link_bytes_per_s: measured; None where host and device are one.
    """

    samples: int
    budget_bytes: int
    encoders: tuple[EncoderPlan, ...]
    loss: LossCost
    loss_fn: Callable[..., Any]
    offload: tuple[str, ...] = ()
    link_bytes_per_s: float | None = None

    @property
    def chunk_sizes(self) -> tuple[int | Tokens, ...]:
        """Samples, or tokens, per chunk, one for each encoder."""
        return tuple(encoder.chunk_size for encoder in self.encoders)

    @property
    def stages(self) -> dict[str, int]:
        """Peak bytes of each stage of each encoder, and of the loss."""
        return stages_of(self.encoders, self.loss.peak_bytes, frozenset(self.offload))

    @property
    def peak_bytes(self) -> int:
        """Predicted for a step whose parameters have no gradients yet (``zero_grad()``)."""
        return max(self.stages.values())

    @property
    def host_bytes(self) -> int:
        """Of host memory that the step takes: embeddings and gradients that wait there."""
        kinds = {"embeddings": self.encoders, "gradients": [e for e in self.encoders if e.trains]}
        return sum(e.embedding_bytes for kind in self.offload for e in kinds.get(kind, ()))

    @property
    def copy_seconds(self) -> float:
        """What copies between host and device add: those that no encoder hides."""
        rate = self.link_bytes_per_s
        if rate is None:
            return 0.0
        whole = sum(encoder.embedding_bytes for encoder in self.encoders)
        trained = sum(encoder.embedding_bytes for encoder in self.encoders if encoder.trains)
        seconds = 0.0
        for encoder in self.encoders:
            passes = 1 + encoder.trains
            if "inputs" in self.offload or encoder.is_stream:
                moved = passes * encoder.input_bytes
            else:
                seconds += encoder.input_bytes / rate
                moved = 0
            moved += encoder.embedding_bytes * ("embeddings" in self.offload)
            moved += encoder.embedding_bytes * ("gradients" in self.offload and encoder.trains)
            seconds += max(0.0, moved / rate - encoder.seconds)
        seconds += whole / rate * ("embeddings" in self.offload)  # to the loss
        return seconds + trained / rate * ("gradients" in self.offload)  # and from it

    @property
    def seconds(self) -> float:
        """Predicted for one step, from the probes."""
        encoding = sum(encoder.seconds for encoder in self.encoders)
        return encoding + self.loss.seconds + self.copy_seconds

    @cached_property
    def max_batch(self) -> int:
        """The largest batch whose step would hold the budget with these chunks.

        A compiled loss keeps the tiles that it has, while gradients and statistics grow; another
        one is taken to grow with the square of the batch, as a dense one does.
        """
        least_bytes = least_of(self.loss_fn)
        tiles = 0 if least_bytes is None else max(0, self.loss.peak_bytes - least_bytes(1.0))

        def fits(samples: int) -> bool:
            factor = samples / self.samples
            loss_bytes = math.ceil(self.loss.peak_bytes * factor**2)
            if least_bytes is not None:
                loss_bytes = tiles + least_bytes(factor)
            encoders = [encoder.of(factor) for encoder in self.encoders]
            stages = stages_of(encoders, loss_bytes, frozenset(self.offload))
            return max(stages.values()) <= self.budget_bytes

        low, high = self.samples, 2 * self.samples
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def explain(self) -> str:
        """The plan as text: chunks, what waits on the host, where the bytes go, seconds."""
        lines = [
            f"step of {self.samples:,} samples within {format_bytes(self.budget_bytes)}: "
            f"peak {format_bytes(self.peak_bytes)}, about {format_seconds(self.seconds)}"
        ]
        for encoder in self.encoders:
            passes = "two passes" if encoder.trains else "one pass: it does not train"
            unit = "" if encoder.tokens is None else " tokens"
            about = "" if encoder.tokens is None else "about "
            lines.append(
                f"  {encoder.what}: {about}{counted(encoder.chunks, 'chunk')} of "
                f"{encoder.chunk.size}{unit} (the fastest of those up to {encoder.largest}), "
                f"{passes}; "
                f"{format_seconds(encoder.chunk.forward_s)} forward, "
                f"{format_seconds(encoder.chunk.training_s)} with its backward, each"
            )
        lines.append(f"  loss: {format_seconds(self.loss.seconds)}{self._loss_text()}")
        lines.append(f"  {self._offload_text()}")
        lines.append("  peaks:")
        largest = self.peak_bytes
        for stage, size in self.stages.items():
            mark = "  <- the step's" if size == largest else ""
            lines.append(f"    {format_bytes(size):>10}  {stage}{mark}")
        lines.append(f"  largest batch with these chunks: about {self.max_batch:,}")
        return "\n".join(lines)

    def _loss_text(self) -> str:
        if self.loss.limit_bytes is None:
            return ""
        return f" within {format_bytes(self.loss.limit_bytes)}, which is what is left for it"

    def _offload_text(self) -> str:
        if self.link_bytes_per_s is None:
            return "host and device are one memory: nothing is copied"
        rate = f"{format_bytes(int(self.link_bytes_per_s))}/s"
        if not self.offload:
            return f"nothing waits on the host: all of it fits (copies run at {rate})"
        return (
            f"waiting on the host: {', '.join(self.offload)} ({format_bytes(self.host_bytes)} "
            f"there; copies run at {rate} and add {format_seconds(self.copy_seconds)})"
        )
