"""The whole training step: encoders in chunks, the loss once, gradients of the whole batch."""

from __future__ import annotations

from cl_compiler.step.deferred import Chunk, deferred, joined
from cl_compiler.step.grad_cache import GradientCache
from cl_compiler.step.inputs import Rows, Tokens, Whole

__all__ = ["Chunk", "GradientCache", "Rows", "Tokens", "Whole", "deferred", "joined"]
