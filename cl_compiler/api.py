"""``compile_loss``: the whole pipeline, readable in one screen.

request → key → (cached, or: sweeps → plan → program → text) → verified entry → loaded module.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_compiler.errors import (
    CompilerError,
    HardwareError,
    LossDefinitionError,
)
from cl_compiler.hardware import HardwareSpec, load_hardware
from cl_compiler.hardware.cluster_links import with_measured_links
from cl_compiler.hardware.ranks import with_ranks
from cl_compiler.lang.ir import LossIR, View
from cl_compiler.lang.program import SCHEDULES
from cl_compiler.lang.ring import CANONICAL, CANONICAL_CHUNK, CLUSTER_SCHEDULES
from cl_compiler.options import (
    asked_of_group,
    canonical_schedule,
    check_on_group,
    check_options,
)
from cl_compiler.plan.precision import products_of
from cl_compiler.plan.problems import check_problem
from cl_compiler.plan.requests import loss_to_json, request_to_json
from cl_compiler.plan.types import MemoryBudget, Plan, Problem, Request
from cl_compiler.runtime.loader import load_source
from cl_compiler.runtime.signatures import CallSignature, LoadedVariant, LossSignature
from cl_compiler.variants import fetch_variant

if TYPE_CHECKING:
    import networkx as nx

    from cl_compiler.runtime.function import CompiledLoss
    from cl_compiler.runtime.group import RankGroup
    from cl_compiler.runtime.group_loss import GroupLoss


TIMEOUT_S = 600.0
"""How long a rank waits for another."""


def compile_loss(
    hardware_spec: str | Path | HardwareSpec,
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None,
    *,
    loss: str | LossIR = "clip",
    problem: Problem | str | None = None,
    precision: str = "auto",
    schedule: str = "auto",
    deterministic: bool | Literal["canonical"] = False,
    nonfinite: Literal["propagate", "error"] = "propagate",
    verify: bool = False,
    tune: bool = False,
    group: Any = None,
    mesh: Any = None,
    grad_convention: Literal["mean", "sum", "global"] = "mean",
    timeout_s: float = TIMEOUT_S,
) -> CompiledLoss:
    """Compile a loss for a machine and a memory budget.

    Args:
        hardware_spec: "auto" (detect), a preset's name, a path to a ``.toml`` or a spec.
        memory_budget: bytes, "512MiB", {"device": …, "host": …}, a ``MemoryBudget``, or None for a
            quarter: of the memory that is free here ("auto"), or of the named device's.  It bounds
            every byte that the loss allocates or keeps, returned gradients included, the caller's
            inputs not.  What is given for the host bounds what is made there of shards in host
            memory (``schedule``), the gradients above all; of CPUs, too.
        loss: a name in ``cl_compiler.losses``, or what ``@cl.define_loss`` returned.
        problem: the largest sizes, a ``Problem`` or "MxNxD", to compile ahead of time; without it
            the loss specialises at its first call, and again for a new dtype, width or size class.
        precision: how similarities are multiplied; sums are fp32.  "ieee"; "bf16" (fp32 inputs are
            rounded to it), on CPUs that have it; on GPUs also "fp16", "tf32", "fp8" (16-bit
            inputs are rounded to e4m3 where similarities are made of them), and "bf16x3": fp32
            inputs as two bf16 numbers each, three products.  "auto": 16-bit inputs in their own
            type where the machine multiplies in it; fp32 inputs in bf16x3 on a GPU, else in ieee.
        schedule: "auto", or one of recompute, spill, panel, retain, dense; with a group, one of
            ring_owner, ring_travel, all_gather, two_level, half_ring, both_ways, and host, for
            shards in host memory: CPU tensors that are streamed through the device.
        deterministic: bitwise repeatable on the same machine with the same number of threads.
            What is emitted always is, except on CPUs where oneDNN multiplies faster than BLAS: a
            process has it multiply batches of its first eight sizes, or, with True, none.
            "canonical", with a group: bitwise the same value and gradients for any number of ranks,
            where every shard is a multiple of 256 rows and columns; every tile of the forward is
            made twice.
        nonfinite: propagate NaN and infinities as the reference does, or raise.
        verify: check the first call on a small sample against the dense float64 reference.
        tune: measure the planner's best candidates where the loss runs, once, and keep the fastest
            in the cache; it takes seconds to a minute.
        group: a ``ProcessGroup`` whose ranks each have a shard of the rows and columns; every one
            of them calls ``compile_loss``, with the same arguments, the loss and its backward.  The
            returned value is that of all shards together, on every rank.
        mesh: a 1-D ``DeviceMesh`` in place of a group.
        grad_convention: with a group, what this rank's gradients of the global value are: "mean"
            if they are averaged over ranks afterwards, as DDP and FSDP do, "sum" if they are
            summed, "global" if neither.
        timeout_s: with a group, how long a rank waits for another before it raises.

    Returns:
        A ``CompiledLoss``: ``value = loss_fn(x, y, logit_scale=scale)``.

    Raises:
        ArgumentError: an argument is none of those above, or the problem does not suit the loss.
        HardwareError: the hardware is unknown, its description wrong, or it lacks what is asked.
        LossDefinitionError: there is no such loss.
        ScheduleError: there is no such schedule, or the loss cannot use it.
        BudgetError: with ``problem``, no plan fits; without, the first call says so.
        GroupError: a rank of the group is gone or late.
    """
    if group is not None or mesh is not None:
        from cl_compiler.runtime.group import RankGroup, check_group_options, process_group

        parent, wrong = process_group(group, mesh), None
        asked: dict[str, str] = {}
        try:
            if deterministic == CANONICAL:
                schedule = canonical_schedule(schedule, True)
            schedules = (*CLUSTER_SCHEDULES, CANONICAL)
            check_options(precision, schedule, schedules, nonfinite, deterministic, verify, tune)
            check_on_group(verify, tune)
            check_group_options(timeout_s, grad_convention)
            find_loss(loss)
            asked = asked_of_group(
                hardware_spec,
                memory_budget,
                problem,
                precision,
                schedule,
                deterministic,
                grad_convention,
            )
        except CompilerError as error:  # the others are told: they make the group, too
            wrong, timeout_s, grad_convention = error, TIMEOUT_S, "mean"
        ranks = RankGroup(parent, timeout_s, grad_convention)
        machine = (hardware_spec, memory_budget)
        with ranks.closing_on_error():
            ranks.agree(wrong)
            return _on_group(
                ranks,
                machine,
                loss,
                problem,
                precision,
                schedule,
                bool(deterministic),
                nonfinite,
                asked,
            )
    if grad_convention != "mean" or timeout_s != TIMEOUT_S:  # without effect, but no nonsense
        from cl_compiler.runtime.group import check_group_options

        check_group_options(timeout_s, grad_convention)
    if deterministic == CANONICAL:
        schedule = canonical_schedule(schedule, False)
    hardware = load_hardware(hardware_spec)
    ranks_there = 0 if hardware.world_size == 1 else hardware.world_size
    known = CLUSTER_SCHEDULES if ranks_there else SCHEDULES
    check_options(precision, schedule, known, nonfinite, deterministic, verify, tune)
    from cl_compiler.runtime.function import CompiledLoss

    budget = _budget(memory_budget, hardware, is_here=hardware_spec == "auto")
    ir = find_loss(loss)
    specialise = Specialiser(
        ir,
        hardware,
        budget,
        precision,
        schedule,
        ranks_there,
        tune=tune,
        deterministic=bool(deterministic),
    )
    planned = None if problem is None else specialise.share_of(Problem.parse(problem))
    return CompiledLoss(
        loss_signature(ir),
        specialise,
        planned=planned,
        nonfinite=nonfinite,
        verify=_verifier(ir) if verify else None,
        device_type="cpu" if hardware.kind == "cpu" else "cuda",
        refusal=refusal_of(hardware),
    )


def _on_group(
    ranks: RankGroup,
    machine: tuple[Any, Any],
    loss: str | LossIR,
    problem: Problem | str | None,
    precision: str,
    schedule: str,
    deterministic: bool,
    nonfinite: Literal["propagate", "error"],
    asked: Mapping[str, str],
) -> GroupLoss:
    """``compile_loss`` on every rank of a group, for the machine and budget that rank 0 sees.

    ``asked``: the arguments as text, which are compared at every call.
    """
    from cl_compiler.runtime.group_loss import GroupLoss

    ir = find_loss(loss)
    seen = ranks.share(lambda: _seen_by_rank_0(*machine, ranks.world_size))
    if "error" in seen:
        raise HardwareError(seen["error"])
    hardware = HardwareSpec.from_dict(seen["hardware"])
    budget = MemoryBudget(seen["device_bytes"], seen["host_bytes"])
    specialise = Specialiser(
        ir, hardware, budget, precision, schedule, ranks.world_size, deterministic=deterministic
    )
    planned = None if problem is None else specialise.share_of(Problem.parse(problem))
    text = json.dumps(loss_to_json(ir), sort_keys=True)
    return GroupLoss(
        loss_signature(ir),
        specialise,
        ranks,
        loss_text=f"{ir.name}, fingerprint {hashlib.sha256(text.encode()).hexdigest()[:8]}",
        asked={**asked, "planned for": f"{hardware.name} with {budget.device_bytes} bytes"},
        planned=planned,
        nonfinite=nonfinite,
        device_type="cpu" if hardware.kind == "cpu" else "cuda",
        chunk=CANONICAL_CHUNK if schedule == CANONICAL else 0,
    )


def _seen_by_rank_0(
    hardware_spec: str | Path | HardwareSpec,
    memory_budget: int | str | Mapping[str, int | str] | MemoryBudget | None,
    world_size: int,
) -> dict[str, Any]:
    """Machine and budget as JSON values; an error of rank 0 is everyone's."""
    try:
        hardware = load_hardware(hardware_spec)
        budget = _budget(memory_budget, hardware, is_here=hardware_spec == "auto")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        alone = hardware.world_size == 1
        hardware = with_ranks(hardware, world_size, local)
        if hardware_spec == "auto" and alone:
            hardware = with_measured_links(hardware)
    except Exception as error:
        return {"error": f"{error} (on rank 0)"}
    return {
        "hardware": hardware.to_dict(),
        "device_bytes": budget.device_bytes,
        "host_bytes": budget.host_bytes,
    }


