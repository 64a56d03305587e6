"""Run one case: prepare its providers, count their memory, time them in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import GEMM_UNITS, Prepared, Skipped, inputs_of, prepare
from cl_compiler.cli.dense import dense_clip
from cl_compiler.errors import CompilerError
from cl_compiler.plan.types import Plan
from cl_compiler.runtime.loader import forget_sizes
from cl_compiler.runtime.measure import (
    Memory,
    Timing,
    describe,
    interleave,
    measure_memory,
    planted_pairs,
    relative_error,
    thread_limit,
)

__all__ = ["plan_entry", "run_case", "step_count"]

Entry = dict[str, Any]


def step_count(case: Case) -> int:
    """How often ``run_case`` calls ``advance`` if nothing fails."""
    return len(case.providers) * (1 + case.repeats)


def run_case(case: Case, advance: Callable[[str], None] = lambda name: None) -> Entry:
    """Measure a case; a provider that fails becomes a row with its error.

    Args:
        case: what to measure.
        advance: told the provider's name after its first run and after every repetition.

    Returns:
        The case, and for each provider its times, memory, error and, if compiled, its plan.
    """
    inputs = inputs_of(case)
    forget_sizes()  # of earlier cases: a training run has one
    with thread_limit(case.threads):
        _page_in()
        prepared, rows = _prepare_all(case, inputs)
        memory: dict[str, Memory] = {}
        gradients: dict[str, list[Tensor]] = {}
        for name, provider in prepared.items():
            try:
                if not provider.visible:
                    provider.step()  # compiling is not the call's memory
                memory[name] = measure_memory(provider.step, visible=provider.visible)
            except Exception as error:
                rows[name]["error"] = describe(error)
            if provider.has_gradients:
                gradients[name] = [t.grad for t in inputs.values() if t.grad is not None]
            for tensor in inputs.values():
                tensor.grad = None
            advance(name)
        calls = {name: p.step for name, p in prepared.items() if not rows[name]["error"]}
        timings = interleave(
            calls,
            case.repeats,
            clock=case.clock,
            known_s={name: m.seconds for name, m in memory.items()},
            advance=advance,
        )
    for name, timing in timings.items():
        rows[name] |= _measured(timing, memory[name])
        if name in gradients and gradients.get("dense") and name != "dense":
            rows[name]["gradient_error"] = relative_error(gradients[name], gradients["dense"])
    plan = _first_plan(prepared)
    if plan is not None:
        _add_limit(rows, prepared)
    return {"key": case.key, "case": asdict(case), "clock": case.clock, "rows": rows}


def _page_in() -> None:
    """Let the library load its code and start its threads: neither is a provider's memory."""
    x, y = (t.requires_grad_() for t in planted_pairs(256, 256, 64))
    scale = torch.ones((), requires_grad=True)
    dense_clip(x, y, logit_scale=scale).backward()  # type: ignore[no-untyped-call]
    torch.mm(x.detach(), y.detach().T, out=torch.empty(256, 256)).exp_()


def _prepare_all(
    case: Case, inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Prepared], dict[str, Entry]]:
    prepared: dict[str, Prepared] = {}
    rows: dict[str, Entry] = {}
    for name in case.providers:
        rows[name] = {"error": ""}
        try:
            prepared[name] = prepare(name, case, inputs, _first_plan(prepared))
        except (Skipped, CompilerError) as error:
            what = "skipped: " if isinstance(error, Skipped) else f"{type(error).__name__}: "
            rows[name]["error"] = what + str(error).splitlines()[0]
            continue
        plan = prepared[name].plan
        if plan is not None:
            rows[name]["plan"] = plan_entry(plan)
    return prepared, rows


def _first_plan(prepared: Mapping[str, Prepared]) -> Plan | None:
    return next((p.plan for p in prepared.values() if p.plan is not None), None)


def plan_entry(plan: Plan) -> Entry:
    """What a results file says about a plan."""
    return {
        "schedule": plan.schedule,
        "tile": [plan.tile.rows, plan.tile.cols],
        "kept_tiles": plan.kept_tiles,
        "units": plan.units,
        "predicted_bytes": plan.peak_bytes,
        "predicted_seconds": plan.seconds,
        "precision": plan.precision,
    }


def _measured(timing: Timing, memory: Memory) -> Entry:
    return {
        "error": timing.error,
        "median_s": timing.median_s,
        "seconds": [s.seconds for s in timing.samples],
        "wall_seconds": [s.wall_s for s in timing.samples],
        "foreign_cores": [s.foreign for s in timing.samples],
        "dirty": timing.dirty_count,
        "live_bytes": memory.live_bytes,
        "process_bytes": memory.process_bytes,
    }


def _add_limit(rows: dict[str, Entry], prepared: Mapping[str, Prepared]) -> None:
    """The fraction of the GEMM limit: seconds of the bare loop for as many units / measured."""
    gemm_s = rows.get("gemm", {}).get("median_s")
    if gemm_s is None:
        return
    for name, provider in prepared.items():
        seconds = rows[name].get("median_s")
        if provider.plan is not None and seconds:
            limit_s = gemm_s * provider.plan.units / GEMM_UNITS
            rows[name]["gemm_fraction"] = limit_s / seconds


def torch_threads() -> int:
    """What PyTorch uses unless told otherwise."""
    return torch.get_num_threads()
