"""``compile_loss``: the whole pipeline, readable in one screen.

request → key → (cached, or: sweeps → plan → program → text) → verified entry → loaded module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_compiler.cache import CacheKey, Entry, Variant, cache_key, fetch
from cl_compiler.codegen.templates import template_root
from cl_compiler.errors import ArgumentError, LossDefinitionError, ScheduleError
from cl_compiler.hardware import HardwareSpec, load_hardware
from cl_compiler.lang.ir import LossIR
from cl_compiler.lang.program import SCHEDULES
from cl_compiler.plan.precision import PRECISIONS, products_of
from cl_compiler.plan.problems import check_problem
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Request
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.signatures import CallSignature, LoadedVariant, LossSignature

if TYPE_CHECKING:
    import networkx as nx

    from cl_compiler.runtime.function import CompiledLoss


def compile_loss(
    hardware_spec: str | Path | HardwareSpec,
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None,
    *,
    loss: str | LossIR = "clip",
    problem: Problem | str | None = None,
    precision: str = "auto",
    schedule: str = "auto",
    deterministic: bool = False,
    nonfinite: Literal["propagate", "error"] = "propagate",
    verify: bool = False,
) -> CompiledLoss:
    """Compile a loss for a machine and a memory budget.

    Args:
        hardware_spec: "auto" (detect), a preset's name, a path to a ``.toml`` or a spec.
        memory_budget: bytes, "512MiB", {"device": …, "host": …}, a ``MemoryBudget``, or None for a
            quarter: of the memory that is free here ("auto"), or of the named device's.  It bounds
            every byte that the loss allocates or keeps, returned gradients included, the caller's
            inputs not.  What is given for the host has no effect so far.
        loss: a name in ``cl_compiler.losses``, or what ``@cl.define_loss`` returned.
        problem: the largest sizes, a ``Problem`` or "MxNxD", to compile ahead of time; without it
            the loss specialises at its first call, and again for a new dtype, width or size class.
        precision: how similarities are multiplied: "ieee", "bf16" (bf16 products of fp32 or bf16
            inputs with fp32 accumulation, on CPUs that have them), or "auto": bf16 for bf16 inputs,
            ieee otherwise.
        schedule: "auto", or one of recompute, spill, panel, retain, dense.
        deterministic: bitwise repeatable on the same machine with the same number of threads (the
            emitted CPU code always is).
        nonfinite: propagate NaN and infinities as the reference does, or raise.
        verify: check the first call on a small sample against the dense float64 reference.

    Returns:
        A ``CompiledLoss``: ``value = loss_fn(x, y, logit_scale=scale)``.

    Raises:
        ArgumentError: an argument is none of those above, or the problem does not suit the loss.
        HardwareError: the hardware is unknown, its description wrong, or it lacks what is asked.
        LossDefinitionError: there is no such loss.
        ScheduleError: there is no such schedule, or the loss cannot use it.
        BudgetError: with ``problem``, no plan fits; without, the first call says so.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision={precision!r}: use one of {', '.join(PRECISIONS)}.")
    if schedule not in ("auto", *SCHEDULES):
        raise ScheduleError(f"schedule={schedule!r}: use auto or one of {', '.join(SCHEDULES)}.")
    if nonfinite not in ("propagate", "error"):
        raise ArgumentError(f"nonfinite={nonfinite!r}: use 'propagate' or 'error'.")
    for name, switch in (("deterministic", deterministic), ("verify", verify)):
        if not isinstance(switch, bool):
            raise ArgumentError(f"{name}={switch!r}: use True or False.")
    from cl_compiler.runtime.function import CompiledLoss

    hardware = load_hardware(hardware_spec)
    budget = _budget(memory_budget, hardware, is_here=hardware_spec == "auto")
    ir = find_loss(loss)
    specialise = Specialiser(ir, hardware, budget, precision, schedule)
    planned = None if problem is None else specialise.signature_of(Problem.parse(problem))
    return CompiledLoss(
        loss_signature(ir),
        specialise,
        planned=planned,
        nonfinite=nonfinite,
        verify=_verifier(ir) if verify else None,
        device_type="cpu" if hardware.kind == "cpu" else "cuda",
        refusal=refusal_of(hardware),
    )


def _verifier(ir: LossIR) -> Callable[[CompiledLoss, Mapping[str, Any]], None]:
    from cl_compiler.verify import Verifier

    return Verifier(ir)


def refusal_of(hardware: HardwareSpec) -> str:
    """Why this process cannot call what it compiles; "" where it can."""
    if hardware.world_size == 1:
        return ""
    return (
        f"compiled for {hardware.name}, which has {hardware.world_size} devices; this process is "
        "alone, and what is emitted for several is one rank's share so far. Plan and inspect it "
        'anywhere; to call a loss here, compile for "auto".'
    )


def find_loss(loss: str | LossIR) -> LossIR:
    """A shipped loss by its name, or the loss itself.

    Raises:
        LossDefinitionError: no such loss.
    """
    if isinstance(loss, LossIR):
        return loss
    from cl_compiler.losses import find

    if not isinstance(loss, str):
        raise LossDefinitionError(f"loss={loss!r}: give a name or what @cl.define_loss returned.")
    return find(loss)


def loss_signature(ir: LossIR) -> LossSignature:
    """What a loss is called with."""
    return LossSignature(
        name=ir.name,
        operands=tuple((op.name, op.axes) for op in ir.operands),
        inputs=tuple((n, leaf.axes[0]) for n, leaf in ir.leaves.items() if leaf.kind == "input"),
        parameters=ir.parameters,
        uses_positives=ir.uses_positives,
        stops=frozenset(op.name for op in ir.operands if op.stop),
    )


