"""Gradients of rows that leave a sweep as it goes, in the operand's own 16 bits.

Panels are visited row block by row block, so that a block of a left operand's gradient is complete
before the next one begins: it needs fp32 for one block, and not for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from cl_compiler.codegen.symbols import operand_scale
from cl_compiler.lang.ir import View
from cl_compiler.lang.program import Program
from cl_compiler.plan.types import DTYPE_BYTES


@dataclass(frozen=True)
class RowGradientText:
    """An operand's gradient that is complete row block by row block.

    Attributes:
        operand: x, say; ``total`` is all of its gradient, ``block`` room for rows in fp32.
        residual: vector of what rounding took off the gradient at each row's positive; "" if there
            is none.
        other: the positives' operand.
        inner: <operand, gradient>, which the sweep returns; "" if nobody asks.
        factor: what all of the gradient is scaled by.
    """

    operand: str
    residual: str
    other: str
    inner: str
    factor: str

    @property
    def total(self) -> str:
        return f"d_{self.operand}"

    @property
    def block(self) -> str:
        return f"d_{self.operand}_block"

    @property
    def rows(self) -> str:
        """As much of the block as there are rows left."""
        return f"d_{self.operand}_rows"


def inner_of(operand: str) -> str:
    """What a sweep calls <operand, gradient>."""
    return f"inner_{operand}"


def leaving_operands(program: Program, dtype: str) -> tuple[str, ...]:
    """Operands whose gradients leave so: one backward pass makes all of it, from the left.

    Args:
        program: any.
        dtype: of the operands; fp32 gradients are returned as they are summed.
    """
    plan = program.plan
    if DTYPE_BYTES[dtype] != 2 or program.schedule not in ("spill", "retain") or program.fused:
        return ()
    if plan.gradient is None or plan.positives == "views":
        return ()
    sums: dict[str, list[bool]] = {}
    for pass_ in program.passes:
        for tile in next(iter(pass_.programs.values())).gradients:
            leaf = plan.leaves[tile.similarity]
            for side, view in (("left", leaf.left), ("right", leaf.right)):
                if view is not None and side in pass_.sides and _is_wanted(program, view):
                    whole = side == "left" and not pass_.symmetric and not pass_.is_slots
                    sums.setdefault(view.operand, []).append(whole and view.prefix is None)
    return tuple(
        name
        for name, complete in sums.items()
        if complete == [True] and name not in _touched_later(program)
    )


def _is_wanted(program: Program, view: View) -> bool:
    return view.operand in program.plan.needs and not view.stop


def _touched_later(program: Program) -> set[str]:
    """Operands whose gradient gets something that is known after the sweep only."""
    plan = program.plan
    assert plan.gradient is not None
    found = {name for name in plan.needs if operand_scale(plan, name) == "mixed"}
    late = [plan.leaves[s] for s in plan.late_positives]
    late += [leaf for n, leaf in plan.leaves.items() if leaf.kind == "norm"]
    for leaf in late:
        found.update(v.operand for v in (leaf.left, leaf.right) if v is not None)
    return found


__all__ = ["RowGradientText", "inner_of", "leaving_operands"]
