"""Whose chunk ran out of memory: an error that names the encoder can be answered by halving it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["blame", "blamed_encoder"]

_ATTRIBUTE = "_cl_compiler_encoder"
_CPU_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "not enough memory")


@contextmanager
def blame(encoder: int) -> Iterator[None]:
    """Mark errors of missing memory that leave this block with the encoder's number."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _is_out_of_memory(error):
            setattr(error, _ATTRIBUTE, encoder)
        raise


def blamed_encoder(error: BaseException) -> int | None:
    """The encoder whose chunk ran out of memory; None for every other error."""
    number: int | None = getattr(error, _ATTRIBUTE, None)
    return number


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """CUDA has a class for it; the CPU's allocator has a sentence."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _CPU_MESSAGES)
