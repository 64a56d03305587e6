"""Render a plan for many ranks: one self-contained file that every rank runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cl_compiler.codegen.context import build_context, is_cast
from cl_compiler.codegen.layout import drop_unused, fit, wrap
from cl_compiler.codegen.library import library_products
from cl_compiler.codegen.render import environment, tidy_text
from cl_compiler.codegen.ring.host import HostStagePrinter, LocalBlocks, find_continued
from cl_compiler.codegen.ring.host_kernels import HostKernelStagePrinter
from cl_compiler.codegen.ring.kernels import (
    KernelStagePrinter,
    kernel_context,
    launch_tile,
)
from cl_compiler.codegen.ring.passes import RingNames, RingPassText, tuple_text
from cl_compiler.codegen.ring.stages import CanonicalStagePrinter, RingStagePrinter
from cl_compiler.codegen.ring.target import target_of
from cl_compiler.codegen.triton.core import CoreTile
from cl_compiler.lang.ir import COLS, ROWS
from cl_compiler.lang.program import Program
from cl_compiler.lang.ring import BOTH_WAYS, CANONICAL, HALF_RING, HOST, TRAVEL, TWO_GROUPS
from cl_compiler.plan.travel import travels_of
from cl_compiler.plan.types import Plan

_TEMPLATE = "ring/loss.py.jinja"


def render_ring(
    plan: Plan,
    program: Program,
    variant: str,
    *,
    cluster_schedule: str,
    chunk: int,
    ranks_of_node: int = 0,
    resident: int = 0,
    device: str = "cpu",
    arch: str = "",
    core: CoreTile | None = None,
) -> str:
    """The text of the file that every rank runs.

    Args:
        plan: tiles and sizes of one rank's share.
        program: from ``build_ring_program``.
        variant: the file's name in its header.
        cluster_schedule: one of ``CLUSTER_SCHEDULES``, or "canonical".
        chunk: rows of a shard that travel together.
        ranks_of_node: with "two_level", how many there are.
        resident: with "host", rows of a block that is on the device.
        device: "cpu", or "cuda" where what is allocated must lie beside the operands.
        arch: of a GPU, for Triton kernels; "": PyTorch's tiles.
        core: one tile for every kernel, for tests.

    Raises:
        ScheduleError: kernels do not serve the program; the message says why.
    """
    if arch or plan.problem.dtype == "float64":
        program = program.narrowed
    names = RingNames(program.plan)
    canonical = cluster_schedule == CANONICAL
    printer: RingStagePrinter
    if arch:
        kernels = HostKernelStagePrinter if cluster_schedule == HOST else KernelStagePrinter
        printer = kernels(target_of(plan, program, arch, core), program, names, is_cast(plan))
    else:
        kinds = {CANONICAL: CanonicalStagePrinter, HOST: HostStagePrinter}
        kind = kinds.get(cluster_schedule, RingStagePrinter)
        printer = kind(program, names, is_cast(plan))
    context = build_context(plan, program, printer)
    sweeps = context["sweeps"]
    stages, operands = [*context["forward"], *context["backward"]], context["operands"]
    travelling = [s for s in sweeps if isinstance(s, RingPassText)]
    if arch:
        plan = replace(plan, tile=launch_tile(plan, sweeps))
    header = [(key, text) for key, text in context["header"] if key != "schedule"]
    how = f"{cluster_schedule}; M, N of each rank; chunks of {chunk} rows travel"
    if cluster_schedule == HOST:
        how = f"{how} past {resident}"
    header.insert(3, ("schedule", how))
    context |= _gradients(context) | {
        "variant": variant,
        "glossary": [*context["glossary"], *map(wrap, names.meanings)],
        "usage": _usage(context["arguments"]),
        "device": device,
        "products": library_products(device, plan.precision, plan.library),
        "multiplied": context["multiplied"] and f"{context['multiplied']}, str(ring.lengths)",
        "scalar_home": '"cpu", ',
        "beside": _beside(device, context["arguments"][0], bool(arch), cluster_schedule == HOST),
        "kernels": kernel_context(plan, arch, context) if arch else {},
        "whole_rows": bool(arch) and cluster_schedule != HOST,
        "tile": plan.tile,
        "header": header,
        "canonical": canonical,
        "gathers": cluster_schedule == "all_gather",
        "two_level": cluster_schedule == "two_level",
        "half": cluster_schedule == HALF_RING,
        "both_ways": cluster_schedule == BOTH_WAYS,
        "two_groups": cluster_schedule in TWO_GROUPS,
        "host": cluster_schedule == HOST,
        "adds": cluster_schedule == HOST and find_continued(stages),
        "blocks": [s for s in sweeps if isinstance(s, LocalBlocks)],
        "on_gpu": device != "cpu",
        "streams": cluster_schedule == HOST and device != "cpu",
        "resident": resident,
        "row_norms": bool(context["norms"])
        or any("_row_norms(" in call.largest for s in stages for call in s.calls),
        "scaled": any(op.needed and (op.final_scale or not program.fused) for op in operands),
        "node": ranks_of_node,
        "chunk": chunk,
        "folds": sorted({how for s in travelling for how, _ in s.folds}),
        "travels": bool(travelling),
        "returns": _holds_back(plan, program, cluster_schedule),
        "reads_lengths": [a for a, _ in context["sizes"] if a in (ROWS, COLS)],
    }
    vectors = "\n".join(
        line for s in (*context["forward"], *context["backward"]) for line in s.vectors
    )
    context["reduces_softmean"] = "_softmean_of_all(" in vectors
    context["reduces_logsumexp"] = "_of_all(" in vectors
    text = environment().get_template(_TEMPLATE).render(context)
    return fit(drop_unused(tidy_text(text)))


def _holds_back(plan: Plan, program: Program, schedule: str) -> bool:
    """Whether gradients come home while a rank computes rows of its own."""
    problem = plan.problem
    sizes = problem.input_bytes, problem.compute_bytes
    held = [t.held_back(*sizes) for t in travels_of(program, problem)]
    return schedule in (TRAVEL, HALF_RING) and any(held)


def _usage(arguments: Sequence[str]) -> str:
    """A call, on one line of a docstring."""
    call = f"Loss.apply(ring, {', '.join(arguments)})"
    return call if len(call) < 80 else "Loss.apply(ring, *(by_name[name] for name in ARGUMENTS))"


def _beside(device: str, argument: str, launches: bool, in_host: bool) -> str:
    """Context managers in which everything lies, and is launched, on an argument's device, or on
    the ring's."""
    if device == "cpu":
        return ""
    if in_host:
        return "_OnDevice(ring), "
    return f"torch.cuda.device_of({argument}), " * launches + f"{argument}.device, "


def _gradients(context: Mapping[str, Any]) -> dict[str, Any]:
    """How gradients are returned: those of shards and of scalars are scaled by the convention."""
    operands = [op.name for op in context["operands"] if op.needed]
    kinds = ["shard" for _ in operands]
    values = [f"d_{name}" for name in operands]
    for name in context["gradients"]:
        kind = "scalar" if name in context["parameters"] else "shard"
        kinds.append(kind)
        values.append(f"d_{name} * of_{kind}s")
    return {
        "gradient_scales": tuple_text(f"ring.{kind}_scale" for kind in kinds),
        "ring_gradient_values": ", ".join(values) if len(values) > 1 else tuple_text(values),
    }


__all__ = ["render_ring"]
