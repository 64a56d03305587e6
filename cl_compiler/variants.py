"""What a request compiles to: from the cache, or planned, lowered and rendered into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cl_compiler.cache import CacheKey, Entry, Variant, cache_key, fetch
from cl_compiler.codegen.templates import template_root
from cl_compiler.plan.requests import request_to_json
from cl_compiler.plan.types import Request


def key_of(request: Request, *, tuned: bool = False) -> tuple[dict[str, Any], CacheKey]:
    """(canonical content, name) of what a request compiles to.

    ``tuned``: what is compiled depends on where it was measured, too.
    """
    described = request_to_json(request)
    if tuned:
        from cl_compiler.tune import place

        described["measured_on"] = place()
    return described, cache_key(
        described,
        loss=request.loss.name,
        hardware=request.hardware.canonical_json(),
        templates=template_root(),
    )


def fetch_variant(request: Request, *, tuned: bool = False) -> Entry:
    """What a request compiles to: from the cache, or planned and rendered into it.

    It is not executed; but to have it ``tuned``, candidates are, where the cache has none.

    Raises:
        BudgetError, ScheduleError, LossDefinitionError: no plan exists; the message says why.
        ArgumentError: tuning for a machine that is not here.
    """
    described, key = key_of(request, tuned=tuned)
    build = tuned_variant if tuned else build_variant
    return fetch(key, lambda: build(request, described, key.variant))


def tuned_variant(request: Request, described: Mapping[str, Any], name: str) -> Variant:
    """Measure candidates and take the fastest.

    Raises:
        as ``cl_compiler.tune.tune``.
    """
    from cl_compiler.lang.sweeps import plan_sweeps
    from cl_compiler.plan.report import plan_to_json
    from cl_compiler.tune import tune

    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    tuning = tune(request, sweeps, name)
    return Variant(name, tuning.best.source, dict(described), plan_to_json(tuning.plan))


def build_variant(request: Request, described: Mapping[str, Any], name: str) -> Variant:
    """Plan, lower and render: what a cache miss costs.

    Raises:
        BudgetError, ScheduleError, LossDefinitionError: no plan exists; the message says why.
    """
    from cl_compiler.codegen.backend import plan_and_print
    from cl_compiler.lang.sweeps import plan_sweeps
    from cl_compiler.plan.report import plan_to_json

    sweeps = plan_sweeps(request.loss, request.positives, request.needs)
    plan, source = plan_and_print(request, sweeps, name)
    return Variant(name, source, dict(described), plan_to_json(plan))


__all__ = ["build_variant", "fetch_variant", "key_of", "tuned_variant"]
