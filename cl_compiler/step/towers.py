"""One encoder of a step: how it is called, where its input is cut, what it can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError
from cl_compiler.step.inputs import Stream, Tokens, chunk_ranges, cut, devices_of, tensors_of
from cl_compiler.step.modules import (
    devices_of_modules,
    is_compiled,
    modules_of,
    owner_of,
)
from cl_compiler.step.offload import Link, ahead, fetched

__all__ = ["Call", "Chunk", "Encoder", "Job", "Tower", "call_by_structure"]

Encoder = Callable[..., Any]
Call = Callable[[Encoder, Any], Any]


def call_by_structure(encoder: Encoder, chunk: Any) -> Any:
    """Call an encoder: a mapping gives keywords, a plain tuple positions, all else one argument."""
    if isinstance(chunk, Mapping):
        return encoder(**chunk)
    if type(chunk) is tuple:
        return encoder(*chunk)
    return encoder(chunk)


@dataclass(frozen=True)
class Tower:
    """An encoder and how a step runs it.

    number: its place among the step's encoders; chunk_size: samples, or ``Tokens``;
    call: (encoder, chunk) -> output; embedding: output -> tensor [rows, …], a fixed number of rows
    per sample.
    """

    number: int
    encoder: Encoder
    chunk_size: int | Tokens
    call: Call
    embedding: Callable[[Any], Tensor] | None

    @property
    def what(self) -> str:
        """The encoder's name in errors."""
        name = getattr(self.encoder, "__name__", type(self.encoder).__name__)
        return f"encoder {self.number} ({name})"

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules behind the encoder, as far as they can be found."""
        return modules_of(self.encoder, self.call)

    def needs_graph(self) -> bool:
        """Whether the first pass must run as the second does, with a graph.

        A compiled encoder has one graph for training and another for inference, and they need not
        draw the same random numbers.
        """
        return is_compiled(self.encoder, self.modules)

    def job(self, value: Any, link: Link) -> Job:
        """The encoder's part of one step, whose input comes over ``link``.

        Raises:
            ArgumentError: the input has no samples, or cannot be cut.
        """
        what = f"the input of {self.what}"
        tensors = tensors_of(value)
        if torch.is_grad_enabled() and any(t.requires_grad and not t.is_leaf for t in tensors):
            raise ArgumentError(
                f"{what} was computed by something that trains: its graph would be needed once per "
                "chunk, but lives for one backward. Make that computation part of the encoder, or "
                "pass input.detach()."
            )
        owner = owner_of(self.encoder)
        trains = owner is None or any(p.requires_grad for p in owner.parameters())
        trains = trains or any(t.requires_grad for t in tensors)
        ranges = None if isinstance(value, Stream) else chunk_ranges(value, self.chunk_size, what)
        return Job(self, value, ranges, trains and torch.is_grad_enabled(), link)

    def encode(self, chunk: Any) -> Tensor:
        """The embeddings of one chunk, with a graph where gradients are enabled.

        Raises:
            ArgumentError: what comes out is not a tensor of rows.
        """
        output = self.call(self.encoder, chunk)
        if self.embedding is not None:
            output = self.embedding(output)
        if isinstance(output, Tensor) and output.dim() > 0:
            return output
        parts = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        got = f"shape {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ArgumentError(
            f"{self.what} returned {got}{parts}; a step needs a tensor with one row per sample. "
            "Pass embedding=, a function from the encoder's output to that tensor, e.g. "
            "embedding=lambda output: output.pooler_output."
        )


@dataclass(frozen=True)
class Chunk:
    """Samples start … stop - 1 of an input; ``fetch`` waits until they are on the device."""

    start: int
    stop: int
    fetch: Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """One encoder in one step.

    ranges: (start, stop) of its chunks, in samples; None for a stream, until it is read.
    link: over which its chunks reach the device, the next one while one is encoded.
    """

    tower: Tower
    value: Any
    ranges: tuple[tuple[int, int], ...] | None
    trains: bool
    link: Link

    @property
    def samples(self) -> int:
        return self.value.samples if self.ranges is None else self.ranges[-1][1]

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where the encoder may draw random numbers."""
        return devices_of(self.value) | devices_of_modules(self.tower.modules)

    def chunks(self) -> Iterator[Chunk]:
        """The input, chunk by chunk; the copy of the next one has begun when one is given.

        Raises:
            ArgumentError: a stream has not as many samples as it says.
        """

        def begin(item: tuple[int, int, Any]) -> Chunk:
            start, stop, value = item
            return Chunk(start, stop, fetched(value, self.link))

        if not self.link.separate:
            return map(begin, self._pieces())
        return ahead(self._pieces(), begin)

    def _pieces(self) -> Iterable[tuple[int, int, Any]]:
        if self.ranges is None:
            return self._of_stream()
        return ((start, stop, cut(self.value, start, stop)) for start, stop in self.ranges)

    def _of_stream(self) -> Iterator[tuple[int, int, Any]]:
        what, first = f"the input of {self.tower.what}", 0

        def wrong(count: str) -> ArgumentError:
            return ArgumentError(
                f"{what} is a Stream of {self.samples:,} samples, and its parts have {count}: "
                "give the number that all parts have together."
            )

        for part in self.value.parts:
            ranges = chunk_ranges(part, self.tower.chunk_size, what)
            if first + ranges[-1][1] > self.samples:
                raise wrong(f"{first + ranges[-1][1]:,} or more")
            for start, stop in ranges:
                yield first + start, first + stop, cut(part, start, stop)
            first += ranges[-1][1]
        if first < self.samples:
            raise wrong(f"{first:,}")

    def first_part(self) -> Job:
        """A job of what is there to be looked at: of a stream, its first part."""
        if self.ranges is not None:
            return self
        for part in self.value.parts:
            ranges = chunk_ranges(part, 1, f"the input of {self.tower.what}")
            return replace(self, value=part, ranges=ranges)
        raise ArgumentError(f"the input of {self.tower.what} is a Stream without any part.")

    def on_device(self) -> Job:
        """The same with the whole input on the device; a stream stays one."""
        if self.ranges is None or not self.link.separate:
            return self
        return replace(self, value=fetched(self.value, self.link)(), link=Link())