def _budget(
    budget: int | str | Mapping[str, int | str] | MemoryBudget | None,
    hardware: HardwareSpec,
    *,
    is_here: bool,
) -> MemoryBudget:
    """What was asked for, or a share of the memory: of what is free here, or of the device's."""
    if budget is not None:
        return MemoryBudget.parse(budget)
    from cl_compiler.hardware.cpu import free_memory_bytes

    measured = is_here and hardware.kind == "cpu"
    free_bytes = free_memory_bytes() if measured else hardware.device_memory_bytes
    return MemoryBudget.share_of(free_bytes)


@dataclass(frozen=True)
class Specialiser:
    """Turns a call's signature into loaded code.  A value: picklable and comparable."""

    ir: LossIR
    hardware: HardwareSpec
    budget: MemoryBudget
    precision: str
    schedule: str

    def signature_of(self, problem: Problem) -> CallSignature:
        """The signature of a call at a problem's size, all gradients required.

        Raises:
            ArgumentError: no call of this loss could have these sizes.
        """
        positives = loss_signature(self.ir).positives(problem.M, problem.N)
        check_problem(problem, self.ir, positives)  # type: ignore[arg-type]
        names = {op.name for op in self.ir.operands if not op.stop} | set(self.ir.parameters)
        return CallSignature(
            M=problem.M,
            N=problem.N,
            D=problem.D,
            dtype=problem.dtype,
            widths=tuple(sorted(problem.operands.items())),
            slots=problem.slots,
            bank=problem.bank,
            positives=positives,
            needs=frozenset(names),
        )

    def request(self, call: CallSignature) -> Request:
        """Everything that the plan depends on."""
        precision = products_of(self.precision, call.dtype, self.hardware)
        problem = Problem(
            call.M,
            call.N,
            call.D,
            call.dtype,  # type: ignore[arg-type]
            operands=dict(call.widths),
            slots=call.slots,
            bank=call.bank,
        )
        return Request(
            self.ir,
            self.hardware,
            self.budget,
            problem,
            call.positives,  # type: ignore[arg-type]
            call.needs,
            precision,
            self.schedule,
            call.contiguous_copies,
        )

    def __call__(self, call: CallSignature) -> LoadedVariant:
        entry = fetch_variant(self.request(call))
        from cl_compiler.plan.report import plan_from_json

        module = load_source(entry.source, entry.name, entry.path)
        path = None if entry.path is None else str(entry.path)
        return LoadedVariant(
            call, module, plan_from_json(entry.plan), entry.source, path, entry.hit
        )

    def _any_call(self) -> CallSignature:
        """The smallest call that the loss can have."""
        axes = {axis for op in self.ir.operands for axis in op.axes}
        problem = Problem(1, 1, 1, slots=int("slots" in axes), bank=int("bank" in axes))
        return self.signature_of(problem)

    def explain(self, plan: Plan) -> str:
        """The plan as text."""
        from cl_compiler.plan.report import explain

        return explain(plan)

    def graph(self, call: CallSignature | None) -> nx.DiGraph:
        """The loss graph for a call's gradients."""
        from cl_compiler.lang.graph import loss_graph
        from cl_compiler.lang.sweeps import plan_sweeps

        call = self._any_call() if call is None else call
        return loss_graph(plan_sweeps(self.ir, call.positives, call.needs))  # type: ignore[arg-type]


def key_of(request: Request) -> tuple[dict[str, Any], CacheKey]:
    """(canonical content, name) of what a request compiles to."""
    described = request_to_json(request)
    return described, cache_key(
        described,
        loss=request.loss.name,
        hardware=request.hardware.canonical_json(),
        templates=template_root(),
    )


def fetch_variant(request: Request) -> Entry:
    """What a request compiles to: from the cache, or planned and rendered into it; never executed.

    Raises:
        BudgetError, ScheduleError, LossDefinitionError: no plan exists; the message says why.
    """
    described, key = key_of(request)
    return fetch(key, lambda: build_variant(request, described, key.variant))


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


def request_to_json(request: Request) -> dict[str, Any]:
    """A request's canonical content: no line numbers, no paths, no order of sets."""
    problem = request.problem
    return {
        "loss": loss_to_json(request.loss),
        "hardware": request.hardware.to_dict(),
        "budget": {
            "device_bytes": request.budget.device_bytes,
            "host_bytes": request.budget.host_bytes,
        },
        "problem": {
            "M": problem.M,
            "N": problem.N,
            "D": problem.D,
            "dtype": problem.dtype,
            "operands": dict(sorted(problem.operands.items())),
            "slots": problem.slots,
            "bank": problem.bank,
        },
        "positives": request.positives,
        "needs": sorted(request.needs),
        "precision": request.precision,
        "schedule": request.schedule,
        "contiguous_copies": request.contiguous_copies,
    }


def loss_to_json(ir: LossIR) -> dict[str, Any]:
    """What a loss computes, as text."""
    return {
        "name": ir.name,
        "doc": ir.doc,
        "operands": [[op.name, list(op.axes), op.stop] for op in ir.operands],
        "parameters": list(ir.parameters),
        "leaves": [
            [leaf.name, leaf.kind, list(leaf.axes), repr(leaf.left), repr(leaf.right)]
            for leaf in ir.leaves.values()
        ],
        "reductions": [
            [r.name, r.monoid, r.over, *(str(e) for e in r.expressions)] for r in ir.reductions
        ],
        "value": str(ir.value),
        "outputs": [[n, str(e)] for n, e in ir.outputs],
        "required": [[n, str(e)] for n, e in ir.required],
        "constants": [[n, repr(v)] for n, v in ir.constants],
    }


__all__ = [
    "Plan",
    "Specialiser",
    "compile_loss",
    "fetch_variant",
    "find_loss",
    "key_of",
    "refusal_of",
    "request_to_json",
]
