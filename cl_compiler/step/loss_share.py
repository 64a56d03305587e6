"""What of a step's budget its loss gets: what the embeddings leave, and no more than its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cl_compiler.api import Specialiser, compile_loss
from cl_compiler.codegen.backend import least_bytes
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import MemoryBudget
from cl_compiler.runtime.function import CompiledLoss

__all__ = ["is_named", "least_of", "within"]


def is_named(loss_fn: Any) -> bool:
    """Whether it is a loss's name or definition, which a plan compiles for what is left."""
    return isinstance(loss_fn, str | LossIR)


def within(loss_fn: Any, limit_bytes: int) -> tuple[Callable[..., Any], int | None]:
    """The loss with a budget of at most ``limit_bytes``, and its budget; None: it has none.

    A loss on a group of ranks keeps the budget that all of them agreed on.
    """
    limit_bytes = _rounded(limit_bytes)
    if is_named(loss_fn):
        return compile_loss("auto", limit_bytes, loss=loss_fn), limit_bytes
    specialise = _specialiser(loss_fn)
    if specialise is None or specialise.group_size:
        return loss_fn, None
    own = specialise.budget
    if own.device_bytes <= limit_bytes:
        return loss_fn, own.device_bytes
    smaller = replace(specialise, budget=MemoryBudget(limit_bytes, own.host_bytes))
    return loss_fn.respecialised(smaller), limit_bytes


def least_of(loss_fn: Any) -> Callable[[float], int] | None:
    """The least bytes of a compiled loss, at a multiple of the size of its latest call.

    None for any other function.
    """
    specialise = _specialiser(loss_fn)
    if specialise is None:
        return None
    call = loss_fn.latest.signature
    request = specialise.request(call)
    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    of_rows = least_bytes(request, sweeps)
    return lambda factor: of_rows(max(1, round(request.problem.M * factor)))


def _specialiser(loss_fn: Any) -> Specialiser | None:
    found = loss_fn.specialise if isinstance(loss_fn, CompiledLoss) else None
    return found if isinstance(found, Specialiser) else None


def _rounded(limit_bytes: int) -> int:
    """Down by at most a sixteenth: budgets that differ by little share a plan in the cache."""
    step = 1 << max(0, limit_bytes.bit_length() - 5)
    return max(1, limit_bytes // step * step)
