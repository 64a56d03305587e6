"""The whole training step: encoders in chunks, the loss once, gradients of the whole batch."""

from __future__ import annotations

from cl_compiler.step.deferred import Chunk, deferred, joined
from cl_compiler.step.grad_cache import GradientCache
from cl_compiler.step.inputs import Rows, Stream, Tokens, Whole
from cl_compiler.step.planner import StepPlan, plan_step

__all__ = ["Chunk", "GradientCache", "Rows", "StepPlan", "Stream", "Tokens", "Whole"]
__all__ += ["deferred", "joined", "plan_step"]