def _verifier(ir: LossIR) -> Callable[[CompiledLoss, Mapping[str, Any]], None]:
    from cl_compiler.verify import Verifier

    return Verifier(ir)


def refusal_of(hardware: HardwareSpec) -> str:
    """Why this process cannot call what it compiles; "" where it can."""
    if hardware.world_size == 1:
        return ""
    return (
        f"compiled for {hardware.name}, which has {hardware.world_size} devices; this process is "
        "alone. Plan and inspect it anywhere; to call the loss, pass group= on every rank of such "
        'a group, or compile for "auto".'
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
        one_positive=("positives_per_row", 1) in ir.constants,
        compared=_compared(ir),
        prefixes=tuple(sorted({(v.operand, v.prefix) for v in _views(ir) if v.prefix is not None})),
    )


def _views(ir: LossIR) -> list[View]:
    """What similarities are of, and norms."""
    return [v for leaf in ir.leaves.values() for v in (leaf.left, leaf.right) if v is not None]


def _compared(ir: LossIR) -> tuple[tuple[str, str], ...]:
    """Pairs of operands, each whole, that have inner products; x and y always have one width."""
    found = {
        (leaf.left.operand, leaf.right.operand)
        for leaf in ir.leaves.values()
        if leaf.left is not None
        and leaf.right is not None
        and leaf.left.prefix == leaf.right.prefix is None
        and leaf.left.operand != leaf.right.operand
    }
    both = {"x", "y"} <= {op.name for op in ir.operands}
    return tuple(sorted(found | ({("x", "y")} if both else set())))


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
    group_size: int = 0
    """Ranks of the process group; 0: this process alone."""
    tune: bool = False
    deterministic: bool = False

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

    def share_of(self, problem: Problem) -> CallSignature:
        """The call of one rank with an even share of a problem; of one device the whole."""
        ranks = self.group_size or 1
        m, n = (-(-length // ranks) for length in (problem.M, problem.N))
        return self.signature_of(replace(problem, M=m, N=n))

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
            self.group_size,
            self.deterministic,
        )

    def __call__(self, call: CallSignature) -> LoadedVariant:
        entry = fetch_variant(self.request(call), tuned=self.tune)
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


__all__ = [
    "Plan",
    "Specialiser",
    "compile_loss",
    "find_loss",
    "loss_to_json",
    "refusal_of",
    "request_to_json",
]
