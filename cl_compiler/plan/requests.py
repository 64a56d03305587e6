"""A request as JSON: what a plan depends on, canonically; the cache's key is made of it."""

from __future__ import annotations

from typing import Any

from cl_compiler.lang.ir import LossIR
from cl_compiler.plan.types import Request


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
        **({"group_size": request.group_size} if request.group_size else {}),
        **({"deterministic": True} if request.deterministic else {}),
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


__all__ = ["loss_to_json", "request_to_json"]
