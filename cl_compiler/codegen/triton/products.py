"""What follows a launch: partial statistics into vectors, gradient tiles into gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cl_compiler.codegen.names import Names
from cl_compiler.codegen.symbols import operand_scale
from cl_compiler.codegen.triton.owner import OwnerText
from cl_compiler.codegen.triton.text import KernelText, low_of
from cl_compiler.lang.ir import View
from cl_compiler.lang.program import Pass
from cl_compiler.lang.sweeps import SweepPlan
from cl_compiler.lang.tile_ir import GradientTile
from cl_compiler.plan.precision import SPLIT

Lies = Callable[[str, int], str]
"""(tensor, 0 where it belongs to rows or 1 to columns) → what the launcher calls it."""


@dataclass
class ProductText:
    """``_add_product(total, left, right)``: a gradient tile into an operand's gradient."""

    total: str
    left: str
    right: str
    scale: str
    mirrored: bool


def as_named(tensor: str, dim: int) -> str:
    """Everything is called by its name."""
    return tensor


def folds_of(
    kernel: KernelText, products: list[ProductText], mirrored_if: str = "j != i"
) -> list[str]:
    """Statements that fold a launch's statistics, and multiply its gradients out.

    ``mirrored_if``: when a panel stands for its transpose, too.
    """
    lines = []
    for p in kernel.partials:
        at, count, length = ("[i:i1]", "tiles", "m") if p.dim else ("[j:j1]", "strips", "n")
        if isinstance(kernel, OwnerText):
            count = "owners" if p.dim == kernel.own_dim else "1"
        parts = [f"{n}[: {count} * {length}].view({count}, {length})" for n in p.names]
        targets = [f"{t}{at}" for t in p.targets]
        name = "_add_sums" if p.kind == "sum" else f"_add_{p.kind}"
        statement = f"{name}({', '.join([*targets, *parts])})"
        lines += [f"if {mirrored_if}:", f"    {statement}"] if p.mirrored else [statement]
    for q in products:
        scale = f", {q.scale}" if q.scale else ""
        statement = f"_add_product({q.total}, {q.left}, {q.right}{scale})"
        lines += [f"if {mirrored_if}:", f"    {statement}"] if q.mirrored else [statement]
    return lines


def products_of(
    plan: SweepPlan,
    pass_: Pass,
    g: GradientTile,
    names: Names,
    precision: str,
    lies: Lies = as_named,
) -> list[ProductText]:
    """What multiplies a gradient tile into the operands' gradients."""
    assert not g.row_scale, "row scales belong to panels"
    leaf = plan.leaves[g.similarity]
    left, right = leaf.left, leaf.right
    assert left is not None and right is not None
    workspace = f"g_{g.similarity}"
    tiles = [workspace, low_of(workspace)] if precision == SPLIT else [workspace]
    result = []
    for dim, (view, other, at, there) in enumerate(
        ((left, right, "i:i1", "j:j1"), (right, left, "j:j1", "i:i1"))
    ):
        side = ("left", "right")[dim]
        if side not in pass_.sides or view.operand not in plan.needs or view.stop:
            continue
        own = leaf.scale and operand_scale(plan, view.operand) == "mixed"
        blocks = [f"{tile}[:m, :n]{'.T' * dim}" for tile in tiles]
        result.append(
            ProductText(
                part_of(lies(f"d_{view.operand}", dim), view, at),
                blocks[0] if len(blocks) == 1 else f"({', '.join(blocks)})",
                part_of(lies(other.operand, 1 - dim), other, there),
                names(leaf.scale) if own and leaf.scale else "",
                pass_.symmetric and dim == 1,
            )
        )
    return result


def operands_of(plan: SweepPlan, g: GradientTile) -> tuple[str, str]:
    """What a gradient tile is multiplied with."""
    leaf = plan.leaves[g.similarity]
    assert leaf.left is not None and leaf.right is not None
    return leaf.left.operand, leaf.right.operand


def part_of(matrix: str, view: View, rows: str) -> str:
    """Some rows of a matrix, and the columns that a view has of it."""
    return f"{matrix}[{rows}]" if view.prefix is None else f"{matrix}[{rows}, :{view.prefix}]"


__all__ = ["ProductText", "as_named", "folds_of", "operands_of", "part_of", "products_of"]
