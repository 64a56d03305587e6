"""``precision="fp8"``: similarities are products of e4m3 copies of 16-bit operands.

Everything that is made of similarities - statistics, positives, norms that divide them, the tiles
that the backward makes again - comes from the same copies, so that probabilities still sum to one
and no positive exceeds its row's sum.  Only the products with dL/dS read the operands themselves.
Statistics of one rounding beside tiles of another would not do: with logits of up to 100 most of a
confident row's gradient would be the difference of both roundings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cl_compiler.codegen.names import Names
from cl_compiler.lang.program import Program
from cl_compiler.plan.precision import FP8


@dataclass(frozen=True)
class EightBitCopy:
    """Identifiers of an operand's copy in e4m3, and of what one of its units stands for."""

    copy: str
    unit: str


def copies_of(program: Program, names: Names) -> dict[str, EightBitCopy]:
    """Of each operand."""
    return {
        op.name: EightBitCopy(names.fresh(f"{op.name}_fp8"), names.fresh(f"{op.name}_unit"))
        for op in program.plan.ir.operands
    }


def read_as(text: str, copies: Mapping[str, EightBitCopy]) -> tuple[str, str]:
    """(what similarities are made of, what its unit stands for or ""), of "x" or "x[:, :8]"."""
    operand, bracket, rest = text.partition("[")
    if operand not in copies:
        return text, ""
    return f"{copies[operand].copy}{bracket}{rest}", copies[operand].unit


def obstacle_of_eight_bits(program: Program) -> str:
    """Why a program has no kernels with fp8 products; "" where it has."""
    if program.schedule == "recompute":
        return (
            f"{FP8!r} has kernels where the library multiplies gradients; "
            "'recompute' multiplies what it loaded for the similarities"
        )
    if any(p.is_slots for p in program.passes):
        return f"{FP8!r} has kernels for similarities of all pairs, not for a row's own candidates"
    return ""


__all__ = ["EightBitCopy", "copies_of", "obstacle_of_eight_bits", "read_as"]
